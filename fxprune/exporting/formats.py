"""What a slim module can be exported to: one entry per format says what it needs, how a file is written, and how it is run again.

The libraries do the work: ``torch.export`` gives one program, and every format is made of it. Each is an extra of its own and is
imported when it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import InputError, kind_of
from fxprune.example_inputs import call_form
from fxprune.imports import by_path, needed
from fxprune.passes.compat import tree_leaves, tree_map, tree_unflatten

# ExecuTorch plans memory before it runs, so a size that may change needs an upper bound: so many times that of the example.
HEADROOM = 4


@dataclass(frozen=True)
class Job:
    """What a writer is given: ``model`` in evaluation mode on the CPU, inputs of the sizes to export at, which axes may change
    (axis -> name), and inputs with realistic values for the formats that measure activations."""

    model: nn.Module
    inputs: Any
    dynamic: Mapping[int, str]
    calibration: Sequence[Any] = ()

    def program(self, model: nn.Module | None = None, headroom: int | None = None) -> Any:
        """The ``torch.export.ExportedProgram`` of the model (or of ``model``, made of it)."""
        args, kwargs = call_form(self.inputs)
        shared = {axis: torch.export.Dim(name) for axis, name in self.dynamic.items() if axis == 0 and headroom is None}

        def axes(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            free = {axis: size for axis, size in enumerate(value.shape) if axis in self.dynamic}
            if headroom is not None:
                return {axis: torch.export.Dim.DYNAMIC(max=size * headroom) for axis, size in free.items()}
            # A name for the batch is a promise that no batch is refused; the range of other sizes follows from strides and windows.
            return {axis: shared.get(axis, torch.export.Dim.DYNAMIC) for axis in free}

        form: Any = tree_map(axes, kwargs or args)
        return torch.export.export(self.model if model is None else model, args, kwargs, dynamic_shapes=form)


def cannot_run(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    """Stands for ``Format.run`` where a file cannot be run here."""
    raise InputError(f"{path} cannot be run here")


@dataclass(frozen=True)
class Format:
    """A file format for slim modules: how a file is written, and how it is run again to be compared with eager PyTorch.

    Args:
        suffix: of its files, with the dot, ``.onnx``; ``fxprune.export`` knows the format by it.
        write: ``write(job, path)`` writes the file, and others beside it if need be; ``job`` is a ``fxprune.exporting.formats.Job``.
        run: ``run(path, inputs)`` gives the file's outputs for a list of input tensors, as a list of tensors in the order in which
            the module returns them; left out where a file cannot be run here, and then nothing is compared.
        extra: the extra of fxprune's that installs the packages; empty where they are installed by their own names.
        writes: the packages that writing needs. ``runs``: the packages that running needs.
        quantized: computes in fewer bits, so that a difference from eager PyTorch is reported but not an error.
        calibrated: cannot be written without ``calibration``.
    """

    suffix: str
    write: Callable[[Job, Path], None]
    run: Callable[[Path, list[Tensor]], list[Tensor]] = cannot_run
    extra: str = ""
    writes: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    quantized: bool = False
    calibrated: bool = False

    @property
    def can_run(self) -> bool:
        """Whether a file can be run here."""
        return self.run is not cannot_run and installed(self.runs)


def installed(packages: Sequence[str]) -> bool:
    """Whether all of ``packages`` are there, without importing them."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def tensors(nested: Any) -> list[Tensor]:
    """The tensors in a nest of inputs or outputs, in the order in which an exported program takes and gives them."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _write_torch(job: Job, path: Path) -> None:
    torch.export.save(job.program(), path)


def _run_torch(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    program: Any = torch.export.load(path)
    args, kwargs = tree_unflatten(inputs, program.call_spec.in_spec)
    return tensors(program.module()(*args, **kwargs))


def _write_onnx(job: Job, path: Path) -> None:
    made: Any = torch.onnx.export(job.program(), dynamo=True, verbose=False)
    _named_axes(made.model.graph, job.dynamic)
    # Above the 2 GB that one protobuf file may have, weights lie in a second file.
    made.save(str(path), external_data=sum(t.nbytes for t in job.model.state_dict().values()) > 2**31 - 2**26)


def _named_axes(graph: Any, dynamic: Mapping[int, str]) -> None:
    """Give the exporter's symbols (s77) the names that were asked for, in the inputs and wherever they come back in outputs."""
    ir = importlib.import_module("onnx_ir")
    names = {str(dim.value): dynamic[a] for i in graph.inputs for a, dim in enumerate(i.shape) if not isinstance(dim, int) and a in dynamic}
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape([ir.SymbolicDim(names[str(d.value)]) if str(getattr(d, "value", d)) in names else d for d in value.shape])


def _run_onnx(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, fed)]


def _write_onnx_int8(job: Job, path: Path) -> None:
    """Static where there are calibration inputs (activations are rounded too, by ranges seen on them), dynamic where there are none."""
    quantization = importlib.import_module("onnxruntime.quantization")
    prepared = importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    plain, ready = path.with_name("plain.onnx"), path.with_name("prepared.onnx")
    _write_onnx(job, plain)
    prepared(str(plain), str(ready), skip_symbolic_shape=True)
    if job.calibration:
        session = importlib.import_module("onnxruntime").InferenceSession(str(plain), providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        batches = iter([dict(zip(names, (t.numpy() for t in tensors(one)), strict=True)) for one in job.calibration])
        reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda self: next(batches, None)})()
        # 7-bit weights: with 8 bits, sums of two products silently overflow 16 bits on x86 processors without VNNI, in OpenVINO too.
        quantization.quantize_static(str(ready), str(path), reader, per_channel=True, reduce_range=True)
    else:
        quantization.quantize_dynamic(str(ready), str(path), weight_type=quantization.QuantType.QUInt8)
    for scratch in (*path.parent.glob("plain.onnx*"), *path.parent.glob("prepared.onnx*")):
        scratch.unlink()


