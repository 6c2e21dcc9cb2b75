"""The registry of repairs: what is done to a slim network on calibration data, by name, those of users beside the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxprune.errors import FAULTS, InputError, in_a_line, kind_of, shown
from fxprune.imports import by_path
from fxprune.passes.rewriting.slimmer import Slimmer

UserRepair = Callable[[nn.Module, Sequence[Any]], Any]
Repair = str | UserRepair
Method = Callable[[Any, nn.Module, Slimmer], "tuple[str, ...]"]
"""``method(repairer, slim, slimmer)`` repairs ``slim`` in place and returns notes."""
REPAIRS: dict[str, Method] = {}
FITTING = ("lstsq", "joint")  # those that refit the weights that are left


def of_candidates(repair: Any) -> Any:
    """The repair for candidates; "joint" is kept for the final result."""
    return "lstsq" if isinstance(repair, str) and repair == "joint" else repair


def register_repair(name: str, repair: UserRepair) -> None:
    """Make a repair of your own known by its name, to ``repair=`` and to ``--repair``.

    Args:
        name: a word that no other repair has.
        repair: ``repair(slim, batches)`` changes the weights and buffers of ``slim``, a module in evaluation mode, in place; ``batches``
            is the calibration data as a list. It may return a note, or several, for the record. It is called without gradients.

    Raises:
        InputError: another repair has the name, or it is not a name or not a function.
    """
    if not name or ":" in name or not callable(repair):
        raise InputError(f"cannot register the repair {name!r}: give a word without a colon, and a function of (slim, batches)")
    if name in REPAIRS:
        raise InputError(f"cannot register the repair {name!r}: the name is taken")
    REPAIRS[name] = _method(name, repair)


def named(repair: Any) -> tuple[str, Method]:
    """The name and the method of a repair: a registered name, ``module:function``, or a function. Raises ``InputError`` listing them."""
    if callable(repair):
        name = f"callable:{getattr(repair, '__qualname__', type(repair).__qualname__)}"
        return name, _method(name, repair)
    if isinstance(repair, str) and ":" in repair:
        found = by_path(repair, "repair")
        if not callable(found):
            raise InputError(f"repair {repair!r} is {kind_of(found)}; it must be a function of (slim, batches)")
        return repair, _method(repair, found)
    if repair not in REPAIRS:
        raise InputError(f"repair is {shown(repair)}; choose one of {', '.join(REPAIRS)}, or pass a function of (slim, batches)")
    return str(repair), REPAIRS[repair]


def _method(name: str, repair: UserRepair) -> Method:
    def method(repairer: Any, slim: nn.Module, slimmer: Slimmer) -> tuple[str, ...]:
        before = _form(slim)
        try:
            said = repair(slim, repairer.batches)
        except FAULTS as error:
            raise InputError(f"repair {name!r} raised {in_a_line(error)}") from error
        after = _form(slim)
        changed = sorted({key for key in {*before, *after} if before.get(key) != after.get(key)})
        if changed:
            raise InputError(f"repair {name!r} changed the form of {changed[0]!r}; a repair changes values, not names, shapes or dtypes")
        if wrong := not_finite(slim):
            raise InputError(f"repair {name!r} left {wrong[0]!r} with values that are not finite")
        return () if said is None else (said,) if isinstance(said, str) else tuple(map(str, said))

    return method


def not_finite(slim: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold values that are not finite."""
    return [name for name, t in slim.state_dict().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def _form(slim: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in slim.state_dict().items()}
