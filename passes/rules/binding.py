"""Arguments by name: every call is bound by its schema once, before a rule or a rewrite sees it.

``x.view(2, 3)`` and ``x.view((2, 3))``, ``x.cumsum(1)``, ``x.cumsum(axis=1)`` and ``torch.cumsum(input=x, dim=1)`` come to the same names.
Functions and methods of torch are bound by the schemas of their operators, Python functions and modules by their signatures. The tensor
that a method is called on is ``input``, as it is for the function of that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.compat import OpOverload, OpOverloadPacket, dispatched

# Where an argument stands: at a position, under a keyword, or at all positions from one on.
Place = int | str | slice

# torch takes the names of NumPy as well (``numpy_compatibility_arg_names`` in its argument parser).
_NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}


@dataclass(frozen=True)
class Form:
    """Where the arguments of one form of call stand, in the order of the schema.

    ``places``: name -> place. Only arguments that are given have one: a default that is left out is the rule's to know.
    """

    places: Mapping[str, Place]

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name; those that were given one by one (``x.view(2, 3)``) are a tuple."""
        return {name: kwargs[at] if isinstance(at, str) else args[at] for name, at in self.places.items()}


def form_of(node: fx.Node, module: nn.Module | None = None) -> Form:
    """How the arguments of a call are named; ``module``: what a ``call_module`` node calls."""
    kinds = tuple(_kind(a) for a in node.args)
    named = tuple((key, _kind(value)) for key, value in node.kwargs.items())
    target: Any = type(module) if module is not None else node.target
    try:
        return _form(node.op, target, kinds, named)
    except TypeError:  # a target that cannot be hashed
        return _form.__wrapped__(node.op, target, kinds, named)


@cache
def _form(op: str, target: Any, kinds: tuple[str, ...], named: tuple[tuple[str, str], ...]) -> Form:
    keywords = dict(named)
    fitting = None
    for schema in _schemas(op, target):
        places = schema.places(kinds, keywords)
        if places is None:
            continue
        if schema.fits(places, kinds, keywords):
            return Form(places)
        fitting = fitting or Form(places)
    return fitting or Form({**{_unnamed(i): i for i in range(len(kinds))}, **{key: key for key in keywords}})


def _unnamed(position: int) -> str:
    return "input" if position == 0 else f"argument{position}"


@dataclass(frozen=True)
class _Parameter:
    name: str
    type: str
    positional: bool
    required: bool
    fixed: bool = False  # a list of known length: one number stands for it
    rest: bool = False  # takes all positions that are left


class _Schema:
    """One overload."""

    def __init__(self, parameters: list[_Parameter], strict: bool = True) -> None:
        self.parameters = {p.name: p for p in parameters}
        self.positional = [p for p in parameters if p.positional]
        self.required = [p.name for p in parameters if p.required]
        self.anything = not strict
        own = [p for p in self.positional if p.name != "input"]
        # torch takes numbers one by one for a list that is the only positional argument.
        self.one_by_one = own[0].name if strict and len(own) == 1 and own[0].type == "List[int]" else None

    def places(self, kinds: tuple[str, ...], keywords: Mapping[str, str]) -> dict[str, Place] | None:
        """Where each parameter stands, None where the numbers or names of arguments are not those of this overload."""
        found: dict[str, Place] = {}
        for position, parameter in enumerate(self.positional):
            if position >= len(kinds):
                break
            several = len(kinds) > position + 1 or (kinds[position] == "int" and not parameter.fixed)
            if parameter.rest or (parameter.name == self.one_by_one and several):
                found[parameter.name] = slice(position, None)
                break
            found[parameter.name] = position
        else:
            if len(kinds) > len(self.positional):
                return None
        for key in keywords:
            name = key if key in self.parameters else _NUMPY.get(key, key)
            if name == "self":
                name = "input"
            if name in found or (name not in self.parameters and not self.anything):
                return None
            found[name] = key
        if any(name not in found for name in self.required):
            return None
        order = {name: i for i, name in enumerate(self.parameters)}
        return dict(sorted(found.items(), key=lambda one: order.get(one[0], len(order))))

    def fits(self, places: Mapping[str, Place], kinds: tuple[str, ...], keywords: Mapping[str, str]) -> bool:
        for name, at in places.items():
            parameter = self.parameters.get(name)
            if parameter is None or isinstance(at, slice):
                continue
            kind = keywords[at] if isinstance(at, str) else kinds[at]
            if not _fits(parameter, kind):
                return False
        return True


