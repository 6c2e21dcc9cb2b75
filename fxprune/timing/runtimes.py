"""The runtimes that a network can be timed in, and networks timed against each other there.

A time is a share of another network's, measured in the same moment: what else the machine does then falls on both.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.errors import FxPruneError, InputError, first_line
from fxprune.evaluation.running import call, device_of, evaluating, to_device
from fxprune.example_inputs import call_form
from fxprune.exporting.formats import tensors
from fxprune.imports import needed
from fxprune.passes.compat import many_compiled, tree_map_only

Run = Callable[[], Any]
LEAST, ENOUGH, MOST = 5, 0.006, 25  # turns of a measurement at least and at most, and the standard error of the share that ends it
TURN, CALLS = 0.03, 3  # seconds and calls of a turn at least
WARM_UP = 2


@dataclass(frozen=True)
class Runtime:
    """Where networks are timed.

    ``name``: one of ``RUNTIMES``. ``threads``: on a CPU. ``batch``: samples a call; None: as many as the example inputs have.
    """

    name: str = "eager"
    threads: int = 1
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            raise InputError(f"runtime {self.name!r} is unknown; use one of {', '.join(RUNTIMES)}")
        if self.threads < 1 or (self.batch is not None and self.batch < 1):
            raise InputError(f"threads is {self.threads} and the batch {self.batch}; both must be at least 1")

    def __str__(self) -> str:
        return f"{self.name}, {self.threads} thread{'s' * (self.threads > 1)}" + (f", batch {self.batch}" if self.batch else "")

    def batched(self, inputs: Any) -> Any:
        """``inputs`` with as many samples as are timed, along the first axis of every tensor; the same ones again and again."""
        if self.batch is None:
            return inputs
        count = self.batch
        return tree_map_only(Tensor, lambda t: t[torch.arange(count) % len(t)] if t.ndim else t, inputs)

    def prepared(self, model: nn.Module, inputs: Any) -> Run:
        """``model`` ready to be called on ``inputs`` again and again; it must not change from now on.

        Raises ``DependencyError`` where the runtime is not installed, ``FxPruneError`` where it does not take the network.
        """
        with self.refusing():
            return RUNTIMES[self.name](model, self.batched(inputs), self)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What a runtime raises in the block as an ``FxPruneError``."""
        try:
            yield
        except FxPruneError:
            raise
        except Exception as error:  # exporters and runtimes raise what they like
            raise FxPruneError(f"the network cannot be timed in {self.name}: {first_line(error)}; choose another runtime") from error

    def clock(self, device: torch.device) -> Callable[[], float]:
        """Seconds: of this process's CPU time on one thread, which a busy machine stretches far less than the wall clock's."""
        return time.process_time if self.threads == 1 and device.type == "cpu" else time.perf_counter

    @contextmanager
    def threaded(self) -> Iterator[None]:
        """torch's own threads in the block as many as are timed."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class Subject:
    """A network that is ready to run, where, and the module that is to be in evaluation mode then."""

    model: nn.Module
    run: Run
    clock: Callable[[], float]
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, runtime: Runtime) -> Subject:
        with runtime.threaded(), evaluating(model):
            device = device_of(model)
            run = runtime.prepared(model, to_device(inputs, device))
            for _ in range(WARM_UP):
                run()
        return cls(model, run, runtime.clock(device), device)

    def seconds(self, runs: int = 1) -> float:
        """Seconds a call, over so many, after one that brings back to the caches what another network has driven out."""
        self.run()
        self._wait()
        started = self.clock()
        for _ in range(runs):
            self.run()
        self._wait()
        return (self.clock() - started) / runs

    def runs(self) -> int:
        """How many calls make a turn."""
        return max(CALLS, min(200, math.ceil(TURN / max(self.seconds(), 1e-6))))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def against(first: Subject, others: Sequence[Subject], runtime: Runtime, most: int = MOST) -> tuple[float, list[float]]:
    """Seconds a call of ``first``, and what share of it each of the ``others`` takes: medians over turns, in which all run.

    Turns are taken until the standard error of every share is small, or there were ``most``.
    """
    shares: list[list[float]] = [[] for _ in others]
    whole: list[float] = []
    with runtime.threaded(), ExitStack() as modes:
        for subject in (first, *others):
            modes.enter_context(evaluating(subject.model))
        counts = [one.runs() for one in (first, *others)]
        while len(whole) < LEAST or (len(whole) < most and any(_error(found) > ENOUGH for found in shares)):
            whole.append(first.seconds(counts[0]))
            for one, count, found in zip(others, counts[1:], shares, strict=True):
                found.append(one.seconds(count) / whole[-1])
    return statistics.median(whole), [statistics.median(found) for found in shares]


def _error(shares: Sequence[float]) -> float:
    """The standard error of the median of ``shares``, as a share of it, by what lies between the quartiles."""
    low, _, high = statistics.quantiles(shares, n=4)
    return 1.25 * (high - low) / 1.35 / math.sqrt(len(shares)) / max(statistics.median(shares), 1e-12)


def in_turns(models: Sequence[nn.Module], inputs: Any, runtime: Runtime) -> list[float]:
    """Seconds a call of every network, all timed in turns."""
    first, *others = [Subject.of(model, inputs, runtime) for model in models]
    whole, shares = against(first, others, runtime)
    return [whole, *(whole * share for share in shares)]


# -- what runs a network in each runtime ----------------------------------------------------------------------------------


def _eager(model: nn.Module, inputs: Any, runtime: Runtime) -> Run:
    return lambda: call(model, inputs)


def _compiled(model: nn.Module, inputs: Any, runtime: Runtime) -> Run:
    # Slim networks of one graph share the code of their forward, of which dynamo compiles a few forms before it gives up.
    with many_compiled():
        compiled: Any = torch.compile(model)
        call(compiled, inputs)

    def run() -> Any:
        with many_compiled():
            return call(compiled, inputs)

    return run


def _onnx(model: nn.Module, inputs: Any, runtime: Runtime) -> Run:
    return onnx_run(onnx_bytes(model, inputs), [t.detach().cpu().numpy() for t in tensors(inputs)], runtime)


def _openvino(model: nn.Module, inputs: Any, runtime: Runtime) -> Run:
    return openvino_run(onnx_bytes(model, inputs), [t.detach().cpu().numpy() for t in tensors(inputs)], runtime)


def onnx_bytes(model: nn.Module, inputs: Any) -> bytes:
    """``model`` as an ONNX file at the sizes of ``inputs``; its initialisers bear the names of its ``state_dict``."""
    for package in ("onnx", "onnxscript"):
        needed(package, "timing in ONNX Runtime or OpenVINO", "onnx")
    args, kwargs = call_form(to_device(inputs, "cpu"))
    twin = model if device_of(model).type == "cpu" else copy.deepcopy(model).cpu()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what the exporter says about its own insides
        # The runtime itself folds constants and norms.
        made: Any = torch.onnx.export(twin, args, kwargs=kwargs, dynamo=True, verbose=False, optimize=False)
    proto = made.model_proto
    _without_zero_biases(proto)
    found: bytes = proto.SerializeToString()
    return found


def _without_zero_biases(proto: Any) -> None:
    """Take away what the exporter writes for a convolution that has no bias: zeros, expanded to its width when the network runs.

    The runtime does not fold them, and a norm goes into the convolution before it only where that one's bias is a constant.
    """
    numpy_helper = needed("onnx", "timing in ONNX Runtime or OpenVINO", "onnx").numpy_helper
    made = {name: node for node in proto.graph.node for name in node.output}
    held = {one.name: one for one in proto.graph.initializer}

    def is_zero(name: str) -> bool:
        node = made.get(name)
        if node is None:
            return name in held and not numpy_helper.to_array(held[name]).any()
        if node.op_type == "Constant":
            return any(attribute.name == "value" and not numpy_helper.to_array(attribute.t).any() for attribute in node.attribute)
        return node.op_type in ("Cast", "CastLike", "Expand") and is_zero(node.input[0])

    for node in proto.graph.node:
        expanded = node.op_type in ("Conv", "ConvTranspose") and len(node.input) == 3 and node.input[2] in made
        if expanded and made[node.input[2]].op_type == "Expand" and is_zero(node.input[2]):
            del node.input[2]
    if any(attribute.HasField("g") or attribute.graphs for node in proto.graph.node for attribute in node.attribute):
        return  # what is read in there is not counted below
    read = {name for node in proto.graph.node for name in node.input} | {one.name for one in proto.graph.output}
    for node in reversed(list(proto.graph.node)):  # the runtime would run what is of no use now
        if node.op_type in ("Cast", "CastLike", "Expand", "Shape", "Constant") and not read & set(node.output):
            proto.graph.node.remove(node)
            read = {name for one in proto.graph.node for name in one.input} | {one.name for one in proto.graph.output}


def onnx_run(file: bytes, inputs: Sequence[Any], runtime: Runtime) -> Run:
    """An ONNX file ready to run in ONNX Runtime."""
    ort = needed("onnxruntime", "timing in ONNX Runtime", "onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = runtime.threads, 1
    options.log_severity_level = 4  # what fails is an exception as well
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    fed = {one.name: array for one, array in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, fed)


def openvino_run(file: bytes, inputs: Sequence[Any], runtime: Runtime) -> Run:
    """An ONNX file ready to run in OpenVINO."""
    openvino = needed("openvino", "timing in OpenVINO", "openvino")
    hints = {"INFERENCE_NUM_THREADS": runtime.threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    ready = core.compile_model(core.read_model(file, b""), "CPU", hints)
    given = [np.ascontiguousarray(array) for array in inputs]
    return lambda: ready(given)


RUNTIMES: dict[str, Callable[[nn.Module, Any, Runtime], Run]] = {
    "eager": _eager,
    "compile": _compiled,
    "onnx": _onnx,
    "openvino": _openvino,
}
