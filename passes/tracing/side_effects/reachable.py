"""What the code of a model's ``forward`` can reach by name: functions, classes, globals and closures, found without running anything.

Names are matched, not types, so it is more than what runs; code of torch, NumPy and the standard library is left out.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxprune.passes.ir.contents import CachedFunction, attributes, has_tensors, is_foreign, own_objects

_WIDE, _IMPORT = dis.EXTENDED_ARG, dis.opmap["IMPORT_NAME"]
_MANY = 1000  # entries of a list or dictionary beyond which it holds data rather than functions


@dataclass
class Reach:
    """``functions`` -> the class whose method it is, or None. ``names``: all names their code mentions;
    ``bound``: those of attributes that it assigns to, on whatever.

    ``places``: where a mentioned global, class attribute or closed-over value is held, as (owner, name): a dict of globals and a key, a
    class and an attribute, a cell and its variable.
    """

    functions: dict[types.FunctionType, type | None] = field(default_factory=dict)
    classes: dict[type, None] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    bound: set[str] = field(default_factory=set)
    places: dict[tuple[int, str], tuple[Any, str]] = field(default_factory=dict)


def reachable(modules: Iterable[nn.Module]) -> Reach:
    """What the forward passes of ``modules``, their hooks, and functions held as their attributes can reach."""
    found = _Search()
    for module in modules:
        for value in module.__dict__.values():
            if isinstance(value, (types.FunctionType, types.MethodType, CachedFunction, functools.partial)):
                found.value(value)
            elif type(value) in (dict, list, tuple):
                found.container(value)
        for one in own_objects(module):
            if has_tensors(list(attributes(one).values())):  # whose methods may be what keeps them
                found._class(type(one))
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for hook in hooks.values():
                found.value(hook)
        found.module_class(type(module))
    found.finish()
    return found.reach


def reached_from(cls: type, start: str) -> dict[types.FunctionType, None]:
    """The functions of ``cls`` and of its bases, torch's left out, that its method ``start`` reaches by the names it mentions."""
    found: dict[types.FunctionType, None] = {}
    todo = [start]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:
            function = plain(base.__dict__.get(name))
            if function is None or is_foreign(base):
                continue
            found[function] = None
            for code in codes(function.__code__):
                todo += code.co_names
    return found


def plain(value: Any) -> types.FunctionType | None:
    """The Python function behind a method, property, class method or decorator, or None."""
    *_, last = layers_of(value)
    return last if isinstance(last, types.FunctionType) else None


