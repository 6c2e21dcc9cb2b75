"""One network measured: dense, pruned to two budgets by two allocations, repaired without training, exported and timed."""

from __future__ import annotations

import copy
import gc
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fxprune
from benchmarks.trained.network import Network, Task
from benchmarks.trained.peers import PEERS
from fxprune.allocation.allocating import allocate
from fxprune.allocation.trying import TRIALS
from fxprune.errors import FxPruneError, TargetError
from fxprune.evaluation.running import call
from fxprune.repair.distance import unlikeness

Cell = dict[str, Any]
SHARES = (0.75, 0.5)  # of the multiply-accumulates that are left
METHODS = ("uniform", "table")
TABLE, JOINT = "table 0.5", "joint 0.5"  # one allocation, repaired by least squares, and by that and gradient steps of all weights
SEARCH = "search 0.5"  # beside them, where it is asked for
EVALUATIONS = 60  # candidates it scores, without labels: by how far the outputs on half of the calibration inputs are from the dense ones
RUNS = 15  # timed calls of ONNX Runtime; the median counts


def cells(
    network: Network, folder: Path, done: dict[str, Cell], tools: Sequence[str] = (), shares: Sequence[float] = SHARES, search: bool = False
) -> Iterator[tuple[str, Cell]]:
    """The cells that ``done`` lacks, by name, as they are finished; a cell that raised holds the error, in a line.

    Where "joint" is lacking, the other cells of its allocation are measured again, so that all of them are of one slim network.
    """
    wanted = [
        "dense",
        *(f"{method} {share}" for share in sorted(shares) for method in METHODS),
        *([JOINT] if SHARES[-1] in shares else []),
        "time",
        *tools,
        *([SEARCH] if search else []),
    ]
    lacking = {name for name in wanted if "error" in done.get(name, {"error": ""})}
    if JOINT in lacking:
        lacking |= {TABLE, "time"}
    if not lacking:
        return
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what old packages say about torch, and lacking channels, which the shares show
        task = network.make(folder)
        measure = _Measure(task)
        for name in [one for one in wanted if one in lacking]:
            yield name, _caught(lambda name=name: measure.cell(name))  # type: ignore[misc]
            gc.collect()


def _caught(make: Callable[[], Cell]) -> Cell:
    begun = time.process_time()
    try:
        found = make()
    except FxPruneError as error:
        return {"error": _plain(f"{type(error).__name__}: {error}".splitlines()[0]), "ours": True}
    except Exception as error:  # noqa: BLE001 - other tools and strangers' packages raise anything, and the table says what
        return {"error": _plain(" ".join(f"{type(error).__name__}: {error}".split()))[:300]}
    return {**found, "seconds": round(time.process_time() - begun, 1)}


def _plain(text: str) -> str:
    """``text`` without the paths of this machine."""
    return re.sub(r"\S*/site-packages/", "", re.sub(r" ?\(/[^)]*\)", "", text))


