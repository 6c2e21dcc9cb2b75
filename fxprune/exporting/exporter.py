"""``export``: a slim module in a file of the runtime it is deployed on, compared with eager PyTorch before it takes its place."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune import example_inputs as forms
from fxprune.attached import record_of
from fxprune.errors import ExportError, FileError, FxPruneError, InputError, VerificationError, first_line, shown
from fxprune.evaluation.batches import inputs_of
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.running import call
from fxprune.evaluation.wrappers import own_module
from fxprune.exporting.formats import FORMATS, Format, Job, cannot_run, format_named, require, tensors
from fxprune.exporting.pretrained import own_model, quiet, write_pretrained
from fxprune.imports import needed
from fxprune.passes.compat import tree_leaves, tree_map_only

PRETRAINED = "transformers"
SAME = 1e-5  # the same operations on the same sizes
TOLERANCE = 1e-3  # of the output's largest magnitude: other kernels and orders of summation, in float32
# The least that counts as a largest magnitude. A sigmoid or softmax that is nearly zero everywhere is as far off as float32 is near one
# (1.2e-7), whatever it comes to: TOLERANCE of this is four of that.
SMALL = 5e-4


@dataclass(frozen=True)
class Exported:
    """An exported file.

    ``path``: where it lies. ``format``: the name of its format. ``difference``: the largest from eager PyTorch on random inputs, as a share
    of the output's largest magnitude, which counts as 5e-4 at least; None where the file was not run. ``bytes``: on disk, with what lies
    beside it.
    """

    path: Path
    format: str
    difference: float | None
    bytes: int


@in_plain_modes
def export(
    slim: nn.Module,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    example_inputs: Any = None,
    dynamic: Mapping[int, str] | None = None,
    calibration: Iterable[Any] | None = None,
    verify: bool | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write ``slim``, in evaluation mode, to ``path`` for another runtime, and run the file against eager PyTorch.

    Args:
        slim: what ``compress`` or ``load`` returned, or any module that ``torch.export`` takes, bare or in the wrappers of
            ``torch.compile``, DDP or FSDP. It is not changed.
        path: of the file. A file that fails leaves an older one as it was.
        format: "torch" (``torch.export``, .pt2), "onnx" (.onnx), "openvino" (.xml and .bin), "executorch" (.pte, by XNNPACK), and in 8-bit
            integers "torch-int8" (.int8.pt2), "onnx-int8" (.int8.onnx) and "openvino-int8" (.int8.xml); one of ``register_format``, or the
            path ``module:NAME`` of a ``Format``. Without it the suffix decides. "transformers": a folder that ``from_pretrained`` loads as
            the model's own class, of a model compressed with ``keep_class=True``.
        example_inputs: a tensor, a tuple or a dict; a slim module's record has their form already.
        dynamic: axis -> name for the sizes that may change, of every input that has the axis; {0: "batch"} unless given, {} for none.
        calibration: batches of inputs, or of (inputs, labels), whose activations set the ranges of the 8-bit formats; "onnx-int8" without
            it rounds activations as it runs.
        verify: compare the file's outputs with eager's on random inputs, at another batch (and twice the other sizes that may change).
            None: where the runtime is installed.
        tolerance: the largest difference accepted, as a share of the output's largest magnitude. None: 1e-3, and no bound for the 8-bit
            formats, whose difference is only reported.

    Returns:
        The path, the format, the difference and the size in bytes.

    Raises:
        DependencyError: a package is not installed; the message has the pip command.
        ExportError: the exporter or the runtime refuses.
        VerificationError: the file computes something else.
        InputError: ``slim`` is no module, a format, ``dynamic`` or inputs that do not fit, or missing calibration data.
        FileError: the path cannot be written.
    """
    target, slim = Path(path), own_module(slim, "slim")
    if isinstance(format, str) and format == PRETRAINED:
        return _pretrained(slim, target, example_inputs, verify, SAME if tolerance is None else tolerance)
    name = format_named(format, target)
    chosen = FORMATS[name]
    require(name)
    if verify:
        if chosen.run is cannot_run:
            raise InputError(f"the format {name} cannot run its files here, so there is nothing to verify; leave verify=True out")
        for package in chosen.runs:
            needed(package, f"verify=True for {name}", chosen.extra)
    verify = chosen.can_run if verify is None else verify
    known = record_of(slim)
    batches = [inputs_of(batch, None if known is None else known.policy.inputs) for batch in calibration or ()]
    if chosen.calibrated and not batches:
        raise InputError(f"{name} needs calibration data: pass calibration=[inputs, ...], a hundred images or so")
    example = _example(slim, example_inputs)
    axes = {0: "batch"} if dynamic is None else _checked_axes(dynamic, example)
    job = Job(_twin(slim), _sized(example, axes, 0), axes, batches)
    if not target.parent.is_dir():
        raise FileError(f"cannot export to {target}: there is no folder {target.parent}")
    try:
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-")
    except OSError as error:
        raise FileError(f"cannot export to {target}: {error.strerror}; choose a folder that can be written") from error
    with scratch as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what exporters say about their own insides
        made = Path(folder) / target.name
        difference = _made(job, made, name, chosen, verify, TOLERANCE if tolerance is None and not chosen.quantized else tolerance)
        written = sorted(Path(folder).iterdir(), key=lambda one: one == made)  # what lies beside it first, the file itself last
        size = sum(one.stat().st_size for one in written)
        for one in written:
            os.replace(one, target.parent / one.name)
    return Exported(target, name, difference, size)


