"""Candidates timed against the original, in the runtime that they are for."""

from __future__ import annotations

import copy
import importlib
from collections.abc import MutableMapping
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
            original = self._original()
            self.measured[SECONDS], _ = against(original, [original], self.runtime, LOOKS)
        return self.measured[SECONDS]

    def share(self, slim: nn.Module) -> float:
        """What ``slim`` takes, as a share of what the original takes at the same moment."""
        with self.runtime.threaded(), evaluating(slim):
            subject = Subject(slim, self._prepared(slim), self.runtime.clock(self.device), self.device)
            subject.run()
        return against(self._original(), [subject], self.runtime)[1][0]

    def _original(self) -> Subject:
        """The original, ready to run. A session is made for each measurement: where in memory it lies makes it faster or slower by some
        per cent for as long as it lives, which should not fall on all measurements alike."""
        with self.runtime.threaded(), evaluating(self.graph.model):
            run = self._module if self._files is None else self._session(self._files[1])
            run()
        return Subject(self.graph.model, run, self.runtime.clock(self.device), self.device)

    @cached_property
    def _module(self) -> Run:
        return self.runtime.prepared(self.graph.model, self.inputs)

    def _prepared(self, slim: nn.Module) -> Run:
        swapped = None if self._files is None else self._swapped(slim, self._files[0])
        return swapped or self.runtime.prepared(slim, self.inputs)

    @cached_property
    def _files(self) -> tuple[Any, bytes] | None:
        """The original as an ONNX model, exported once, and its file; None for runtimes that take modules."""
        if self.runtime.name not in ("onnx", "openvino"):
            return None
        onnx = importlib.import_module("onnx")
        keep = np.ones(int(self.graph.starts[-1]) if len(self.graph.starts) else 0, dtype=bool)
        whole = Slimmer(self.graph, keep).run().cpu().eval()
        file = onnx_bytes(whole, self.inputs)
        proto = onnx.load_from_string(file)
        return proto, file

    def _session(self, file: bytes) -> Run:
        run = onnx_run if self.runtime.name == "onnx" else openvino_run
        return run(file, [t.detach().cpu().numpy() for t in tensors(self.inputs)], self.runtime)

    def _swapped(self, slim: nn.Module, original: Any) -> Run | None:
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
            with self.runtime.refusing():
                run = self._session(proto.SerializeToString())
                found = run()
        except FxPruneError:  # then it is exported in earnest
            return None
        found = list(found.values()) if hasattr(found, "values") else list(found)
        with torch.no_grad():
            wanted = tensors(call(slim, to_device(self.inputs, self.device)))
        return run if len(found) == len(wanted) and all(_same(f, w) for f, w in zip(found, wanted, strict=True)) else None


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


def _same(found: Any, wanted: torch.Tensor) -> bool:
    theirs, ours = np.asarray(found), wanted.detach().cpu().numpy()
    if theirs.shape != ours.shape:
        return False
    largest = float(np.abs(ours).max(initial=0.0)) or 1.0
    return bool(np.abs(theirs.astype(np.float64) - ours).max(initial=0.0) <= AGREEMENT * largest)