def layers_of(value: Any) -> Iterator[Any]:
    """What stands around a Python function, the outermost first, and the function: a decorator keeps its own around what it wraps."""
    yield value
    for _ in range(8):
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, (functools.cached_property, functools.partial)):
            value = value.func
        elif isinstance(value, (CachedFunction, types.FunctionType)) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return
        yield value


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """``code`` and that of the functions and comprehensions within."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def stored(code: types.CodeType, kind: str) -> set[str]:
    """The names that ``code`` and what is within it assigns: attributes (``STORE_ATTR``) or globals (``STORE_GLOBAL``)."""
    opcode = dis.opmap[kind]
    names: set[str] = set()
    for part in codes(code):
        raw = part.co_code
        if opcode not in raw[::2]:
            continue
        wide = 0
        for at in range(0, len(raw), 2):
            if raw[at] == _WIDE:
                wide = (wide | raw[at + 1]) << 8
                continue
            if raw[at] == opcode:
                names.add(part.co_names[wide | raw[at + 1]])
            wide = 0
    return names


def imported(function: types.FunctionType) -> list[types.ModuleType]:
    """The modules that the function itself imports, as far as they are there already: nothing is imported for it."""
    found: dict[str, types.ModuleType] = {}
    for code in codes(function.__code__):
        if _IMPORT not in code.co_code[::2]:
            continue
        level = 0
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_CONST" and isinstance(step.argval, int):
                level = step.argval
            elif step.opname == "IMPORT_NAME":
                name = step.argval
                if level:
                    parents = str(function.__globals__.get("__package__") or "").split(".")
                    name = ".".join([*parents[: len(parents) - level + 1], *([name] if name else [])])
                for one in (name, name.partition(".")[0]):  # ``import a.b`` names a
                    module = sys.modules.get(one)
                    if isinstance(module, types.ModuleType) and not is_foreign(module):
                        found[one] = module
    return list(found.values())


class _Search:
    def __init__(self) -> None:
        self.reach = Reach()
        self.todo: list[types.FunctionType] = []

    def module_class(self, cls: type) -> None:
        if cls in self.reach.classes or is_foreign(cls):
            return
        self._class(cls)
        for name in ("forward", "__call__"):
            for base in cls.__mro__:
                if not is_foreign(base):
                    self.value(base.__dict__.get(name), base)

    def _class(self, cls: type) -> None:
        if is_foreign(cls) or cls in self.reach.classes:
            return
        for base in cls.__mro__:
            if not is_foreign(base):
                self.reach.classes.setdefault(base)
                for name in self.reach.names & base.__dict__.keys():
                    self.place(base, name)

    def value(self, value: Any, owner: type | None = None) -> None:
        """Follow a function, class or bound method; anything else is no code."""
        if isinstance(value, type):
            self._class(value)
            for name in ("__new__", "__init__") if not issubclass(value, nn.Module) else ():
                self.value(value.__dict__.get(name), value)
            return
        for layer in layers_of(value):
            if isinstance(layer, types.FunctionType) and not is_foreign(layer):
                self._function(layer, owner)
            elif isinstance(layer, types.FunctionType):  # a decorator of torch's, around a function of the user's
                for variable, cell in zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True):
                    if not _is_empty(cell) and isinstance(cell.cell_contents, CachedFunction):
                        self.place(cell, variable)
        if not isinstance(value, (types.FunctionType, types.ModuleType, nn.Module)) and not is_foreign(type(value)):
            self._class(type(value))
            if not isinstance(value, type) and callable(value):  # an object that is called by its own name, as a decorator may leave it
                self.value(getattr(type(value), "__call__", None), type(value))  # noqa: B004

    def container(self, value: Any) -> None:
        """Follow the functions that a list holds, or a dictionary under names, whose places they are."""
        if len(value) > _MANY:
            return
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(one, (types.FunctionType, types.MethodType, CachedFunction, functools.partial)):
                self.place(value, key) if isinstance(value, dict) and isinstance(key, str) else self.value(one)

    def _function(self, function: types.FunctionType, owner: type | None) -> None:
        if function not in self.reach.functions:
            self.reach.functions[function] = owner
            self.todo.append(function)

    def place(self, owner: Any, name: str) -> None:
        key = (id(owner), name)
        if key in self.reach.places:
            return
        self.reach.places[key] = owner, name
        value = held(owner, name)
        if type(value) in (dict, list, tuple):
            self.container(value)
        self.value(value, owner if isinstance(owner, type) else None)

    def finish(self) -> None:
        while self.todo:
            function = self.todo.pop()
            for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if not _is_empty(cell):
                    self.place(cell, variable)
            for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                if isinstance(default, (types.FunctionType, types.MethodType)):
                    self.value(default)
            names = {name for code in codes(function.__code__) for name in code.co_names}
            self._spaces(function, names)
            self.reach.bound |= stored(function.__code__, "STORE_ATTR")
            new = names - self.reach.names
            self.reach.names |= new
            for cls in list(self.reach.classes):
                for name in new & cls.__dict__.keys():
                    self.place(cls, name)

    def _spaces(self, function: types.FunctionType, names: set[str]) -> None:
        """The globals that a function names, and what it names in modules that it holds or names."""
        cells = (c.cell_contents for c in function.__closure__ or () if not _is_empty(c))
        spaces: dict[int, dict[str, Any]] = {id(function.__globals__): function.__globals__}
        todo = [function.__globals__, *(c.__dict__ for c in cells if isinstance(c, types.ModuleType) and not is_foreign(c))]
        todo += [module.__dict__ for module in imported(function)]
        while todo:
            space = todo.pop()
            spaces[id(space)] = space
            for name in names & space.keys():
                self.place(space, name)
                inner = space[name]
                if isinstance(inner, types.ModuleType) and not is_foreign(inner) and id(inner.__dict__) not in spaces:
                    todo.append(inner.__dict__)


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return True
    return False


def held(owner: Any, name: str) -> Any:
    """What a place holds."""
    if isinstance(owner, dict):
        return owner.get(name)
    return owner.cell_contents if isinstance(owner, types.CellType) else owner.__dict__.get(name)
