"""The tables of rules: what an operation does to channels, and how its arguments change when channels go.

A rule is ``rule(ctx, node, *args, **kwargs) -> Value`` (or a tuple of Values): the node's arguments arrive with every tensor
replaced by its ``Value``. A rewrite is ``rewrite(slim, node) -> None``: it edits the arguments of the copied node in place.
No rule is a loud, named outcome: the walker pins what the operation touches and reports its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.errors import InputError

Infer = Callable[..., Any]
Rewrite = Callable[..., None]


@dataclass(frozen=True)
class Rule:
    """``infer`` says what happens to labels; ``rewrite`` (if any) mends arguments when a touched axis lost channels, or, with ``always``,
    when anything did."""

    infer: Infer
    rewrite: Rewrite | None = None
    always: bool = False


FUNCTIONS: dict[Any, Rule] = {}
METHODS: dict[str, Rule] = {}
MODULES: dict[type, Rule] = {}


def register_op(target: Any, *, rewrite: Rewrite | None = None) -> Callable[[Infer], Infer]:
    """Decorator that adds a rule for ``target``.

    The decorated function is called as ``rule(ctx, node, *args, **kwargs)`` with a ``Value`` for every tensor and returns the Value of the
    result, usually by a method of the context (``passes.labels.context``): ``ctx.pointwise(node, x, y)`` for element-wise operations,
    ``ctx.through(node, x, mixed=(2, 3))`` for one that mixes the named axes and leaves the others.

    Args:
        target: a function, the name of a tensor method, or a module type. A module type that has a rule is kept whole by the tracer.
        rewrite: ``rewrite(slim, node)`` sets the arguments of the call that depend on channel counts; it is called when channels went from
            a tensor that the node reads or makes.

    Returns:
        The decorator, which returns the rule as it is.

    Raises:
        InputError: ``target`` is none of these.
    """

    def add(infer: Infer) -> Infer:
        rule = Rule(infer, rewrite)
        if isinstance(target, type) and issubclass(target, nn.Module):
            MODULES[target] = rule
        elif isinstance(target, str):
            METHODS[target] = rule
        elif callable(target):
            FUNCTIONS[target] = rule
        else:
            raise InputError(f"register_op takes a function, a method name or a module type, not {target!r}")
        return infer

    return add


def named(*names: str, rewrite: Rewrite | None = None, inplace: bool = True, always: bool = False) -> Callable[[Infer], Infer]:
    """Register one rule for a name in ``torch``, its functional, special and linalg modules, and as a method; in-place forms too."""

    def add(infer: Infer) -> Infer:
        rule = Rule(infer, rewrite, always)
        for name in names:
            for form in (name, f"{name}_") if inplace else (name,):
                for home in (torch, F, torch.special, torch.linalg, torch._C._nn):
                    found = getattr(home, form, None)
                    if callable(found):
                        FUNCTIONS[found] = rule
                if hasattr(torch.Tensor, form):
                    METHODS[form] = rule
        return infer

    return add


def functions(*targets: Any, rewrite: Rewrite | None = None) -> Callable[[Infer], Infer]:
    """Register one rule for several functions."""

    def add(infer: Infer) -> Infer:
        FUNCTIONS.update(dict.fromkeys(targets, Rule(infer, rewrite)))
        return infer

    return add


def modules(*types: type, rewrite: Rewrite | None = None) -> Callable[[Infer], Infer]:
    """Register one rule for several module types; the rule's first arguments are ``(ctx, node, module, ...)``."""

    def add(infer: Infer) -> Infer:
        MODULES.update(dict.fromkeys(types, Rule(infer, rewrite)))
        return infer

    return add


def function_rule(target: Any) -> Rule | None:
    """The rule of a function or operator; that of an operator holds for its overloads."""
    rule = FUNCTIONS.get(target)
    if rule is None and isinstance(target, torch._ops.OpOverload):
        rule = FUNCTIONS.get(target.overloadpacket)
    return rule


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of a module kept whole: its exact type has one, or a base whose ``forward`` it inherits."""
    for cls in type(module).__mro__:
        rule = MODULES.get(cls)
        if rule is not None:
            return rule if type(module).forward is cls.forward else None  # type: ignore[attr-defined]
    return None


def is_known(module: nn.Module) -> bool:
    """Whether the tracer keeps ``module`` whole: it has a rule, and no hook or parametrization computes its weights."""
    if module._forward_hooks or module._forward_pre_hooks or "parametrizations" in module._modules or "forward" in module.__dict__:
        return False
    if type(module).__call__ is not nn.Module.__call__:
        return False
    return module_rule(module) is not None
