"""What forward keeps outside of its modules, under names that it binds anew: globals, attributes of classes and functions, closures."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

from fxprune.passes.tracing.side_effects.bindings import Bindings, global_names
from fxprune.passes.tracing.side_effects.memos import ABSENT, UNKNOWN, alike, first_value
from fxprune.passes.tracing.side_effects.reachable import Reach

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
Place = tuple[Any, str, Any]
"""(owner, name, first value): a dict of globals or of a function, a class, or a cell; and ``ABSENT`` where it held nothing."""


def rebound(reach: Reach, outside: Bindings) -> list[Place]:
    """The places that code binds anew and that hold something else than the source of their module says they did at first."""
    found = [place for function in reach.functions for place in (*_globals(function), *_cells(function))]
    if outside.others:
        for function in reach.functions:
            found += _attributes(function, function.__dict__, function.__globals__, outside)
        for cls in reach.classes:
            found += _of_class(cls, outside)
    return list({(id(owner), name): (owner, name, first) for owner, name, first in found}.values())


def _globals(function: types.FunctionType) -> Iterator[Place]:
    space = function.__globals__
    names = {n for n in global_names(function) if n in space}
    tree = _module_tree(str(space.get("__name__"))) if names else None
    if tree is None:
        return
    bound = _bound_at(tree)
    for name in sorted(names):
        said = _said(tree, name)
        first = first_value(said, space, None) if said is not None else UNKNOWN if name in bound or "*" in bound else ABSENT
        if first is not UNKNOWN and not alike(first, space[name]):
            yield space, name, first


def _attributes(function: types.FunctionType, held: dict[str, Any], space: dict[str, Any], outside: Bindings) -> Iterator[Place]:
    """``make.table = ...``, of a function that may hold its tables."""
    names = outside.others & held.keys() - {"__wrapped__"}
    tree = _module_tree(str(space.get("__name__"))) if names else None
    if tree is None:
        return
    for name in sorted(names):
        said = _said(tree, name, function.__name__)
        first = first_value(said, space, None) if said is not None else ABSENT
        if said is None and type(held[name]) in (int, float, bool) and function.__closure__:  # a decorator may have set it, to nothing yet
            first = type(held[name])()
        if first is not UNKNOWN and not alike(first, held[name]):
            yield held, name, first


def _of_class(cls: type, outside: Bindings) -> Iterator[Place]:
    """``type(self).table = ...``"""
    held = {n: v for n, v in cls.__dict__.items() if not isinstance(v, type) and not hasattr(type(v), "__get__")}
    names = {n for n in outside.others & held.keys() if not n.startswith("__")}
    tree = _module_tree(cls.__module__) if names else None
    bodies = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls.__name__] if tree is not None else []
    if len(bodies) != 1:  # of two, nobody knows which it is
        return
    space = vars(sys.modules[cls.__module__])
    bound = _bound_at(bodies[0])
    for name in sorted(names):
        said = _said(bodies[0], name)
        first = first_value(said, space, None) if said is not None else UNKNOWN if name in bound else ABSENT
        if first is not UNKNOWN and not alike(first, cls.__dict__[name]):
            yield cls, name, first


def _cells(function: types.FunctionType) -> Iterator[Place]:
    """``nonlocal table``: what the function around it says of the name."""
    code = function.__code__
    if not code.co_freevars or dis.opmap["STORE_DEREF"] not in code.co_code[::2]:
        return
    written = {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
    cells = {n: c for n, c in zip(code.co_freevars, function.__closure__ or (), strict=True) if n in written}
    tree = _module_tree(str(function.__globals__.get("__name__"))) if cells else None
    around = _around(tree, function) if tree is not None else None
    for name, cell in sorted(cells.items()):
        said = _said(around, name) if around is not None else None
        first = first_value(said, function.__globals__, None) if said is not None else UNKNOWN
        try:
            if first is not UNKNOWN and not alike(first, cell.cell_contents):
                yield cell, name, first
        except ValueError:  # it is empty
            continue


def _around(tree: ast.Module, function: types.FunctionType) -> ast.FunctionDef | None:
    """The function in which ``function`` was made."""
    line = function.__code__.co_firstlineno
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef):
            for inner in outer.body:
                start = min([inner.lineno, *(d.lineno for d in getattr(inner, "decorator_list", ()))])
                if isinstance(inner, ast.FunctionDef) and inner.name == function.__name__ and start == line:
                    return outer
    return None


def _said(scope: ast.Module | ast.ClassDef | ast.FunctionDef, name: str, of: str = "") -> ast.expr | None:
    """The expression that the statements of a scope bind ``name`` to, or the attribute ``name`` of ``of``, where it is one alone."""
    found: list[ast.expr] = []
    for node in scope.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if not of and isinstance(target, ast.Name) and target.id == name:
                    found.append(node.value)
                if of and isinstance(target, ast.Attribute) and target.attr == name and getattr(target.value, "id", "") == of:
                    found.append(node.value)
    return found[-1] if found else None


def _bound_at(scope: ast.Module | ast.ClassDef) -> set[str]:
    """The names that code of a scope binds outside of its functions."""
    found: set[str] = set()
    todo: list[ast.AST] = list(scope.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if isinstance(node, _SCOPES):
            found.add(getattr(node, "name", ""))
        elif not (isinstance(node, ast.AnnAssign) and node.value is None):  # which says a type alone
            todo += ast.iter_child_nodes(node)
    return found


@functools.lru_cache(maxsize=64)
def _source_tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def _module_tree(name: str) -> ast.Module | None:
    try:
        return _source_tree(inspect.getsource(sys.modules[name]))
    except (OSError, TypeError, KeyError):
        return None
