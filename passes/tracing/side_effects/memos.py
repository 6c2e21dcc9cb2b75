"""What forward keeps from one call to the next, as it was before the first: ``if self.shape != x.shape: self.grid = make(x)``.

A trace that starts from what an earlier call left would take its branch and keep its tables. Which attributes forward assigns and which
containers it fills is read from the code; what they were at first, from the class and from ``__init__``.
"""

from __future__ import annotations

import ast
import builtins
import copy
import dataclasses
import threading
import types
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fxprune.passes.ir.contents import BAGS, CONTAINERS, MAPPINGS, OF_EVERY_MODULE, SIMPLE, attributes, has_tensors
from fxprune.passes.tracing.side_effects.bindings import Bindings, bindings, binds_by_name, tree_of
from fxprune.passes.tracing.side_effects.reachable import Reach, codes, held, reached_from, stored

ABSENT = object()
UNKNOWN = object()
_NUMBERS = (bool, int, float)
# What was read from the source of functions that are still there.
_known_writes: WeakKeyDictionary[types.FunctionType, list[tuple[str, str]]] = WeakKeyDictionary()
_known_given: WeakKeyDictionary[types.FunctionType, list[tuple[str, ast.expr | None]] | None] = WeakKeyDictionary()
_GROW = frozenset({"append", "extend", "insert", "appendleft", "add"})
_FILL = frozenset({"setdefault", "update", "pop", "popitem", "clear", "register_buffer"}) | _GROW
_MAKERS = frozenset(
    {"dict", "list", "set", "tuple", "frozenset", "range", "len", "float", "int", "bool", "str", "OrderedDict", "defaultdict", "deque"}
    | {"SimpleNamespace", "Namespace", "local"}
    | {"empty", "zeros", "ones", "full", "tensor", "Tensor", "arange", "Size", "device"}
)
_SAFE = (
    *(ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.comprehension, ast.Name, ast.Attribute),
    *(ast.Call, ast.keyword, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context),
)


