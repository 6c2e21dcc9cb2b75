"""Inputs for a network whose data cannot be had: noise, changed until the network's BatchNorm layers read what they read in training.

A BatchNorm layer keeps the mean and the variance of all that it was trained on. Inputs on which every such layer reads these statistics
drive the network as its data did, and serve to rank and repair it (Cai 2020, ZeroQ, https://arxiv.org/abs/2001.00281, sec. 3.1; Yin 2020,
DeepInversion, https://arxiv.org/abs/1912.08795, sec. 3.2). Each batch is fitted by itself, so that its statistics alone are right.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune import example_inputs as forms
from fxprune.errors import EvaluationError, InputError, in_a_line
from fxprune.evaluation.callers_modes import in_plain_modes
from fxprune.evaluation.copying import copied
from fxprune.evaluation.running import call, device_of, set_training
from fxprune.evaluation.wrappers import unwrapped
from fxprune.passes.compat import BatchNormBase, tree_leaves, tree_map_only

NONE = "none"
RATE = 0.1  # of Adam, falling to zero along a cosine
DRAWN = 0.02  # what the labels of drawn classes count beside the statistics


@in_plain_modes
def synthetic_batches(
    model: nn.Module, example_inputs: Any, count: int = 128, *, batch_size: int = 64, steps: int = 40, seed: int = 0
) -> list[Any]:
    """Make calibration inputs for ``model`` without data.

    Args:
        model: The trained network. It is not touched.
        example_inputs: As for ``analyze``: a tensor, a tuple or a dict, its tensors' first axis the batch.
        count: How many samples in all.
        batch_size: Samples of a batch. Statistics of fewer than some dozens are rough.
        steps: Steps of Adam for each batch. 0 gives the noise that it starts from.
        seed: Of the noise. The same seed gives the same inputs, to the rounding of the machine's arithmetic.

    Returns:
        Batches in the form of ``example_inputs``; several positional inputs as a dict by their names, since a pair would be taken for
        inputs and labels. Floating tensors are fitted; without a BatchNorm layer that keeps statistics they are
        standard normal noise. Of integers, those that an embedding reads are drawn evenly from its rows, others from the example's values.

    Raises:
        InputError: A number below 1, inputs without a batch axis, or several that ``forward`` gives no names.
        EvaluationError: The network cannot be run, or not be differentiated, on such inputs.
    """
    if count < 1 or batch_size < 1 or steps < 0:
        raise InputError(f"count={count}, batch_size={batch_size} and steps={steps} must be 1 or more, or 0 for the steps")
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if not tensors or any(tensor.ndim == 0 for tensor in tensors):
        raise InputError("synthetic_batches needs example inputs whose tensors all have a batch as their first axis")
    given = unwrapped(model)
    example_inputs = _by_name(given, example_inputs)
    twin = copied(given).requires_grad_(False)
    set_training(twin, False)
    device = device_of(twin)
    random = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    with _Rows(twin) as rows:
        _run(twin, tree_map_only(Tensor, lambda t: t.to(device), example_inputs))
        limits = [rows.of(tensor) for tensor in tensors]
    made = []
    for size in sizes:
        drawn = [_drawn(tensor, size, limit, random).to(device) for tensor, limit in zip(tensors, limits, strict=True)]
        made.append(_fitted(twin, _in_place_of(example_inputs, drawn), steps, random))
    return made


def _by_name(model: nn.Module, example: Any) -> Any:
    """Several positional inputs as a dict by the names that ``forward`` gives them."""
    if not isinstance(example, (tuple, list)) or len(example) < 2:
        return example
    parameters = inspect.signature(model.forward).parameters.values()
    names = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(names) < len(example):
        raise InputError(f"forward of {type(model).__name__} has no names for {len(example)} inputs; pass the example inputs as a dict")
    return dict(zip(names, example, strict=False))


def _in_place_of(example: Any, tensors: list[Tensor]) -> Any:
    """``example`` with these tensors for its own, in their order."""
    left = iter(tensors)
    return tree_map_only(Tensor, lambda _: next(left), example)


def listed_batches(calibration: Iterable[Any] | None) -> list[Any] | None:
    """The batches as a list. Raises ``InputError`` where one batch, or no iterable, was given instead."""
    if isinstance(calibration, (Tensor, Mapping)) or not (calibration is None or isinstance(calibration, Iterable)):
        kind = type(calibration).__name__
        raise InputError(f"calibration is a {kind}; pass batches: a list or a loader of what the model takes, calibration=[inputs, ...]")
    return None if calibration is None else list(calibration)


def as_the_example(batches: list[Any] | None, example: Any) -> list[Any] | None:
    """``batches`` as the example has it: a network that takes one dictionary is given ``(dictionary,)``, which a batch need not say."""
    if not (isinstance(example, (tuple, list)) and len(example) == 1 and isinstance(example[0], Mapping)):
        return batches

    def one(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return (batch,)
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Mapping)
        return ((batch[0],), batch[1]) if pair else batch

    return None if batches is None else [one(batch) for batch in batches]


def calibration_batches(
    calibration: Iterable[Any] | str | None, model: nn.Module, example_inputs: Any, *, seed: int = 0
) -> list[Any] | None:
    """What the argument ``calibration`` of ``compress``, ``search`` and ``shrink`` stands for: batches, or those made for "none".

    Raises ``InputError`` for any other string.
    """
    if not isinstance(calibration, str):
        return as_the_example(listed_batches(calibration), example_inputs)
    if calibration != NONE:
        raise InputError(f'calibration is {calibration!r}; pass batches, or "{NONE}" for inputs that are made without data')
    whole = all(not (isinstance(leaf, Tensor) and leaf.is_meta) for leaf in tree_leaves(example_inputs))
    return synthetic_batches(model, example_inputs if whole else forms.build(forms.describe(example_inputs)), seed=seed)


def without_labels(importance: Any, calibration: Any, repair: Any) -> Any:
    """``importance``; where it is "auto" and ``calibration`` is "none", so that inputs have no labels, one that needs none."""
    if importance != "auto" or not isinstance(calibration, str) or calibration != NONE:
        return importance
    return "reconstruction" if repair in ("lstsq", "joint") else "l2"


def _drawn(example: Tensor, size: int, limit: int | None, random: torch.Generator) -> Tensor:
    shape = (size, *example.shape[1:])
    if example.is_floating_point() or example.is_complex():
        noise = torch.randn(shape, generator=random)
        return (_natural(noise) if noise.ndim == 4 else noise).to(example.dtype)
    if limit is not None:
        return torch.randint(0, limit, shape, generator=random).to(example.dtype)
    held = example.flatten().cpu()
    return held[torch.randint(0, len(held), shape, generator=random)]


def _natural(noise: Tensor) -> Tensor:
    """White noise as noise with the spectrum of natural pictures, amplitudes that fall with the frequency (Field 1987, JOSA A 4:2379)."""
    height, width = noise.shape[2:]
    falling = (torch.fft.fftfreq(height).unsqueeze(1).square() + torch.fft.rfftfreq(width).square()).sqrt()
    falling = 1 / falling.clamp_min(1 / max(height, width))
    made = torch.fft.irfft2(torch.fft.rfft2(noise) * falling, s=(height, width))
    found: Tensor = made / made.std().clamp_min(1e-6)
    return found


class _Rows:
    """Notes which embeddings read the network's inputs as they are, and how many rows these have."""

    def __init__(self, model: nn.Module) -> None:
        self._read: list[tuple[Tensor, int]] = []
        self._handles = [m.register_forward_pre_hook(self._note) for m in model.modules() if isinstance(m, nn.Embedding)]

    def _note(self, module: nn.Embedding, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._read.append((args[0].detach(), module.num_embeddings))

    def of(self, tensor: Tensor) -> int | None:
        same = (rows for read, rows in self._read if read.shape == tensor.shape and torch.equal(read.cpu(), tensor.cpu()))
        return min(same, default=None)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _run(model: nn.Module, batch: Any) -> Any:
    try:
        return call(model, batch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        said = f"the network does not run on inputs made for calibration: {in_a_line(error)}; pass calibration data"
        raise EvaluationError(said) from error


class _Statistics:
    """How far what BatchNorm layers read is from what they keep."""

    def __init__(self, model: nn.Module) -> None:
        self.gaps: list[Tensor] = []
        norms = [m for m in model.modules() if isinstance(m, BatchNormBase) and m.running_mean is not None]
        self._handles = [norm.register_forward_pre_hook(self._note) for norm in norms]

    def _note(self, norm: BatchNormBase, args: tuple[Any, ...]) -> None:
        x = args[0]
        mean, var = norm.running_mean, norm.running_var
        if not isinstance(x, Tensor) or x.numel() <= x.shape[1] or mean is None or var is None:
            return
        axes = [axis for axis in range(x.ndim) if axis != 1]
        scale = var + norm.eps
        found = x.mean(axes), (x.var(axes, correction=0) + norm.eps).sqrt()
        self.gaps.append(((found[0] - mean).square() / scale + (found[1] - scale.sqrt()).square() / scale).mean())

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _fitted(model: nn.Module, batch: Any, steps: int, random: torch.Generator) -> Any:
    leaves = [leaf.requires_grad_() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    statistics = _Statistics(model)
    try:
        with torch.no_grad():
            classes = _classes(_run(model, batch), random)
        if leaves and statistics.gaps and steps:
            optimizer = torch.optim.Adam(leaves, RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                statistics.gaps.clear()
                optimizer.zero_grad()
                with torch.enable_grad():
                    output = _run(model, batch)
                    loss = torch.stack(statistics.gaps).sum()
                    if classes is not None:
                        loss = loss + DRAWN * F.cross_entropy(output, classes)
                if not loss.requires_grad or not torch.isfinite(loss):
                    raise EvaluationError(
                        "no inputs could be fitted to the network's BatchNorm statistics: no gradient reaches the inputs, or it is not"
                        " finite; pass calibration data, or synthetic_batches(..., steps=0) for plain noise"
                    )
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        statistics.remove()
    return tree_map_only(Tensor, lambda t: t.detach(), batch)


def _classes(output: Any, random: torch.Generator) -> Tensor | None:
    """A class for each sample, where the output looks like the logits of several: (samples, classes) with values below zero."""
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 3 or not output.is_floating_point():
        return None
    if float(output.min()) >= 0:
        return None
    return torch.randint(0, output.shape[1], output.shape[:1], generator=random).to(output.device)
