"""What forward keeps from one call to the next, as it was before the first: ``if self.shape != x.shape: self.grid = make(x)``.

A trace that starts from what an earlier call left would take its branch and keep its tables. Which attributes forward assigns and which
containers it fills is read from the code; what they were at first, from the class and from ``__init__``.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import inspect
import sys
import textwrap
import types
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fxprune.passes.compat import tree_leaves
from fxprune.passes.ir.contents import CONTAINERS, MAPPINGS, is_foreign
from fxprune.passes.tracing.side_effects.reachable import Reach, codes, held, reached_from, stored

ABSENT = object()
# What was read from the source of functions that are still there.
_known_writes: WeakKeyDictionary[types.FunctionType, list[tuple[str, str]]] = WeakKeyDictionary()
_known_given: WeakKeyDictionary[types.FunctionType, list[tuple[str, ast.expr | None]] | None] = WeakKeyDictionary()
_GROW = frozenset({"append", "extend", "insert", "appendleft", "add"})
_FILL = frozenset({"setdefault", "update", "pop", "popitem", "clear", "register_buffer"}) | _GROW
_MAKERS = frozenset(
    {"dict", "list", "set", "tuple", "frozenset", "range", "len", "float", "int", "bool", "str", "OrderedDict", "defaultdict", "deque"}
    | {"empty", "zeros", "ones", "full", "tensor", "Tensor", "arange", "Size", "device"}
)
_SAFE = (
    *(ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.comprehension, ast.Name, ast.Attribute),
    *(ast.Call, ast.keyword, ast.Subscript, ast.Slice, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context),
)


def forgotten(module: Any, reach: Reach) -> dict[str, Any]:
    """Attribute of ``module`` that forward assigns -> its value before the first call, ``ABSENT`` where there was none.

    Left out is what differs in nothing, and what nobody can tell.
    """
    cls = type(module)
    own = [f for f, owner in reach.functions.items() if owner is not None and owner in cls.__mro__ and f.__name__ != "__init__"]
    own += [v for v in module.__dict__.values() if isinstance(v, types.FunctionType)]
    names: set[str] = set().union(*(stored(f.__code__, "STORE_ATTR") for f in own)) if own else set()
    names |= {name for f in own if "register_buffer" in f.__code__.co_names for name in _registered(f)}
    filled = _filled(own, {n for n, v in module.__dict__.items() if type(v) in CONTAINERS and v and not n.startswith("_")})
    names = {n for n in names | filled.keys() if n in module.__dict__ or n in module.__dict__.get("_buffers", ())}
    names -= {"training"}
    if not names:
        return {}
    starts = reached_from(cls, "__init__")
    direct, others = _initial(starts, names)
    found: dict[str, Any] = {}
    for name in sorted(names):
        plain = name in module.__dict__
        now = module.__dict__[name] if plain else module._buffers[name]
        first: Any = ABSENT
        if name in direct:
            try:
                first = _made(direct[name], module)
            except Exception:  # noqa: BLE001 - an expression of the user's, which needs what only __init__ has
                first = _blank(now)
        elif name in filled:
            if not _is_cache(now, filled[name]):
                continue
            first = type(now)() if type(now) is not defaultdict else defaultdict(now.default_factory)
        elif name in others or not plain:
            continue
        if not _alike(first, now):
            found[name] = first
    return found


def forget(module: Any, first: Mapping[str, Any], blank: bool) -> None:
    """Give ``module`` what ``forgotten`` found; with ``blank``, None in the place of what was absent."""
    for name, value in first.items():
        state = module.__dict__ if name in module.__dict__ else module._buffers
        if value is not ABSENT or blank:  # forward may fill it, so each trace has its own
            state[name] = None if value is ABSENT else copy.deepcopy(value)
        else:
            del state[name]


def caches(reach: Reach) -> list[Any]:
    """The containers, outside of modules, that the code of ``reach`` fills as caches, where there is something in them."""
    full = [(name, value) for owner, name in reach.places.values() if type(value := held(owner, name)) in CONTAINERS and value]
    for function in reach.functions:
        code = function.__code__
        given = code.co_varnames[: code.co_argcount][-len(function.__defaults__ or ()) or code.co_argcount :]
        defaults = {**dict(zip(given, function.__defaults__ or (), strict=True)), **(function.__kwdefaults__ or {})}
        full += [(name, value) for name, value in defaults.items() if type(value) in CONTAINERS and value]
    filled = _filled(reach.functions, {name for name, _ in full})
    return [value for name, value in full if name in filled and _is_cache(value, filled[name])]


def _is_cache(value: Any, how: set[str]) -> bool:
    """Whether a container that code fills held nothing at first; a table of plain values under names may have been there before."""
    if type(value) in MAPPINGS:
        return any(not isinstance(k, str) for k in value) or has_tensors(list(value.values()))
    return how == {"grow"} and not any(isinstance(v, str) for v in value)


def rebound(reach: Reach) -> list[tuple[dict[str, Any], str, Any]]:
    """Globals that code binds with ``global``, with their module's first value: (globals, name, value)."""
    found: list[tuple[dict[str, Any], str, Any]] = []
    for function in reach.functions:
        space = function.__globals__
        names = {n for n in stored(function.__code__, "STORE_GLOBAL") if n in space}
        tree = _module_tree(space) if names else None
        for node in tree.body if tree is not None else ():
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in names & {t.id for t in targets if isinstance(t, ast.Name)}:
                    with contextlib.suppress(Exception):  # an expression of the user's
                        first = _made((node.value, space), None)
                        if not _alike(first, space[name]):
                            found.append((space, name, first))
    return found