def forgotten(owner: Any, reach: Reach, outside: Bindings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attribute of ``owner``, a module or an object of the user's, that forward binds -> its value before the first call, ``ABSENT`` where
    there was none. ``outside``: what code binds on objects of other classes than its own.

    The second has besides what nobody can tell, with a guess: nothing, in the place of a table. Left out is what differs in nothing.
    """
    cls, state = type(owner), attributes(owner)
    buffers = state.get("_buffers", {})
    volatile = state.get("_non_persistent_buffers_set", frozenset())
    own = [f for f, of in reach.functions.items() if of is not None and of in cls.__mro__ and f.__name__ != "__init__"]
    own += [v for v in state.values() if isinstance(v, types.FunctionType)]
    by_name = [bindings(f) for f in own if binds_by_name(f)]
    names: set[str] = set().union(*(stored(f.__code__, "STORE_ATTR") for f in own), *(b.own for b in by_name))
    tables = tables_of(owner) if own or outside.others or outside.computed else set()
    if not outside.others.isdisjoint(tables):
        names |= outside.others
    lazy = {n for n in state if n in reach.names and _is_lazy(cls, n)}
    bags = {n for n, v in state.items() if isinstance(v, BAGS) and not reach.bound.isdisjoint(vars(v))}
    filled = _filled(own, {n for n, v in state.items() if type(v) in CONTAINERS and v and not n.startswith("_")})
    computed = tables if any(b.computed for b in by_name) else set()
    if outside.computed and tables - computed:  # by a function that is given the name
        computed = {n for n in tables if any(n in code.co_consts for f in own for code in codes(f.__code__))}
    certain = names | filled.keys() | lazy | bags
    names = {n for n in certain | computed if n in state or n in buffers} - {"training"}
    if not names:
        return {}, {}
    told, said = _initial(reached_from(cls, "__init__"), names)
    told |= _fields(cls, names)
    known: dict[str, Any] = {}
    guessed: dict[str, Any] = {}
    for name in sorted((names & certain) | (names - told.keys() - said)):
        now = state[name] if name in state else buffers[name]
        first = _agreed(told[name], owner) if name in told else UNKNOWN
        if name in lazy:
            first = ABSENT
        elif name in bags:
            if first is UNKNOWN:
                guessed[name] = _emptied(now, reach.bound)
                continue
        elif name in told and (name not in said or first is not UNKNOWN):
            if first is UNKNOWN and name in buffers and name not in volatile:
                continue  # of the user's state_dict, whose shapes do not change
            if first is UNKNOWN:
                first = _blank(now)
                if type(now) in _NUMBERS:
                    guessed[name] = type(now)()
        elif name in filled:
            if not _is_cache(now, filled[name]):
                continue
            first = type(now)() if type(now) is not defaultdict else defaultdict(now.default_factory)
        elif name in said:
            if name not in buffers or name in volatile:
                guessed[name] = type(now)() if type(now) in _NUMBERS else _blank(now)
            continue
        elif name not in certain or (name in buffers and name not in volatile):
            guessed[name] = ABSENT
            continue
        else:
            first = ABSENT
        if not alike(first, now):
            known[name] = first
    numbers = {n for n, v in guessed.items() if type(v) in _NUMBERS}
    if numbers and numbers & {n for f in own if numbers & stored(f.__code__, "STORE_ATTR") for n in bindings(f).awaited}:
        guessed = {}  # a loop that doubles it would not end
    guessed = {n: v for n, v in guessed.items() if not alike(v, state[n] if n in state else buffers[n])}
    if not has_tensors([state[n] if n in state else buffers[n] for n in (*guessed, *known)]):  # numbers alone are no memo
        guessed = {}
    return known, {**known, **guessed}


def tables_of(owner: Any) -> set[str]:
    """The attributes of a module or object that hold tensors and are no parameters, nor buffers of its state_dict."""
    state = attributes(owner)
    found = {n for n, v in state.items() if type(v) not in SIMPLE and n not in OF_EVERY_MODULE and has_tensors(v)}
    kept = state.get("_non_persistent_buffers_set", ())
    return found | {n for n in kept if state["_buffers"].get(n) is not None}


def _is_lazy(cls: type, name: str) -> bool:
    """Whether an attribute of an object hides a descriptor that computes it when it is first read, as ``functools.cached_property``."""
    for base in cls.__mro__:
        if name in base.__dict__:
            held = base.__dict__[name]
            descriptor = hasattr(type(held), "__get__") and not hasattr(type(held), "__set__")
            return descriptor and not isinstance(held, (types.FunctionType, staticmethod, classmethod))
    return False


def forget(owner: Any, first: Mapping[str, Any], blank: bool) -> None:
    """Give ``owner`` what ``forgotten`` found; with ``blank``, None in the place of what was absent or is an empty table."""
    for name, value in first.items():
        none = blank and (value is ABSENT or stands_in(value))
        value = ABSENT if none and _is_lazy(type(owner), name) else None if none else value
        if not hasattr(owner, "__dict__"):
            object.__delattr__(owner, name) if value is ABSENT else object.__setattr__(owner, name, fresh(value))
            continue
        state = owner.__dict__ if name in owner.__dict__ else owner._buffers
        if value is ABSENT:
            del state[name]
        else:
            state[name] = fresh(value)  # forward may fill it, so each trace has its own
            if blank and isinstance(value, BAGS):
                vars(state[name]).update({n: None for n, v in vars(value).items() if stands_in(v)})


def stands_in(value: Any) -> bool:
    """Whether a first value is an empty table, which nobody can tell from the one that was there."""
    return isinstance(value, torch.Tensor) and not value.numel()


def fresh(value: Any) -> Any:
    """A copy of a first value."""
    if isinstance(value, threading.local):
        made = threading.local()
        made.__dict__.update(copy.deepcopy(value.__dict__))
        return made
    return copy.deepcopy(value)


def caches(reach: Reach) -> list[Any]:
    """The containers, outside of modules, that the code of ``reach`` fills as caches, where there is something in them."""
    full = [(name, value) for owner, name in reach.places.values() if type(value := held(owner, name)) in CONTAINERS and value]
    for function in reach.functions:
        code = function.__code__
        given = code.co_varnames[: code.co_argcount][-len(function.__defaults__ or ()) or code.co_argcount :]
        defaults = {**dict(zip(given, function.__defaults__ or (), strict=True)), **(function.__kwdefaults__ or {})}
        full += [(n, v) for n, v in (*defaults.items(), *function.__dict__.items()) if type(v) in CONTAINERS and v]
    filled = _filled(reach.functions, {name for name, _ in full})
    return [value for name, value in full if name in filled and _is_cache(value, filled[name])]


def _is_cache(value: Any, how: set[str]) -> bool:
    """Whether a container that code fills held nothing at first; a table of plain values under names may have been there before, and one
    of classes is a registry: to enter something twice may be an error (``torch.utils._pytree.register_pytree_node``)."""
    if any(isinstance(k, type) for k in value) and not has_tensors(list(value.values()) if type(value) in MAPPINGS else list(value)):
        return False
    if type(value) in MAPPINGS:
        return any(not isinstance(k, str) for k in value) or has_tensors(list(value.values()))
    return how == {"grow"} and not any(isinstance(v, str) for v in value)


def _filled(functions: Iterable[types.FunctionType], names: set[str]) -> dict[str, set[str]]:
    """Of ``names``, those of containers into which code writes: by "item", or only by a method that lets it "grow"."""
    found: dict[str, set[str]] = {}
    for function in functions if names else ():
        mentioned = {name for code in codes(function.__code__) for name in (*code.co_names, *code.co_freevars, *code.co_varnames)}
        if names & mentioned:
            for name, how in _writes(function):
                if name in names:
                    found.setdefault(name, set()).add(how)
    return found


def _writes(function: types.FunctionType) -> list[tuple[str, str]]:
    """The containers into which a function writes, by the last name that it calls them by, and how."""
    if function not in _known_writes:
        found = []
        tree = tree_of(function)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                found.append((_base(node.value), "item"))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _FILL:
                found.append((_base(node.func.value), "grow" if node.func.attr in _GROW else "item"))
        _known_writes[function] = found
    return _known_writes[function]


def _base(node: ast.expr) -> str:
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _initial(starts: Iterable[types.FunctionType], names: set[str]) -> tuple[dict[str, list[Any]], set[str]]:
    """What ``__init__``, and what it calls, says of attributes by ``self.name = expression``: (expression, its globals) for each time.
    The second are those of which something else is said, or not in ``__init__`` itself alone."""
    told: dict[str, list[Any]] = {}
    said: set[str] = set()
    for function in starts:
        mentioned = {name for code in codes(function.__code__) for name in (*code.co_names, *map(str, code.co_consts))}
        if not names & mentioned:
            continue
        if function not in _known_given:
            tree = tree_of(function)
            _known_given[function] = None if tree is None else [pair for node in ast.walk(tree) for pair in _assigned(node)]
        given = _known_given[function]
        if given is None:
            said |= names & mentioned
            for name in names & mentioned:
                told.setdefault(name, []).append(None)
        for name, value in given or ():
            if name not in names:
                continue
            if value is None or function.__name__ != "__init__" or name in told:
                said.add(name)
            told.setdefault(name, []).append((value, function.__globals__) if value is not None else None)
    return told, said


def _fields(cls: type, names: set[str]) -> dict[str, list[Any]]:
    """The same of the fields of a dataclass, whose ``__init__`` has no source."""
    found: dict[str, list[Any]] = {}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        factory: Any = field.default_factory
        if field.name in names and field.default is not dataclasses.MISSING:
            found[field.name] = [(ast.Constant(field.default), {})]
        elif field.name in names and factory in CONTAINERS:
            found[field.name] = [(ast.Constant(factory()), {})]
    return found


def _agreed(told: list[Any], owner: Any) -> Any:
    """The value that all that is said of an attribute has, or ``UNKNOWN``."""
    values = [first_value(one[0], one[1], owner) if one is not None else UNKNOWN for one in told]
    same = all(v is not UNKNOWN and (alike(v, values[0]) or v is values[0]) for v in values)
    return values[0] if same else UNKNOWN


def _assigned(node: ast.AST) -> list[tuple[str, ast.expr | None]]:
    """(attribute, expression) of an assignment to attributes, or of a ``register_buffer``; None for an expression of several parts."""
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and node.value is not None:
        targets, value = [node.target], node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "register_buffer" and len(node.args) > 1:
        name = node.args[0]
        return [(name.value, node.args[1])] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []
    else:
        return []
    found: list[tuple[str, ast.expr | None]] = []
    for target in targets:
        if isinstance(target, ast.Attribute):
            found.append((target.attr, None if isinstance(node, ast.AugAssign) else value))
        elif isinstance(target, (ast.Tuple, ast.List)):
            found += [(part.attr, None) for part in target.elts if isinstance(part, ast.Attribute)]
    return found


def first_value(expression: ast.expr, space: dict[str, Any], owner: Any) -> Any:
    """The value of an expression that only makes containers, numbers and plain tensors; ``UNKNOWN`` of any other."""
    if isinstance(expression, ast.Constant):
        return expression.value
    for node in ast.walk(expression):
        if not isinstance(node, _SAFE) or (isinstance(node, ast.Call) and _base(node.func) not in _MAKERS):
            return UNKNOWN
    try:
        code = compile(ast.Expression(expression), "<init>", "eval")
        return eval(code, {**space, "self": owner, "__builtins__": builtins})
    except Exception:  # noqa: BLE001 - an expression of the user's, which needs what only __init__ has
        return UNKNOWN


def _blank(now: Any) -> Any:
    """What stands for a value that is not known: nothing to compare equal with."""
    if isinstance(now, torch.Tensor):
        return torch.empty((0,) * max(1, now.ndim), dtype=now.dtype)
    return [_blank(v) for v in now] if type(now) is list else None


def _emptied(bag: Any, bound: set[str]) -> Any:
    """A namespace without what code binds in it."""
    held = {n: (_blank(v) if isinstance(v, torch.Tensor) else None) if n in bound else v for n, v in vars(bag).items()}
    made = type(bag)()
    made.__dict__.update(held)
    return made


def alike(first: Any, now: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(now, torch.Tensor):
        return first.shape == now.shape
    if type(first) is not type(now):
        return False
    if isinstance(first, BAGS):
        return alike(dict(vars(first)), dict(vars(now)))
    if isinstance(first, (list, tuple)):
        return len(first) == len(now) and all(map(alike, first, now))
    if isinstance(first, dict):
        return first.keys() == now.keys() and all(alike(v, now[k]) for k, v in first.items())
    return not has_tensors(first) and bool(first == now)
