"""Which attributes a function binds, read from its source: by assignment, ``setattr``, ``register_buffer`` or ``__dict__``."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from fxprune.passes.tracing.side_effects.reachable import codes, stored

# Names by which code binds attributes otherwise than by an assignment.
_DICTS = frozenset({"__dict__", "vars", "_buffers"})
_WAYS = frozenset({"setattr", "__setattr__", "register_buffer", "globals"}) | _DICTS
_known: WeakKeyDictionary[types.FunctionType, Bindings] = WeakKeyDictionary()


@dataclass
class Bindings:
    """``own``: attributes of the function's first argument. ``others``: those of anything else: another module, a class, a function.
    ``computed``: whether it binds under names that do not stand in it. ``spaces``: globals, bound by ``globals()["name"] = ...``.
    ``awaited``: attributes in the condition of a ``while``."""

    own: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    computed: bool = False
    spaces: set[str] = field(default_factory=set)
    awaited: set[str] = field(default_factory=set)


def tree_of(function: types.FunctionType) -> ast.AST | None:
    try:  # of its code: ``inspect`` takes a decorated function for the one that it wraps
        return ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
    except (OSError, SyntaxError, TypeError, ValueError):  # made by exec, or a lambda in the middle of something
        return None


def binds_by_name(function: types.FunctionType) -> bool:
    """Whether it may bind attributes otherwise than by an assignment."""
    return any(not _WAYS.isdisjoint(code.co_names) for code in codes(function.__code__))


def bindings(function: types.FunctionType) -> Bindings:
    if function not in _known:
        tree = tree_of(function)
        if tree is None:
            names = stored(function.__code__, "STORE_ATTR")
            _known[function] = Bindings(names, names, binds_by_name(function))
        else:
            _known[function] = _read(function, tree)
    return _known[function]


def _read(function: types.FunctionType, tree: ast.AST) -> Bindings:
    found = Bindings()
    code = function.__code__
    first = code.co_varnames[0] if code.co_argcount and code.co_varnames[0] != "cls" else ""
    by_dict = any(not _DICTS.isdisjoint(part.co_names) for part in codes(code))

    def bound(owner: ast.expr | None, name: ast.expr | str | None) -> None:
        text = name.value if isinstance(name, ast.Constant) else name
        if not isinstance(text, str):
            found.computed = True
        elif owner is None or _calls(owner, "super"):
            found.own.add(text)
            found.others.add(text)
        else:
            (found.own if isinstance(owner, ast.Name) and owner.id == first else found.others).add(text)

    for node in ast.walk(tree):
        if isinstance(node, ast.While):
            found.awaited |= {one.attr for one in ast.walk(node.test) if isinstance(one, ast.Attribute)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            bound(node.value, node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and _calls(node.value, "globals"):
            if isinstance(node.slice, ast.Constant):
                found.spaces.add(str(node.slice.value))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and by_dict:
            if isinstance(node.slice, ast.Constant) or _is_dict(node.value):
                bound(None, node.slice if not isinstance(node.slice, ast.Constant) or isinstance(node.slice.value, str) else "")
        elif isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
            of = node.func.value if isinstance(node.func, ast.Attribute) else None
            if called in ("setattr", "__setattr__") and len(node.args) >= 2:
                bound(node.args[0] if len(node.args) > 2 else of, node.args[-2])
            elif called == "register_buffer":
                bound(of, next((k.value for k in node.keywords if k.arg == "name"), node.args[0] if node.args else None))
            elif called in ("update", "setdefault") and by_dict:
                for name in [*(k.arg for k in node.keywords), *node.args[:1]]:
                    if isinstance(name, (str, ast.Constant)):
                        bound(None, name)
    return found


def _is_dict(node: ast.expr) -> bool:
    """``self.__dict__``, ``vars(self)``, ``self._buffers``."""
    return _calls(node, *_DICTS) or (isinstance(node, ast.Attribute) and node.attr in _DICTS)


def _calls(node: ast.expr, *names: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def global_names(function: types.FunctionType) -> set[str]:
    """The globals that a function binds."""
    names = stored(function.__code__, "STORE_GLOBAL")
    return names | bindings(function).spaces if "globals" in function.__code__.co_names else names


def bound_outside(functions: Iterable[tuple[types.FunctionType, type | None]], held: set[str]) -> Bindings:
    """What ``functions`` bind on other objects than that of their class. ``held``: names that matter; a function that binds none of
    them is not read."""
    found = Bindings()
    for function, owner in functions:
        if function.__name__ == "__init__" or not (binds_by_name(function) or held & stored(function.__code__, "STORE_ATTR")):
            continue
        its = bindings(function)
        found.others |= its.others if owner is not None else its.others | its.own
        found.computed |= its.computed
    return found
