"""Every knob of the search, with its default and where the paper's value comes from (RL-Pruner, https://arxiv.org/abs/2411.06463)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from fxprune.driver.targets import METRICS, Point, parse
from fxprune.errors import SearchError, shown
from fxprune.imports import suggestion

Reward = Callable[[Mapping[str, float]], float]
FIRST = ("table", "even")
DECAYS = ("constant", "linear", "cosine")
RUNTIMES = ("eager", "compile", "onnx", "openvino")
STEP_UNITS = ("cost", "units")
RECOVERIES = ("none", "norms")
# What an option must be, by the annotation of its field; the others are checked where they are read.
_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a text"),
}


@dataclass(frozen=True)
class SearchConfig:
    """Options of a search.

    The defaults are ours, for a small CNN in minutes. ``preset("paper")`` gives those of RL-Pruner, which stand after "Paper": of Wang
    2024, sec. 3, and of the authors' late code where the text gives none.

    Args:
        targets: what must be left of the original: a text ("macs=0.5"), several of them, or a mapping from metric to share; commas
            ("macs=0.7,0.5") make a Pareto run. The metrics are macs, params, latency (a share, or a time as in "latency=12ms") and memory,
            each as the share that is left, and sparsity, the share of the output channels that goes.
        costs: costs of your own, which targets may then name: name -> ``f(module) -> number``, or "module:function".
        strategy: "rl-pruner", "table", "uniform", "random", "magnitude", "optuna:SAMPLER", "module:Class", or a class of ``Strategy``.
        reward: "accuracy", "flops", "params", "latency", "module:function", or a function of the metrics. The highest wins.
        alpha: weight in the reward of the share of MACs removed. None: the reward's own.
        beta: weight in the reward of the share of parameters removed. None: the reward's own.
        likeness: from 0 to 1, how much of the accuracy in the reward likeness to the original replaces, where that is scored. Paper: 0.
        seed: of everything that is drawn at random; the same seed gives the same policy.
        tolerance: a result is on target within this share of the target; for latency, which is measured, at least 0.05.
        steps: prune steps to the target. None: as many as ``step_ratio`` gives. Paper: None.
        step_ratio: share of all units that one step removes. Paper: 0.01, its prune_filter_ratio.
        step_by: how the way to the target is divided: "cost", into steps that cost the same share, so that candidates can be compared;
            "units", into steps of as many units. Paper: "units".
        samples: actions sampled per round, and the length of the replay buffer. Paper: 10.
        rounds: rounds of sampling and updating per step. Paper: 10.
        depth: levels of the sampled trajectories. Paper: 1 in its late code, 2 in its early one.
        depth_scaling: level k draws ``samples / depth_scaling**k`` children. Paper: 2.
        discount: gamma of the look-ahead, from 0 to 1. Paper: 0.9.
        noise: the largest standard deviation of the noise on an action. Paper: 0.04, absolute.
        noise_relative: whether noise is counted in mean entries (1 / groups), so that it suits any number of groups. Paper: False.
        screen: actions drawn for each one that is scored; a model of the rewards so far picks it. Paper: 1, all are scored.
        halving: where there are cheaper scores on less data (``rungs``), one in so many candidates passes each of them; 1: none is used.
            Paper: 1.
        floor: the least value of an entry of an action or of the policy. Paper: 1e-5.
        step_length: how far the policy moves to the best action, above 0 and at most 1. Paper: 0.1.
        clip: the largest ratio by which a policy entry changes in a round. None: no bound. Paper: 0.25.
        epsilon: chance of taking a random buffer entry as the next architecture, at the first step. Paper: 0.4.
        epsilon_decay: how that chance falls: "constant", "linear" or "cosine". Paper: "cosine".
        epsilon_share: share of the steps in which it falls; after them it is 0. Paper: 0.1.
        patience: rounds without improvement after which a step ends early. None: never. Paper: None; 3 in its early code.
        pays: a step also ends once the later half of its rounds gained less than this. None, or no ``patience``: never. Paper: None.
        improvement: the least gain of the best Q that counts as an improvement.
        sharp_drop: relative fall of accuracy after which the policy is reset and the step done again, once. Paper: 0.1.
        recover_every: prune steps between recoveries (distillation); 0: none during the search. Paper: 1.
        first: the first sample: "table", the error table's allocation, where there is calibration data; or "even". Paper: "even".
        warm_start: weight of the importance ranking in the first policy, from 0 to 1. Paper: 0, proportional to group sizes.
        storage: where Optuna keeps its study, for example "sqlite:///study.db". None: in memory.
        keep_best: whether the result is the best candidate scored that is on target. False: the last architecture, as in the paper.
        finalists: with a rough score, how many candidates are scored again in full at the end; 0: all are scored in full. Paper: 0.
        evaluations: the most candidates scored, shared out among the points of a Pareto run. None: no bound. Paper: None.
        importance: "auto" ("reconstruction" where ``repair`` is "lstsq" or "joint", else "taylor"), another that ``compress`` takes, or a
            callable. Paper: "taylor".
        attention: as for ``compress``: "heads", "head_dim" or "auto".
        ignore: names or globs of modules whose output channels stay.
        round_to: channels kept are rounded up to a multiple of it. None: 1, but 8 where the latency of a convolutional network is the
            target, or any target of a wide one. Paper: 1.
        runtime: runtime in which latency is measured: "eager", "compile", "onnx" or "openvino".
        threads: threads of that runtime, on a CPU.
        latency_batch: samples per call of it. None: as many as the example inputs have.
        most: the largest share of its units that any group loses, or a mapping from group, module or glob to it.
        blocks: whether whole residual branches may be left out, beside units.
        experts: whether whole experts of a mixture may go, beside widths.
        loss: ``f(output, batch) -> scalar`` for importances that need gradients, or "module:function". None: cross-entropy, where output
            and batch leave no doubt.
        norms: "plain", or "exact": statistics over channels keep the original's divisor. Paper: "plain".
        repair: what repairs a candidate before it is scored, and the result: "none", "bn", "bias", "lstsq", "joint" (of candidates
            "lstsq"), a registered one, "module:function", or a function. Paper: "none".
        recover: "none"; or "norms": between repair and distillation only the result's scales, shifts and biases are trained. Paper: "none".
        recover_epochs: epochs of that.
        device: "auto", or a device of torch.
        executor: what scores candidates, "local" or "ray". It never changes the result, nor does ``jobs``.
        jobs: worker processes.

    Raises:
        SearchError: an option has a wrong type or is out of range.
    """

    targets: Any = ("macs=0.5",)
    costs: Any = None
    strategy: Any = "rl-pruner"
    reward: Any = "accuracy"
    alpha: float | None = None
    beta: float | None = None
    likeness: float = 1.0
    seed: int = 0
    tolerance: float = 0.01
    steps: int | None = 1
    step_ratio: float = 0.01
    step_by: str = "cost"
    samples: int = 3
    rounds: int = 64
    depth: int = 1
    depth_scaling: float = 2.0
    discount: float = 0.9
    noise: float = 0.4
    noise_relative: bool = True
    screen: int = 16
    halving: int = 2
    floor: float = 1e-5
    step_length: float = 1.0
    clip: float | None = None
    epsilon: float = 0.0
    epsilon_decay: str = "cosine"
    epsilon_share: float = 0.1
    patience: int | None = 16
    pays: float | None = 1e-3
    improvement: float = 1e-4
    sharp_drop: float = 0.10
    recover_every: int = 0
    first: str = "table"
    warm_start: float = 0.0
    storage: str | None = None
    keep_best: bool = True
    finalists: int = 0
    evaluations: int | None = 400
    importance: Any = "auto"
    attention: str = "auto"
    ignore: tuple[str, ...] = ()
    round_to: int | None = None
    runtime: str = "eager"
    threads: int = 1
    latency_batch: int | None = None
    most: Any = None
    blocks: bool = False
    experts: bool = False
    loss: Any = None
    norms: str = "plain"
    repair: Any = "lstsq"
    recover: str = "none"
    recover_epochs: int = 2
    device: str = "auto"
    executor: str = "local"
    jobs: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "costs", read_costs(self.costs))
        object.__setattr__(self, "most", read_most(self.most))
        parse(self.targets, tuple(self.costs or ()))
        for name in ("samples", "rounds", "depth", "screen", "halving", "jobs", "threads"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("steps", "patience", "evaluations", "round_to", "latency_batch"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, name, getattr(self, name), "at least 1, or none")
        for name in ("epsilon", "epsilon_share", "discount", "warm_start", "sharp_drop", "likeness"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        for name in ("step_ratio", "step_length", "tolerance"):
            _require(0 < getattr(self, name) <= 1, name, getattr(self, name), "above 0 and at most 1")
        for name in ("noise", "improvement"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "a finite number, 0 or more")
        _require(self.pays is None or 0 <= self.pays < float("inf"), "pays", self.pays, "a finite number, 0 or more, or none")
        _require(0 < self.floor < 1e-2, "floor", self.floor, "above 0 and below 0.01")
        if self.blocks and self.recover_every:
            raise SearchError("blocks and recover_every do not go together: what is left out cannot be trained back; leave one of them out")
        _require(self.depth_scaling >= 1, "depth_scaling", self.depth_scaling, "at least 1")
        _require(self.clip is None or 0 < self.clip < 1, "clip", self.clip, "between 0 and 1, or none")
        for name in ("recover_every", "recover_epochs", "finalists", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.epsilon_decay in DECAYS, "epsilon_decay", self.epsilon_decay, f"one of {', '.join(DECAYS)}")
        _require(self.runtime in RUNTIMES, "runtime", self.runtime, f"one of {', '.join(RUNTIMES)}")
        _require(self.recover in RECOVERIES, "recover", self.recover, f"one of {', '.join(RECOVERIES)}")
        _require(self.first in FIRST, "first", self.first, f"one of {', '.join(FIRST)}")
        _require(self.step_by in STEP_UNITS, "step_by", self.step_by, f"one of {', '.join(STEP_UNITS)}")

    def _check_types(self) -> None:
        """A number of NumPy's becomes one of Python's: the options are written as JSON."""
        for one in fields(self):
            name, optional, _ = str(one.type).partition(" | ")
            value = getattr(self, one.name)
            if name not in _KINDS or (optional and value is None):
                continue
            kind, called = _KINDS[name]
            right = isinstance(value, kind) and (name == "bool" or not isinstance(value, bool))
            _require(right, one.name, value, f"{called}, or none" if optional else called)
            if name in ("int", "float") and type(value) not in (int, float):
                object.__setattr__(self, one.name, int(value) if name == "int" else float(value))

    @property
    def table(self) -> str:
        """Whether the search needs an error table: "must" where it consists of its allocation, "may" where it begins with it, else "no"."""
        if self.strategy == "table":
            return "must"
        return "may" if self.strategy == "rl-pruner" and self.first == "table" and not self.warm_start else "no"

    @property
    def timed(self) -> bool:
        """Whether a latency is among the targets."""
        return any(target.metric == "latency" for point in self.points for target in point)

    @property
    def points(self) -> tuple[Point, ...]:
        """The targets of each point of a Pareto run; a single one in an ordinary run."""
        return parse(self.targets, tuple(self.costs or ()))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SearchConfig:
        """The options of a preset, "default" or "paper", with ``changes`` on top. Raises ``SearchError`` for an unknown name."""
        if name not in PRESETS:
            raise SearchError(f"unknown preset {name!r}; use one of {', '.join(PRESETS)}")
        unknown = sorted(set(changes) - {field.name for field in fields(cls)})
        if unknown:
            near = suggestion(unknown[0], (one.name for one in fields(cls))) or "; help(fxprune.SearchConfig) lists them all"
            raise SearchError(f"unknown search option {unknown[0]!r}{near}")
        return cls(**{**PRESETS[name], **changes})

    def with_targets(self, point: Point) -> SearchConfig:
        """The same options for one point."""
        return replace(self, targets=tuple(str(target) for target in point))

    def described(self) -> dict[str, Any]:
        """The options as JSON; functions and classes by their qualified names."""
        return {name: _named(value) for name, value in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """The options on which the result depends: those that a resumed search must share."""
        return {name: value for name, value in self.described().items() if name not in ("executor", "jobs", "device")}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {
        "steps": None,
        "step_ratio": 0.01,
        "step_by": "units",
        "samples": 10,
        "rounds": 10,
        "depth": 1,
        "discount": 0.9,
        "noise": 0.04,
        "likeness": 0.0,
        "noise_relative": False,
        "screen": 1,
        "halving": 1,
        "floor": 1e-5,
        "step_length": 0.1,
        "clip": 0.25,
        "epsilon": 0.4,
        "epsilon_decay": "cosine",
        "epsilon_share": 0.1,
        "patience": None,
        "pays": None,
        "sharp_drop": 0.10,
        "recover_every": 1,
        "first": "even",
        "warm_start": 0.0,
        "keep_best": False,
        "round_to": 1,
        "finalists": 0,
        "evaluations": None,
        "importance": "taylor",
        "repair": "none",
    },
}


def read_costs(given: Any) -> dict[str, Any] | None:
    """Costs of the user's own, by name: a mapping, or texts ``NAME=module:function``. Raises ``SearchError`` for anything else."""
    if given is None:
        return None
    if not isinstance(given, (str, Mapping, Iterable)):
        raise SearchError(f"costs is {shown(given)}; it must be a mapping from names to functions, as in costs={{'energy': f}}")
    pairs: dict[str, Any] = {}
    if isinstance(given, Mapping):
        pairs.update((str(name), cost) for name, cost in given.items())
    else:
        for text in [given] if isinstance(given, str) else list(given):
            name, sign, path = str(text).partition("=")
            if not sign or not path.strip():
                raise SearchError(f"cost {text!r} is malformed; write NAME=module:function, for example energy=costs:energy")
            pairs[name.strip()] = path.strip()
    for name, cost in pairs.items():
        if name in METRICS or not name.isidentifier():
            raise SearchError(f"a cost of your own cannot be named {name!r}; take a word other than {', '.join(METRICS)}")
        if not callable(cost) and not (isinstance(cost, str) and ":" in cost):
            raise SearchError(f"cost {name!r} is {cost!r}; it must be a function of the module, or module:function")
    return pairs


def read_most(given: Any) -> Any:
    """A limit for groups: a share, a mapping, or either as text ("0.9", "layer1.*=0.5,stem=0.25"). Raises ``SearchError``."""
    if isinstance(given, str):
        parts = [part.rpartition("=") for part in given.split(",")]
        try:
            if len(parts) == 1 and not parts[0][1]:
                given = float(given)
            else:
                given = {key.strip(): float(share) for key, _, share in parts}
        except ValueError:
            raise SearchError(f"most {given!r} is malformed; write a share, or NAME=SHARE,..., for example layer1.*=0.5") from None
    shares = list(given.values()) if isinstance(given, Mapping) else [] if given is None else [given]
    for share in shares:
        right = isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= 1
        _require(right, "most", share, "a share from 0 to 1, or a mapping to such shares")
    return dict(given) if isinstance(given, Mapping) else given


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise SearchError(f"search option {name} is {shown(value)}; it must be {expected}")


def _named(value: Any) -> Any:
    if callable(value):
        return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, Mapping):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_named(item) for item in value]
    return value