def _pretrained(slim: nn.Module, target: Path, example_inputs: Any, verify: bool | None, tolerance: float) -> Exported:
    """A folder of transformers, put in place once what was loaded from it computes what ``slim`` does."""
    model = own_model(slim)
    if any(t.is_meta for t in model.parameters()):
        raise InputError(f"this {type(slim).__name__} lies on the meta device and has no values to export; load its weights first")
    if not target.parent.is_dir():
        raise FileError(f"cannot export to {target}: there is no folder {target.parent}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileError(f"cannot export to {target}: it is there already; choose an empty folder or a new name")
    try:
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-")
    except OSError as error:
        raise FileError(f"cannot export to {target}: {error.strerror}; choose a folder that can be written") from error
    with scratch as folder:
        made = Path(folder) / "model"
        given, twin = _sized(_example(slim, example_inputs), {}, 1), _twin(slim)
        with torch.no_grad():
            wanted = tensors(call(twin, given))

        def agrees(other: nn.Module) -> float:
            with torch.no_grad():
                found = tensors(call(other, given))
            return max((_relative(a.float(), b.float()) for a, b in zip(found, wanted, strict=True)), default=0.0)

        difference: float | None = write_pretrained(twin, made, agrees, tolerance)
        if verify is not False:
            with quiet():
                difference = agrees(type(model).from_pretrained(made).eval())
            if not difference <= tolerance:
                raise VerificationError(
                    f"what from_pretrained gives differs from the slim model by {difference:.1e} of the largest magnitude, "
                    f"{tolerance:.0e} is allowed; nothing was written"
                )
        if target.exists():
            target.rmdir()
        os.replace(made, target)
    return Exported(target, PRETRAINED, difference, sum(one.stat().st_size for one in target.iterdir()))


def _made(job: Job, path: Path, name: str, chosen: Format, verify: bool, tolerance: float | None) -> float | None:
    try:
        with torch.no_grad():
            chosen.write(job, path)
            difference = _difference(job, path, chosen) if verify else None
    except FxPruneError:
        raise
    except Exception as error:  # exporters and runtimes raise what they like
        raise ExportError(f"cannot export to {name}: {first_line(error)}") from error
    if difference is not None and tolerance is not None and not difference <= tolerance:
        raise VerificationError(
            f"the {name} file gives other outputs than eager PyTorch: they differ by {difference:.1e} of the largest magnitude, "
            f"{tolerance:.0e} is allowed; nothing was written"
        )
    return difference


def _difference(job: Job, path: Path, chosen: Format) -> float:
    """The largest difference over all outputs at other sizes, each output's in terms of its own largest magnitude."""
    given = _sized(job.inputs, job.dynamic, 1)
    wanted = tensors(call(job.model, given))
    found = chosen.run(path, tensors(given))
    if [t.shape for t in wanted] != [t.shape for t in found]:
        shapes = [", ".join("x".join(map(str, t.shape)) for t in side) for side in (found, wanted)]
        raise VerificationError(f"the file gives outputs of shape {shapes[0]}, eager PyTorch {shapes[1]}; nothing was written")
    return max((_relative(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _relative(found: Tensor, wanted: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    largest = max(float(wanted.double().abs().max()), SMALL)
    return float((found.double() - wanted.double()).abs().max()) / largest


def _twin(slim: nn.Module) -> nn.Module:
    if any(t.is_meta for t in (*slim.parameters(), *slim.buffers())):
        raise InputError(f"this {type(slim).__name__} lies on the meta device and has no values to export; load its weights first")
    return copy.deepcopy(slim).cpu().eval().requires_grad_(False)


def _example(slim: nn.Module, given: Any) -> Any:
    if given is not None:
        return tree_map_only(Tensor, lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t.detach().cpu(), given)
    record = record_of(slim)
    if record is not None and record.policy.inputs is not None:
        return forms.build(record.policy.inputs)
    raise InputError("example_inputs are missing: this module carries no record of its inputs' form; pass a tensor, a tuple or a dict")


def _checked_axes(dynamic: Any, example: Any) -> dict[int, str]:
    """``dynamic`` as a dictionary. An axis that no input has would be ignored in silence."""
    if not isinstance(dynamic, Mapping) or not all(type(axis) is int and isinstance(name, str) for axis, name in dynamic.items()):
        raise InputError(f"dynamic is {shown(dynamic)}; it must be a mapping from axes to names, as in {{0: 'batch'}}")
    axes = max((t.ndim for t in tree_leaves(example) if isinstance(t, Tensor)), default=0)
    absent = next((axis for axis in dynamic if not 0 <= axis < axes), None)
    if absent is not None:
        raise InputError(f"dynamic names axis {absent}, which no input has; the inputs have axes 0 to {axes - 1}")
    return dict(dynamic)


def _sized(example: Any, dynamic: Mapping[int, str], step: int) -> Any:
    """Inputs like ``example``, random where they are floats. Step 0: to export with, no size that may change below 2, since
    exporters take a 1 for good; step 1: one more in the batch, and twice the other sizes that may change."""
    generator = torch.Generator().manual_seed(step)

    def one(tensor: Tensor) -> Tensor:
        for axis in sorted(dynamic):
            if axis < tensor.ndim:
                size = max(tensor.shape[axis], 2)
                size = size if not step else size + 1 if axis == 0 else 2 * size
                tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
        if not tensor.is_floating_point():
            return tensor  # indices and masks: the values that are known to be legal, repeated
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    return tree_map_only(Tensor, one, example)
