"""The tables of rules: what an operation does to channels, and how its arguments change when channels go.

A rule of ours is ``rule(ctx, node, **arguments) -> Value`` (or a tuple of Values): the arguments arrive by the names of the operation's
schema (``rules.binding``), with every tensor replaced by its ``Value``. A user's arrive as they were written. A rewrite is
``rewrite(slim, node) -> None``: it edits the arguments of the copied node in place.
No rule is a loud, named outcome: the walker pins what the operation touches and reports its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.errors import InputError
from fxprune.passes.compat import OpOverload, native_functions

Infer = Callable[..., Any]
Rewrite = Callable[..., None]


@dataclass(frozen=True)
class Rule:
    """``infer`` says what happens to labels; ``rewrite`` (if any) changes arguments when a touched axis lost channels, or, with ``always``,
    when anything did. ``bound``: arguments arrive by the names of the schema, else as they were written."""

    infer: Infer
    rewrite: Rewrite | None = None
    always: bool = False
    bound: bool = True


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
        rule = Rule(infer, rewrite, bound=False)
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
                for home in (torch, F, torch.special, torch.linalg, native_functions):
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
    if rule is None and isinstance(target, OpOverload):
        rule = FUNCTIONS.get(target.overloadpacket)
    return rule


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of a module kept whole: its type has one, or a base of which it overrides nothing that ``forward`` reads."""
    base, unchanged = _ruled_base(type(module))
    return MODULES[base] if base is not None and unchanged and base in MODULES else None


def _ruled_base(cls: type) -> tuple[type | None, bool]:
    """The first base with a rule, and whether ``cls`` computes what that base does."""
    base = next((one for one in cls.__mro__ if one in MODULES), None)
    return base, base is not None and (base is cls or not _overrides(cls, base))


@cache
def _overrides(cls: type, base: type) -> bool:
    """Whether a subclass says otherwise about anything that the base's ``forward`` uses: a method, a property in place of a parameter."""
    if cls.forward is not base.forward:  # type: ignore[attr-defined]
        return True
    own = {name for one in cls.__mro__[: cls.__mro__.index(base)] for name in vars(one)}
    return bool(own & (_used(base) | {"__getattr__", "__getattribute__", "__call__", "_call_impl"}))


@cache
def _used(cls: type) -> frozenset[str]:
    """The names that ``forward`` reads of anything, and those that the methods of the class read which it calls."""
    found: set[str] = set()
    todo = ["forward"]
    while todo:
        function = getattr(getattr(cls, todo.pop(), None), "__code__", None)
        for name in function.co_names if function is not None else ():
            if name not in found and name not in _CHECKS:
                found.add(name)
                todo.append(name)
    return frozenset(found)


# Methods that a forward calls and that compute nothing.
_CHECKS = frozenset({"_check_input_dim", "extra_repr"})


def is_known(module: nn.Module) -> bool:
    """Whether the tracer keeps ``module`` whole: it has a rule, and no hook, parametrization or method of its own changes what it does."""
    if module._forward_hooks or module._forward_pre_hooks or "parametrizations" in module._modules:
        return False
    if type(module).__call__ is not nn.Module.__call__:
        return False
    rule = module_rule(module)
    base, _ = _ruled_base(type(module))
    return rule is not None and base is not None and not (vars(module).keys() & {"forward", *_methods(base)})


@cache
def _methods(base: type) -> frozenset[str]:
    """The methods that ``forward`` calls: an instance that holds one of its own does something else."""
    return frozenset(name for name in _used(base) if callable(getattr(base, name, None)))
