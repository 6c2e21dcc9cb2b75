"""Candidates timed against the original, in the runtime that they are for."""

from __future__ import annotations

import copy
import importlib
import math
import statistics
from collections.abc import MutableMapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.errors import FxPruneError
from fxprune.evaluation.running import call, device_of, evaluating, to_device
from fxprune.example_inputs import build
from fxprune.exporting.formats import tensors
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.timing.runtimes import Run, Runtime, Subject, against, onnx_bytes, onnx_run, openvino_run

SECONDS = "latency"  # the name under which the original's time is kept
LOOKS = 9  # turns in which the original is timed alone
# A file is timed in several sessions: where in memory one lies makes it faster or slower by some per cent for as long as it lives. So many
# at least and at most, and the standard error of their mean, as a share of it, that ends it.
SESSIONS, MOST_SESSIONS, ENOUGH = 4, 12, 0.01
TURNS = 6  # of a session at most
AGREEMENT = 1e-3  # of the largest magnitude: how far a file made of the original's may be from the network


class CandidateTimer:
    """Times slim networks of an analysed model as shares of the original, which is prepared once.

    ``measured``: the original's seconds under "latency", once they are known; what is there already counts.
    """

    def __init__(self, graph: CouplingGraph, runtime: Runtime, measured: MutableMapping[str, float]) -> None:
        self.graph, self.runtime, self.measured = graph, runtime, measured
        self.device = device_of(graph.model)
        self.inputs = runtime.batched(build(graph.inputs, device=self.device))

    @property
    def seconds(self) -> float:
        """Of one call of the original."""
        if SECONDS not in self.measured:
            originals = [self._original() for _ in range(1 if self._files is None else SESSIONS)]
            found = [against(one, [one], self.runtime, LOOKS)[0] for one in originals]
            self.measured[SECONDS] = statistics.mean(found)
        return self.measured[SECONDS]

    def share(self, slim: nn.Module) -> float:
        """What ``slim`` takes, as a share of what the original takes at the same moment."""
        with self.runtime.threaded(), evaluating(slim):
            file = None if self._files is None else self._swapped(slim, self._files[0]) or self._exported(slim)
            run = None if file else self.runtime.prepared(slim, self.inputs)
        if run is not None:
            return against(self._original(), [self._subject(slim, run)], self.runtime)[1][0]
        found: list[float] = []
        while len(found) < SESSIONS or (len(found) < MOST_SESSIONS and _error(found) > ENOUGH):
            # The session that is made later is the faster one by a per cent or two, so each is first in turn.
            if len(found) % 2:
                original, subject = self._original(), self._subject(slim, self._session(file))
            else:
                subject, original = self._subject(slim, self._session(file)), self._original()
            found += against(original, [subject], self.runtime, TURNS)[1]
        return statistics.mean(found)

    def _original(self) -> Subject:
        model = self.graph.model
        with self.runtime.threaded(), evaluating(model):
            run = self._module if self._files is None else self._session(self._files[1])
        return self._subject(model, run)

    def _subject(self, model: nn.Module, run: Run) -> Subject:
        with self.runtime.threaded(), evaluating(model):
            run()
        return Subject(model, run, self.runtime.clock(self.device), self.device)

    @cached_property
    def _module(self) -> Run:
        return self.runtime.prepared(self.graph.model, self.inputs)

    @cached_property
    def _files(self) -> tuple[Any, bytes] | None:
        """The original as an ONNX model, exported once, and its file; None for runtimes that take modules."""
        if self.runtime.name not in ("onnx", "openvino"):
            return None
        onnx = importlib.import_module("onnx")
        keep = np.ones(int(self.graph.starts[-1]) if len(self.graph.starts) else 0, dtype=bool)
        whole = Slimmer(self.graph, keep).run().cpu().eval()
        file = self._exported(whole)
        proto = onnx.load_from_string(file)
        return proto, file

    def _exported(self, model: nn.Module) -> bytes:
        with self.runtime.refusing():
            return onnx_bytes(model, self.inputs)

    def _session(self, file: bytes | None) -> Run:
        assert file is not None, "runtimes that take modules have no sessions"
        run = onnx_run if self.runtime.name == "onnx" else openvino_run
        with self.runtime.refusing():
            return run(file, [t.detach().cpu().numpy() for t in tensors(self.inputs)], self.runtime)

    def _swapped(self, slim: nn.Module, original: Any) -> bytes | None:
        """The original's file with the weights of ``slim``, which spares the export; None where that is not the same network."""
        onnx = importlib.import_module("onnx")
        proto = copy.deepcopy(original)
        del proto.graph.value_info[:]
        state = {name: tensor.detach().cpu() for name, tensor in slim.state_dict().items()}
        for one in proto.graph.initializer:
            if one.name in state:
                one.CopyFrom(onnx.numpy_helper.from_array(state[one.name].contiguous().numpy(), one.name))
        modules = dict(slim.named_modules(remove_duplicate=False))
        for node in proto.graph.node:  # a depthwise convolution has as many groups as channels are left
            layer: Any = modules.get(node.input[1].rpartition(".")[0]) if node.op_type in ("Conv", "ConvTranspose") else None
            for attribute in node.attribute if isinstance(getattr(layer, "groups", None), int) else ():
                if attribute.name == "group":
                    attribute.i = layer.groups
        _open_sizes(proto, onnx)
        try:
            file: bytes = proto.SerializeToString()
            with self.runtime.refusing():
                found = self._session(file)()
        except FxPruneError:  # then it is exported in earnest
            return None
        found = list(found.values()) if hasattr(found, "values") else list(found)
        with torch.no_grad():
            wanted = tensors(call(slim, to_device(self.inputs, self.device)))
        return file if len(found) == len(wanted) and all(_same(f, w) for f, w in zip(found, wanted, strict=True)) else None


def _open_sizes(proto: Any, onnx: Any) -> None:
    """Leave the size of the features open where a tensor is flattened to (batch, features): the exporter has written it out."""
    made = {node.output[0]: node for node in proto.graph.node if node.output}
    held = {one.name: one for one in proto.graph.initializer}

    def sizes(name: str) -> list[int]:
        if name in held:
            return [int(n) for n in onnx.numpy_helper.to_array(held[name]).ravel()]
        node = made.get(name)
        if node is None or node.op_type not in ("Constant", "Concat"):
            return [-1] * 3
        if node.op_type == "Concat":
            return [size for source in node.input for size in sizes(source)]
        value = onnx.helper.get_attribute_value(node.attribute[0])
        return [int(n) for n in (onnx.numpy_helper.to_array(value).ravel() if hasattr(value, "dims") else value)]

    for number, node in enumerate(proto.graph.node):
        if node.op_type == "Reshape" and len(found := sizes(node.input[1])) == 2 and min(found) > 0:
            name = f"open sizes {number}"
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([found[0], -1]), name))
            node.input[1] = name


def _error(shares: Sequence[float]) -> float:
    """The standard error of the mean of ``shares``, as a share of it."""
    return statistics.stdev(shares) / math.sqrt(len(shares)) / statistics.mean(shares)


def _same(found: Any, wanted: torch.Tensor) -> bool:
    theirs, ours = np.asarray(found), wanted.detach().cpu().numpy()
    if theirs.shape != ours.shape:
        return False
    largest = float(np.abs(ours).max(initial=0.0)) or 1.0
    return bool(np.abs(theirs.astype(np.float64) - ours).max(initial=0.0) <= AGREEMENT * largest)
