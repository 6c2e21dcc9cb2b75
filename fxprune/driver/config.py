"""Every knob of the search, with its default and where the paper's value comes from (RL-Pruner, https://arxiv.org/abs/2411.06463)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fxprune.driver.targets import METRICS, Point, parse
from fxprune.errors import SearchError

Reward = Callable[[Mapping[str, float]], float]
FIRST = ("table", "even")
DECAYS = ("constant", "linear", "cosine")
RUNTIMES = ("eager", "compile", "onnx", "openvino")
STEP_UNITS = ("cost", "units")
RECOVERIES = ("none", "norms")


@dataclass(frozen=True)
class SearchConfig:
    """Options of a search. The defaults are ours, for a small CNN in minutes; ``preset("paper")`` gives the paper's."""

    targets: Any = ("macs=0.5",)  # one text, several texts or a mapping: see fxprune.driver.targets.parse
    costs: Any = None  # costs of your own, which targets may then name: name -> f(module) -> number, or module:function
    strategy: Any = "rl-pruner"  # rl-pruner, table, uniform, random, magnitude, optuna:SAMPLER, module:Class, or a Strategy subclass
    reward: Any = "accuracy"  # accuracy, flops, params, latency, module:function, or a function of the metrics
    alpha: float | None = None  # weight of the MACs removed in the reward; None: the preset reward's own
    beta: float | None = None  # weight of the parameters removed in the reward; None: the preset reward's own
    likeness: float = 1.0  # share of the accuracy in the reward that likeness to the original stands for, where it is scored. Paper: 0
    seed: int = 0
    tolerance: float = 0.01  # a result is on target when it is within this share of it

    # The prune steps (Wang 2024, sec. 3; constants from the authors' late code where the text gives none)
    steps: int | None = 1  # prune steps to the target; None: as many as step_ratio gives. Paper: None
    step_ratio: float = 0.01  # share of all units that a step removes. Paper: prune_filter_ratio, 1 %
    step_by: str = "cost"  # "units": equal unit counts, the paper's; "cost": equal shares of the way to the target, so candidates compare
    samples: int = 3  # actions sampled a round, and length of the replay buffer. Paper: 10
    rounds: int = 64  # rounds of sampling and updating a step. Paper: 10
    depth: int = 1  # levels of the sampled trajectories. Paper: 1 late, 2 early
    depth_scaling: float = 2.0  # level k draws samples / scaling^k children. Paper: 2
    discount: float = 0.9  # gamma of the look-ahead. Paper: 0.9
    noise: float = 0.4  # the largest standard deviation of the noise on an action. Paper: 0.04, absolute
    noise_relative: bool = True  # noise counted in mean entries (1 / groups), so it suits any number of groups. Paper: False
    screen: int = 16  # actions drawn for each one scored; a model of the rewards so far picks it. Paper: 1, what is drawn is scored
    halving: int = 2  # where there are cheaper scores by less data: one in so many of the candidates passes each of them; 1: none is used
    floor: float = 1e-5  # no entry of an action or policy is smaller. Paper: 1e-5
    step_length: float = 1.0  # how far the policy moves to the best action. Paper: 0.1
    clip: float | None = None  # a policy entry changes by at most this ratio a round. Paper: 0.25
    epsilon: float = 0.0  # chance of a random buffer entry as next architecture at the first step. Paper: 0.4
    epsilon_decay: str = "cosine"  # constant, linear or cosine. Paper: cosine
    epsilon_share: float = 0.1  # share of the steps over which epsilon decays; zero after it. Paper: a tenth
    patience: int | None = 16  # rounds without improvement after which a step ends early; None: never. Paper's early code: 3
    pays: float | None = 1e-3  # a step ends once the later half of its rounds gained less than this; None, or no patience: never
    improvement: float = 1e-4  # what counts as an improvement of the best Q
    sharp_drop: float = 0.10  # relative fall of accuracy that resets the policy and redoes the step once. Paper: 10 %
    recover_every: int = 0  # prune steps between recoveries (distillation); 0: none during the search. Paper: 1
    first: str = "table"  # the first sample: the error table's allocation, where there is calibration data, or "even". Paper: even
    warm_start: float = 0.0  # weight of the importance ranking in the first policy, 0 to 1. Paper: 0, proportional to group sizes
    storage: str | None = None  # optuna strategies: where the study is kept, for example sqlite:///study.db; None: in memory
    keep_best: bool = True  # result: the best on-target candidate scored; False: the last architecture, as in the paper
    finalists: int = 0  # with a rough score: candidates that are scored again, in full, at the end; 0: all are scored in full. Paper: 0
    evaluations: int | None = 400  # scorings at most, all told, shared out among the points of a Pareto run; None: no bound. Paper: none

    # Read by fxprune.search, which turns a network into a Problem; the driver does not look at them
    # auto: reconstruction where repair is lstsq or joint, else taylor; or random, l1, l2, variance, or a callable. Paper: taylor
    importance: Any = "auto"
    attention: str = "auto"
    ignore: tuple[str, ...] = ()
    round_to: int | None = None  # None: 1, or 8 where a latency of a convolutional network is the target, or any of a wide one. Paper: 1
    runtime: str = "eager"  # where latency is that of: eager, compile, onnx or openvino
    threads: int = 1  # of that runtime, on a CPU
    latency_batch: int | None = None  # samples a call in it; None: as many as the example inputs have
    most: Any = None  # the largest share of its units that any group loses, or a mapping from group, module or glob to it
    blocks: bool = False  # whole residual branches may be left out, beside units
    experts: bool = False  # whole experts of a mixture may go, beside widths
    loss: Any = None  # f(output, batch) -> scalar for importances that need gradients, or module:function; None: cross-entropy, where clear
    norms: str = "plain"  # or exact: statistics over channels keep the original's divisor. Paper: plain
    # repair inside the score and of the result: none, bn, bias, lstsq, joint (lstsq inside the score), a registered one, module:function,
    # or a function. Paper: none
    repair: Any = "lstsq"
    recover: str = "none"  # norms: between repair and distillation train the result's scales, shifts and biases alone. Paper: none
    recover_epochs: int = 2  # epochs of that
    device: str = "auto"

    # Where candidates are scored: never changes the result
    executor: str = "local"
    jobs: int = 1

    def __post_init__(self) -> None:
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
            raise SearchError(f"unknown search option {unknown[0]!r}; SearchConfig's docstring and source list them all")
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
        raise SearchError(f"search option {name} is {value}; it must be {expected}")


def _named(value: Any) -> Any:
    if callable(value):
        return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, Mapping):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_named(item) for item in value]
    return value
