"""Seconds of single layers at their widths: measured once for a machine and a runtime, kept in a file, and read again.

A layer is its type, its numbers and the shape that goes in. It is timed alone, with random weights, at a few numbers of channels in and
out; what lies between is interpolated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.allocation.grain import GRAIN
from fxprune.atomic import replace_text
from fxprune.errors import FileError
from fxprune.imports import needed
from fxprune.passes.compat import ConvNd, ConvTransposeNd
from fxprune.timing.runtimes import Run, Runtime, onnx_run, openvino_run

WIDTHS = (1.0, 0.5, 0.125)  # shares of the channels at which a layer is timed
REPEATS, SPENT = 3, 0.004  # a layer runs at least so often and so many seconds; the fastest counts
LEAST = 0.1  # of a layer's time alone that is always its own
_FILE_VERSION = 2
_DISTRIBUTIONS = {"eager": "torch", "compile": "torch", "onnx": "onnxruntime", "openvino": "openvino"}


@dataclass(frozen=True)
class Layer:
    """A layer with all that its time depends on.

    ``kind``: "conv", "transposed" or "linear". ``shape``: of what goes in, the channels (the features of a linear) left out: (batch,
    *space), or (rows,) of a linear. ``inputs``, ``outputs``: channels. ``kernel``, ``stride``, ``padding``, ``dilation``: one number an
    axis of space. ``groups``: of a convolution; equal to ``inputs`` for one that is depthwise.
    """

    kind: str
    shape: tuple[int, ...]
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.inputs

    def narrowed(self, outputs: float, inputs: float) -> Layer:
        """The layer with these shares of its channels, in multiples that runtimes like."""
        if self.depthwise:
            width = _rounded(self.inputs * outputs, self.inputs)
            return replace(self, inputs=width, outputs=width * (self.outputs // self.inputs), groups=width)
        return replace(
            self,
            inputs=self.groups * _rounded(self.inputs * inputs / self.groups, self.inputs // self.groups),
            outputs=self.groups * _rounded(self.outputs * outputs / self.groups, self.outputs // self.groups),
        )

    @property
    def key(self) -> str:
        """Its name in a table."""
        numbers = ":".join(
            "x".join(map(str, part)) for part in (self.shape, self.kernel, self.stride, self.padding, self.dilation, (self.groups,))
        )
        return f"{self.kind}:{self.inputs}:{self.outputs}:{numbers}"

    def module(self) -> nn.Module:
        """A torch module that does the same."""
        if self.kind == "linear":
            return nn.Linear(self.inputs, self.outputs)
        kinds: dict[tuple[str, int], Any] = {
            ("conv", 1): nn.Conv1d,
            ("conv", 2): nn.Conv2d,
            ("conv", 3): nn.Conv3d,
            ("transposed", 1): nn.ConvTranspose1d,
            ("transposed", 2): nn.ConvTranspose2d,
            ("transposed", 3): nn.ConvTranspose3d,
        }
        kind: Any = kinds[self.kind, len(self.kernel)]
        made: nn.Module = kind(
            self.inputs, self.outputs, self.kernel, self.stride, self.padding, dilation=self.dilation, groups=self.groups
        )
        return made

    def example(self) -> torch.Tensor:
        """A random input."""
        if self.kind == "linear":
            return torch.randn(*self.shape, self.inputs)
        return torch.randn(self.shape[0], self.inputs, *self.shape[1:])


def _rounded(width: float, whole: int) -> int:
    """A width that runtimes like, at most ``whole``."""
    return min(whole, max(1, GRAIN * round(width / GRAIN))) if width >= GRAIN else max(1, round(width))


def layer_of(module: nn.Module, shape: tuple[int, ...]) -> Layer | None:
    """A module as a layer of the table, given the shape that goes in; None for what no table holds."""
    if type(module) is nn.Linear and len(shape) > 1:
        return Layer("linear", (math.prod(shape[:-1]),), module.in_features, module.out_features)
    if not isinstance(module, ConvNd):
        return None
    conv: Any = module
    space = len(conv.kernel_size)
    if len(shape) != space + 2 or conv.padding_mode != "zeros":
        return None
    padding = conv.padding
    if isinstance(padding, str):
        padding = tuple(d * (k - 1) // 2 if padding == "same" else 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    return Layer(
        "transposed" if isinstance(module, ConvTransposeNd) else "conv",
        (shape[0], *shape[2:]),
        conv.in_channels,
        conv.out_channels,
        tuple(conv.kernel_size),
        tuple(conv.stride),
        tuple(padding),
        tuple(conv.dilation),
        conv.groups,
    )


class LayerTable:
    """Seconds of layers in one runtime. What is not known is measured when it is asked for, and ``save`` puts it into the file.

    ``known``: seconds by key that count before the file's, as those that a search began with; what is looked up is put there.
    """

    def __init__(self, runtime: Runtime, device: torch.device, known: MutableMapping[str, float]) -> None:
        self.runtime, self.device, self.known = runtime, device, known
        self.path = cache_file(runtime, device)
        self.kept = _read(self.path)
        self.measured = 0

    def seconds(self, layer: Layer) -> float:
        """Seconds of one call."""
        key = f"layer {layer.key}"
        if key not in self.known:
            if layer.key not in self.kept:
                self.kept[layer.key] = self._measured(layer)
                self.measured += 1
            self.known[key] = self.kept[layer.key]
        return self.known[key]

    def grid(self, layer: Layer) -> tuple[list[float], list[float], list[list[float]]]:
        """Shares of the outputs and of the inputs, rising, and the seconds for each pair; a depthwise layer has but one share of inputs."""
        outs = sorted({layer.narrowed(w, 1.0).outputs / layer.outputs: w for w in WIDTHS}.items())
        if layer.depthwise:
            return [share for share, _ in outs], [1.0], [[self.seconds(layer.narrowed(w, w))] for _, w in outs]
        ins = sorted({layer.narrowed(1.0, w).inputs / layer.inputs: w for w in WIDTHS}.items())
        return [s for s, _ in outs], [s for s, _ in ins], [[self.seconds(layer.narrowed(o, i)) for _, i in ins] for _, o in outs]

    def save(self) -> None:
        """Add what was measured to the file; where it cannot be written, the next search measures again."""
        if not self.measured:
            return
        try:
            replace_text(self.path, json.dumps({"format": _FILE_VERSION, "seconds": {**_read(self.path), **self.kept}}, sort_keys=True))
        except FileError:
            return
        self.measured = 0

    def _measured(self, layer: Layer) -> float:
        found = self._fastest(_prepared(layer, self.runtime, self.device))
        return max(found - self._call, LEAST * found)

    @cached_property
    def _call(self) -> float:
        """Seconds that a runtime of its own takes to be called at all, which a layer inside a network does not."""
        if self.runtime.name not in ("onnx", "openvino"):
            return 0.0
        run = onnx_run if self.runtime.name == "onnx" else openvino_run
        return self._fastest(run(_empty_file(), [np.zeros((1, 1), dtype=np.float32)], self.runtime))

    def _fastest(self, run: Run) -> float:
        clock = self.runtime.clock(self.device)
        with torch.no_grad(), self.runtime.threaded():
            run()
            fastest, spent, times = math.inf, 0.0, 0
            while times < REPEATS or spent < SPENT:
                began = time.perf_counter()
                one = clock()
                run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                fastest = min(fastest, clock() - one)
                spent += time.perf_counter() - began
                times += 1
        return fastest


def _prepared(layer: Layer, runtime: Runtime, device: torch.device) -> Run:
    example = layer.example()
    if runtime.name in ("onnx", "openvino"):
        run = onnx_run if runtime.name == "onnx" else openvino_run
        return run(_onnx_file(layer), [example.numpy()], runtime)
    module, given = layer.module().to(device).eval(), example.to(device)  # compiled layers cost what eager ones do; their surroundings less
    return lambda: module(given)


def _empty_file() -> bytes:
    """A network of one operation on one number."""
    onnx = needed("onnx", "timing in ONNX Runtime or OpenVINO", "onnx")
    helper, tensor = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, tensor, [1, 1]) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "empty", ends[:1], ends[1:])
    file: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return file


def _onnx_file(layer: Layer) -> bytes:
    onnx = needed("onnx", "timing in ONNX Runtime or OpenVINO", "onnx")
    helper, tensor = onnx.helper, onnx.TensorProto.FLOAT
    random = np.random.default_rng(0)
    if layer.kind == "linear":
        weights, shape = [layer.inputs, layer.outputs], [*layer.shape, layer.inputs]
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    else:
        shape = [layer.shape[0], layer.inputs, *layer.shape[1:]]
        swapped = layer.kind == "transposed"
        first, second = (layer.inputs, layer.outputs) if swapped else (layer.outputs, layer.inputs)
        weights = [first, second // layer.groups, *layer.kernel]
        numbers = {
            "kernel_shape": layer.kernel,
            "strides": layer.stride,
            "pads": [*layer.padding, *layer.padding],
            "dilations": layer.dilation,
            "group": layer.groups,
        }
        nodes = [helper.make_node("ConvTranspose" if swapped else "Conv", ["x", "w", "b"], ["y"], **numbers)]
    made = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", tensor, shape)],
        [helper.make_tensor_value_info("y", tensor, None)],
        [
            onnx.numpy_helper.from_array(random.standard_normal(weights, dtype=np.float32), "w"),
            onnx.numpy_helper.from_array(np.zeros(layer.outputs, dtype=np.float32), "b"),
        ],
    )
    file: bytes = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return file


# -- the file -------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where tables are kept: ``FXPRUNE_CACHE``, else ``fxprune`` in the user's folder for such files."""
    own = os.environ.get("FXPRUNE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune"


def cache_file(runtime: Runtime, device: torch.device) -> Path:
    """The table of a machine, a runtime in its version, and a number of threads."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    version = metadata.version(_DISTRIBUTIONS[runtime.name])
    mark = hashlib.sha256(f"{platform.machine()} {named} {sys.platform} {version}".encode()).hexdigest()[:12]
    return cache_folder() / f"layers-{runtime.name}-{runtime.threads}-{mark}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return " ".join(told) or platform.processor()


def _read(path: Path) -> dict[str, float]:
    """What a file holds; nothing where there is none, or none that can be read: then layers are measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError):
        return {}
    seconds = found.get("seconds") if isinstance(found, Mapping) and found.get("format") == _FILE_VERSION else None
    if not isinstance(seconds, Mapping):
        return {}
    return {str(k): float(v) for k, v in seconds.items() if isinstance(v, (int, float)) and 0 < v < math.inf}