def _module_tree(space: dict[str, Any]) -> ast.Module | None:
    try:
        return ast.parse(inspect.getsource(sys.modules[space["__name__"]]))
    except (OSError, SyntaxError, TypeError, KeyError):
        return None


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
        tree = _tree(function)
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


def _tree(function: types.FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError, ValueError):  # made by exec, or a lambda in the middle of something
        return None


def _initial(starts: Iterable[types.FunctionType], names: set[str]) -> tuple[dict[str, tuple[ast.expr, Any]], set[str]]:
    """What ``__init__`` says of attributes by ``self.name = expression``, with its globals; and those that it sets in other ways."""
    direct: dict[str, tuple[ast.expr, Any]] = {}
    others: set[str] = set()
    for function in starts:
        mentioned = {name for code in codes(function.__code__) for name in (*code.co_names, *map(str, code.co_consts))}
        if not names & mentioned:
            continue
        if function not in _known_given:
            tree = _tree(function)
            _known_given[function] = None if tree is None else [pair for node in ast.walk(tree) for pair in _assigned(node)]
        given = _known_given[function]
        others |= names & mentioned if given is None else set()
        for name, value in given or ():
            if name not in names:
                continue
            if value is None or function.__name__ != "__init__" or name in direct:
                others.add(name)
            else:
                direct[name] = value, function.__globals__
    return {n: v for n, v in direct.items() if n not in others}, others


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


def _registered(function: types.FunctionType) -> set[str]:
    """The buffers that a function registers under names that stand in it."""
    tree = _tree(function)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree is not None else []
    return {name for node in calls for name, _ in _assigned(node)}


def _made(said: tuple[ast.expr, Any], module: Any) -> Any:
    """The value of an expression of ``__init__`` that only makes containers, numbers and plain tensors."""
    expression, space = said
    for node in ast.walk(expression):
        if not isinstance(node, _SAFE) or (isinstance(node, ast.Call) and _base(node.func) not in _MAKERS):
            raise ValueError("not a plain value")
    code = compile(ast.Expression(expression), "<init>", "eval")
    return eval(code, {**space, "self": module, "__builtins__": builtins})


def _blank(now: Any) -> Any:
    """What stands for a value that is not known: nothing to compare equal with."""
    if isinstance(now, torch.Tensor):
        return torch.empty(0)
    return [_blank(v) for v in now] if type(now) is list else None


def has_tensors(value: Any) -> bool:
    """Whether a nested value holds a tensor."""
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _alike(first: Any, now: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(now, torch.Tensor):
        return first.shape == now.shape
    if type(first) is not type(now):
        return False
    if isinstance(first, (list, tuple)):
        return len(first) == len(now) and all(map(_alike, first, now))
    if isinstance(first, dict):
        return first.keys() == now.keys() and all(_alike(v, now[k]) for k, v in first.items())
    return not has_tensors(first) and bool(first == now)


def own_objects(module: nn.Module) -> list[Any]:
    """Plain objects of the user's classes that a module holds as attributes."""
    return [
        value
        for value in module.__dict__.values()
        if not isinstance(value, (nn.Module, torch.Tensor, type, tuple))
        and type(value) not in CONTAINERS
        and not is_foreign(type(value))
        and type(getattr(value, "__dict__", None)) is dict
    ]