class _Measure:
    def __init__(self, task: Task) -> None:
        self.task = task
        self._graph: Any = None
        self._slims: dict[tuple[str, float], tuple[nn.Module, Any, Cell]] = {}

    @property
    def graph(self) -> Any:
        if self._graph is None:
            self._graph = fxprune.analyze(self.task.model, self.task.example)
        return self._graph

    def cell(self, name: str) -> Cell:
        if name == "dense":
            return {"score": self.score(self.task.model), **self.size(self.task.model), **self.locked()}
        if name == "time":
            return self.times()
        if name in PEERS:
            slim = PEERS[name](self.task, self.graph)
            return {"score": self.score(slim), **self.size(slim)}
        method, _, share = name.partition(" ")
        return self.pruned(method, float(share))

    def pruned(self, method: str, share: float) -> Cell:
        """The score after repair and as sliced."""
        slim, policy, note = self.slim(method, share)
        sliced = fxprune.compress(self.graph, policy)
        return {
            "score": self.score(slim),
            "sliced": self.score(sliced),
            **self.size(slim),
            **note,
            "notes": [_plain(note) for note in fxprune.record(slim).notes],
        }

    def slim(self, method: str, share: float) -> tuple[nn.Module, Any, Cell]:
        """The repaired slim network, its policy, and what to know of them."""
        if (method, share) not in self._slims:
            self._slims[method, share] = self._made(method, share)
        return self._slims[method, share]

    def _made(self, method: str, share: float) -> tuple[nn.Module, Any, Cell]:
        note: Cell = {}
        target = f"macs={share}"
        if method == "table":  # as compress does it with the target; this policy also lists the units
            policy: Any = allocate(self.graph, {"macs": share}, self.task.calibration, repair="lstsq", trials=TRIALS)
            return fxprune.compress(self.graph, policy, calibration=self.task.calibration, repair="lstsq"), policy, note
        if method == "joint":
            fitted, policy, _ = self.slim("table", share)
            slim = fxprune.compress(self.graph, policy, calibration=self.task.calibration, repair="joint")
            return slim, policy, {"moved": not _same(slim, fitted)}
        if method == "search":
            found = self.searched(target)
            return found.model, found.policy, {"evaluations": found.evaluations}
        try:
            policy = fxprune.record(fxprune.compress(self.graph, target)).policy
        except TargetError as error:  # the rest is locked: the nearest is measured, and the table has its share
            policy, note = error.nearest, {"short": str(error)}
        slim = fxprune.compress(self.graph, policy, calibration=self.task.calibration, importance="l2", repair="lstsq")
        return slim, policy, note

    def searched(self, target: str) -> fxprune.SearchResult:
        """What a search finds that sees no label."""
        inputs = self.task.calibration
        fitted, judged = (inputs[::2], inputs[1::2]) if len(inputs) > 1 else (inputs, inputs)
        with torch.no_grad():
            wanted = [call(self.task.model, one) for one in judged]

        def likeness(slim: nn.Module) -> float:
            with torch.no_grad():
                return -unlikeness([call(slim, one) for one in judged], wanted)

        config = fxprune.SearchConfig(targets=target, evaluations=EVALUATIONS)
        return fxprune.search(self.task.model, self.task.example, likeness, config=config, calibration=fitted)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        return round(self.task.score(model.eval()), 4)

    def size(self, model: nn.Module) -> Cell:
        found = fxprune.profile(model, self.task.example)
        return {"macs": found.macs, "params": found.params}

    def locked(self) -> Cell:
        """The share of all channels that no policy may take, with the reason that locks most."""
        groups = self.graph.groups
        reasons: dict[str, int] = {}
        for group in groups:
            if not group.prunable:
                reasons[str(group.reason)] = reasons.get(str(group.reason), 0) + group.size
        total = sum(group.size for group in groups)
        why = max(reasons, key=lambda reason: reasons[reason]) if reasons else ""
        return {"locked": round(sum(reasons.values()) / max(total, 1), 3), "why": _plain(str(why))}

    def times(self) -> Cell:
        """ONNX Runtime on one thread: milliseconds of the dense network and of the table's at half the MACs."""
        slim, _, _ = self.slim("table", 0.5)
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                _Runtime(model, self.task.example, Path(folder) / f"{name}.onnx")
                for name, model in (("dense", fxprune.compress(self.graph, 0.0)), ("slim", slim))
            ]
            samples = [[run.milliseconds() for run in runs] for _ in range(RUNS)]  # by turns: what else runs here slows both
        dense, after = (statistics.median(sample[side] for sample in samples) for side in (0, 1))
        return {"dense": round(dense, 3), "slim": round(after, 3), "share": round(after / dense, 3)}


def _same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


class _Runtime:
    """A module written as ONNX and opened in ONNX Runtime, on one thread."""

    def __init__(self, model: nn.Module, example: Any, path: Path) -> None:
        import onnxruntime

        fxprune.export(copy.deepcopy(model).eval(), path, "onnx", example_inputs=example, dynamic={})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        left = [leaf.numpy() for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)]
        self.feed = {}
        for one in self.session.get_inputs():  # the file has no input that nothing reads
            place = next(i for i, value in enumerate(left) if list(value.shape) == list(one.shape))
            self.feed[one.name] = left.pop(place)
        self.session.run(None, self.feed)

    def milliseconds(self) -> float:
        begun = time.perf_counter()
        self.session.run(None, self.feed)
        return 1e3 * (time.perf_counter() - begun)