def _write_openvino(job: Job, path: Path) -> None:
    openvino = importlib.import_module("openvino")
    shapes = [openvino.PartialShape([-1 if a in job.dynamic else n for a, n in enumerate(t.shape)]) for t in tensors(job.inputs)]
    openvino.save_model(openvino.convert_model(job.program(), input=shapes), str(path), compress_to_fp16=False)


def _write_openvino_int8(job: Job, path: Path) -> None:
    """What ONNX Runtime quantised is a graph of int8 weights and rounding steps, which OpenVINO reads as its own."""
    openvino = importlib.import_module("openvino")
    step = path.with_name("int8.onnx")
    _write_onnx_int8(job, step)
    openvino.save_model(openvino.convert_model(str(step)), str(path), compress_to_fp16=False)
    step.unlink()


def _run_openvino(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    openvino = importlib.import_module("openvino")
    # Without the hint a CPU that has bfloat16 computes in it.
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([tensor.numpy() for tensor in inputs])
    return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]


def _write_executorch(job: Job, path: Path) -> None:
    exir = importlib.import_module("executorch.exir")
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    program = job.program(headroom=HEADROOM)
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def _run_executorch(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    return tensors(runtime.load_program(str(path)).load_method("forward").execute(inputs))


def _write_torch_int8(job: Job, path: Path) -> None:
    steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    module = job.program().module()
    for node in module.graph.nodes:
        # The quantizer takes all calls of a module, as of a ReLU that a block calls twice, for one; the keys tell calls apart.
        calls = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {key: (key, kind) for key, (_, kind) in calls.items()}
    watched = steps.prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for inputs in job.calibration:
            args, kwargs = call_form(inputs)
            watched(*args, **kwargs)
    torch.export.save(job.program(steps.convert_pt2e(watched)), path)


def _run_torch_int8(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")  # it registers the operators that the file names
    return _run_torch(path, inputs)


_ORT = ("onnx", "onnxscript", "onnxruntime")
FORMATS: dict[str, Format] = {
    "torch": Format(".pt2", _write_torch, _run_torch, "torch"),
    "onnx": Format(".onnx", _write_onnx, _run_onnx, "onnx", ("onnx", "onnxscript"), ("onnxruntime",)),
    "openvino": Format(".xml", _write_openvino, _run_openvino, "openvino", ("openvino",), ("openvino",)),
    "executorch": Format(".pte", _write_executorch, _run_executorch, "executorch", ("executorch",), ("executorch",)),
    "torch-int8": Format(".int8.pt2", _write_torch_int8, _run_torch_int8, "torchao", ("torchao",), ("torchao",), True, True),
    "onnx-int8": Format(".int8.onnx", _write_onnx_int8, _run_onnx, "onnx", _ORT, ("onnxruntime",), True),
    "openvino-int8": Format(".int8.xml", _write_openvino_int8, _run_openvino, "openvino", (*_ORT, "openvino"), ("openvino",), True, True),
}


def register_format(name: str, format: Format) -> None:
    """Make a format known by its name and suffix, to ``fxprune.export`` and to ``--export``.

    Args:
        name: a word that no other format has.
        format: the format; its suffix is not another's.

    Raises:
        InputError: the name or the suffix is taken, or the suffix does not begin with a dot.
    """
    others = {key: one for key, one in FORMATS.items() if one is not format}
    if not name or ":" in name or name in others:
        why = "is taken" if name in others else "must be a word without a colon"
        raise InputError(f"cannot register the format {name!r}: the name {why}")
    taken = [key for key, one in others.items() if one.suffix == format.suffix]
    if taken or not format.suffix.startswith(".") or len(format.suffix) < 2:
        why = f"is that of {taken[0]!r}" if taken else "must begin with a dot"
        raise InputError(f"cannot register the format {name!r}: its suffix {format.suffix!r} {why}")
    FORMATS[name] = format


def format_named(name: str | None, path: Path | None = None) -> str:
    """The format of that name, or of the file's suffix; one at ``module:NAME`` is known from then on. Raises ``InputError`` naming those
    there are."""
    if name is not None and not isinstance(name, str):
        raise InputError(f'format is {kind_of(name)}; it must be a name, as in format="onnx"; inputs are passed as example_inputs=')
    if name is not None and ":" in name and name not in FORMATS:
        found = by_path(name, "export format")
        if not isinstance(found, Format):
            raise InputError(f"export format {name!r} is {kind_of(found)}; it must be a fxprune.Format")
        FORMATS[name] = found
    known = ", ".join(f"{key} ({one.suffix})" for key, one in FORMATS.items())
    if name is not None:
        if name not in FORMATS:
            raise InputError(f"unknown export format {name!r}; there are {known}")
        return name
    ends = [key for key, one in FORMATS.items() if path is not None and path.name.endswith(one.suffix)]
    if not ends:
        raise InputError(f"the name of {path} says no export format; give format= or one of the suffixes of {known}")
    return max(ends, key=lambda key: len(FORMATS[key].suffix))


def require(name: str) -> None:
    """Import what writing a format needs. Raises ``DependencyError``, in one line with the command, for what is missing."""
    for package in FORMATS[name].writes:
        needed(package, f"export to {name}", FORMATS[name].extra)