def _kind(value: Any) -> str:
    """What tells one overload from another."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val", value.meta["old"].meta.get("val") if "old" in value.meta else None)
    if isinstance(value, torch.Tensor):
        return "Tensor"
    if isinstance(value, (list, tuple)):
        return f"List[{_kind(value[0])}]" if value else "List[]"
    return type(value).__name__


def _fits(parameter: _Parameter, kind: str) -> bool:
    wanted = parameter.type
    if not wanted:
        return True
    if wanted.startswith("Optional["):
        if kind == "NoneType":
            return True
        wanted = wanted[len("Optional[") : -1]
    if wanted == "Tensor":
        return kind == "Tensor"
    if wanted == "number":
        return kind in ("int", "float", "bool", "complex")
    if wanted == "float":
        return kind in ("int", "float")
    if wanted == "int":
        return kind in ("int", "dtype", "memory_format", "layout")  # these are numbers to a schema
    if wanted in ("bool", "str"):
        return kind == wanted
    if wanted in ("List[int]", "List[float]"):
        return kind in (wanted, "List[]", "List[int]") or (parameter.fixed and kind in ("int", wanted[5:-1]))
    if wanted.startswith("List["):
        return kind.startswith("List[")
    return kind not in ("Tensor", "int", "float", "bool")


@cache
def _schemas(op: str, target: Any) -> tuple[_Schema, ...]:
    """The overloads of what a node calls; none where nothing is known of its arguments."""
    if op == "call_module":
        return tuple(_signature(target.forward, skip=1))
    if op == "call_method":
        method = getattr(torch.Tensor, target, None)
        return tuple(_signature(method)) if inspect.isfunction(method) else tuple(_overloads(target))
    if isinstance(target, OpOverload):
        return (_of(target._schema),)
    if isinstance(target, OpOverloadPacket):
        return tuple(_of(getattr(target, name)._schema) for name in target.overloads())
    if inspect.isfunction(target):
        return tuple(_signature(dispatched(target)))
    name = getattr(target, "__name__", "")
    found = tuple(_overloads(name)) if _is_torch(target) else ()
    return found or tuple(_signature(target))


def _is_torch(target: Any) -> bool:
    home = getattr(target, "__module__", None) or type(getattr(target, "__self__", None)).__module__ or "torch"
    return home.partition(".")[0] in ("torch", "builtins") and not isinstance(target, type)


def _overloads(name: str) -> Iterator[_Schema]:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    for overload in packet.overloads() if packet is not None else ():
        yield _of(getattr(packet, overload)._schema)


def _of(schema: Any) -> _Schema:
    parameters = [
        _Parameter(
            "input" if a.name == "self" else a.name,
            str(a.type),
            not a.kwarg_only,
            not a.has_default_value() and str(a.type) != "Optional[Tensor]" or a.name == "out",
            a.N is not None,
        )
        for a in schema.arguments
    ]
    if any(a.name == "layout" for a in schema.arguments):  # torch's Python side takes it where a tensor is made, and no schema says so
        parameters.append(_Parameter("requires_grad", "bool", positional=False, required=False))
    return _Schema(parameters)


def _signature(function: Any, skip: int = 0) -> Iterator[_Schema]:
    try:
        given = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):  # a builtin that says nothing of its arguments
        return
    found = []
    for position, p in enumerate(given):
        if p.kind is p.VAR_KEYWORD:
            continue
        first = position == 0 and p.name in ("self", "tensor")
        found.append(
            _Parameter(
                "input" if first else p.name,
                "",
                p.kind is not p.KEYWORD_ONLY,
                p.default is p.empty and p.kind is not p.VAR_POSITIONAL,
                rest=p.kind is p.VAR_POSITIONAL,
            )
        )
    yield _Schema(found, strict=not any(p.kind is p.VAR_KEYWORD for p in given))


@dataclass(frozen=True)
class _Plan:
    """How one rule takes arguments of certain names: parameters by position, then the rest by name."""

    positional: tuple[str, ...]
    keywords: tuple[tuple[str, str], ...]


def call(rule: Callable[..., Any], fixed: tuple[Any, ...], arguments: Mapping[str, Any]) -> Any:
    """Call a rule with ``fixed`` (context, node and maybe module) and with arguments by name.

    A parameter takes the argument of its name; a required one without takes the next in order that no other parameter names (``other`` is
    ``mat2`` of a bmm, ``vec`` of an mv). What is left goes by name into ``**``, or in order into ``*``.
    """
    names = tuple(arguments)
    rest = names[-1] if names and isinstance(arguments[names[-1]], tuple) else None
    made = _plan(rule, len(fixed), names, rest)
    positional = [arguments[name] for name in made.positional]
    if rest is not None and rest in made.positional and _takes_rest(rule):
        positional[made.positional.index(rest) :] = arguments[rest]
    return rule(*fixed, *positional, **{parameter: arguments[name] for parameter, name in made.keywords})


def takes(rule: Callable[..., Any], fixed: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a rule of the user's can be called with the arguments as they were written."""
    try:
        inspect.signature(rule).bind(*fixed, *args, **kwargs)
    except TypeError:
        return False
    return True


@cache
def _takes_rest(rule: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(rule).parameters.values())


@cache
def _plan(rule: Callable[..., Any], fixed: int, names: tuple[str, ...], rest: str | None) -> _Plan:
    parameters = list(inspect.signature(rule).parameters.values())[fixed:]
    wanted = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    taken = {p.name: p.name for p in wanted if p.name in names}
    left = [name for name in names if name not in taken]
    for p in wanted:
        if p.name not in taken and p.default is p.empty and left:
            taken[p.name] = left.pop(0)
    if _takes_rest(rule):
        before = [p for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
        given = list(zip(before, range(len(before)), strict=True))
        positional = [taken[p.name] for p, _ in given if p.name in taken]
        by_name = tuple((p.name, taken[p.name]) for p in wanted if p.kind is p.KEYWORD_ONLY and p.name in taken)
        return _Plan((*positional, *left), by_name)
    keeps = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return _Plan((), (*taken.items(), *((name, name) for name in left if keeps or name not in _HARMLESS)))


# Arguments that say nothing of channels, for rules that do not name them.
_HARMLESS = frozenset({"dtype", "device", "layout", "pin_memory", "requires_grad", "memory_format", "generator", "non_blocking", "copy"})
