"""The zeroing oracle of the coverage table, written apart from fxprune's: it judges both tools, on kept indices and outputs alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

TOLERANCE = 1e-4  # relative to the largest magnitude of an output, in float32
Kept = Mapping[str, Mapping[int, torch.Tensor]]  # tensor name -> dimension -> kept indices of the original
NORMS = (nn.LayerNorm, nn.GroupNorm, *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []))


def is_norm(module: nn.Module) -> bool:
    """Whether it divides by a statistic over channels: zeroed channels change the statistic, removed ones do not count in it."""
    return isinstance(module, NORMS) or type(module).__name__.startswith(("LayerNorm", "RmsNorm", "GlobalResponseNorm", "GroupNorm"))


def called(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a copy of its inputs, positional or by keyword, with the same random numbers at every call."""
    given = copy.deepcopy(inputs)
    torch.manual_seed(0)
    return model(**given) if isinstance(given, dict) else model(*given)


def prime(model: nn.Module, inputs: Any) -> nn.Module:
    """Make constant vectors (norm weights, layer scales, biases) vary and give BatchNorm live statistics, so that wrong indices show."""
    generator = torch.Generator().manual_seed(7)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None]
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.flatten()
            if parameter.numel() > 1 and parameter.is_floating_point() and bool((flat == flat[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        momenta = [m.momentum for m in norms]
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        with contextlib.suppress(ValueError):  # one value per channel has no variance: those keep the statistics they have
            called(model, inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean += torch.randn(norm.running_mean.shape, generator=generator) * 0.1 * norm.running_var.sqrt()
            norm.running_var *= torch.rand(norm.running_var.shape, generator=generator) + 0.5
    return model.eval()


def zeroed(model: nn.Module, kept: Kept, twin: nn.Module | None = None) -> nn.Module:
    """A copy of ``model`` (or ``twin``, which is one) with every slice not kept set to zero; running variances and index buffers stay."""
    twin = copy.deepcopy(model) if twin is None else twin
    tensors = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in kept.items():
            if name.endswith("running_var") or not tensors[name].is_floating_point():
                continue
            for dim, indices in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return twin


def outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Every tensor that ``model`` returns, in a fixed order."""
    with torch.no_grad():
        return leaves(called(model, inputs))


def leaves(nested: Any) -> list[torch.Tensor]:
    if hasattr(nested, "__dict__") and not isinstance(nested, (torch.Tensor, Mapping)):
        return [t for key in sorted(vars(nested)) for t in leaves(vars(nested)[key])]
    return [t for t in tree_flatten(nested)[0] if isinstance(t, torch.Tensor)]


def difference(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest relative difference; infinite where shapes differ or a value is not finite."""
    if [t.shape for t in reference] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.numel():
            gap = ((a.double() - b.double()).abs().max() / (a.double().abs().max() + 1e-6)).item()
            worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def judged(
    model: nn.Module,
    inputs: Any,
    slim: nn.Module,
    kept: Kept,
    defined: Callable[[], tuple[int, nn.Module, Kept] | None],
    total: int,
    copied: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """The oracle's word on ``slim``.

    ``defined``: prunes again without the groups that meet a statistic over channels, and says how many it pruned, of ``total``; None where
    nothing is left or nothing has to be left out. ``copied``: makes a copy of the model, where a deep copy would not do.
    """

    def masked(kept: Kept) -> nn.Module:
        return zeroed(model, kept, copied() if copied else None)

    before, after, reference = outputs(model, inputs), outputs(slim, inputs), outputs(masked(kept), inputs)
    if [t.shape for t in reference] != [t.shape for t in after]:  # a detector may find another number of boxes than the original
        shapes = [[tuple(t.shape) for t in side][:3] for side in (reference, after)]
        return {"verdict": "fails", "why": f"output shapes {shapes[0]} became {shapes[1]}"}
    if not all(bool(torch.isfinite(t).all()) for t in after if t.is_floating_point()):
        return {"verdict": "fails", "why": "an output is not finite"}
    error = difference(reference, after)
    found = {"error": error, "moved": difference(before, reference)}
    if error < TOLERANCE:
        return {"verdict": "exact", **found}
    rest = defined()
    if rest is None:
        return {"verdict": "wrong", "why": f"the output differs from the zeroed original's by {error:.1e}", **found}
    count, slim, kept = rest
    if not count:
        return {"verdict": "runs", "compared": f"0/{total}", **found}
    reference = outputs(masked(kept), inputs)
    error = difference(reference, outputs(slim, inputs))
    part = {"error": error, "moved": difference(before, reference), "compared": f"{count}/{total}"}
    if error < TOLERANCE:
        return {"verdict": "exact where defined", **part}
    return {"verdict": "wrong", "why": f"the output differs from the zeroed original's by {error:.1e}", **part}
