"""Which attributes of the user's modules the numbers in their code come from: integers, lists of them, and those in a ``config``.

A trace keeps the number and forgets its name. What has that value, belongs to the module whose code was at work and is named by that code
is a candidate; the same attribute has to fit wherever the same line runs. Which candidate it was is not assumed: the kept class is traced
with the new values and must give the slim graph.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from fxprune.passes.rewriting.literal_changes import Literal, is_number

Keys = tuple[Any, ...]
_DEPTH = 2  # attributes of an attribute: self.config.hidden_size


@dataclass(frozen=True)
class Attribute:
    """An attribute, seen from the module whose code is at work: steps up to the module that holds it, and the keys there.

    The attribute is the number ``times`` so much, ``over`` so much.
    """

    up: int
    keys: Keys
    times: int = 1
    over: int = 1


@dataclass(frozen=True)
class Slot:
    """An integer that a module holds: ``keys`` lead to it, names of attributes, keys of dicts and places in lists."""

    path: str
    keys: Keys

    def __str__(self) -> str:
        words = [f"[{k!r}]" if isinstance(k, int) else f".{k}" for k in self.keys]
        return f"{self.path}{''.join(words)}".lstrip(".")


def read(holder: Any, key: Any) -> Any:
    return holder[key] if isinstance(holder, (dict, list, tuple)) else holder.__dict__[key]


def write(module: nn.Module, keys: Keys, value: int) -> None:
    """Set the integer that ``keys`` lead to; tuples on the way are made again."""
    held: list[Any] = [module]
    for key in keys[:-1]:
        held.append(read(held[-1], key))
    new: Any = value
    for holder, key in zip(reversed(held), reversed(keys), strict=True):
        if isinstance(holder, tuple):
            items = [*holder[:key], new, *holder[key + 1 :]]
            new = type(holder)(*items) if hasattr(holder, "_fields") else type(holder)(items)
            continue
        if isinstance(holder, (list, dict)):
            holder[key] = new
        else:
            holder.__dict__[key] = new
        return


def value_of(module: nn.Module, keys: Keys) -> int:
    held: Any = module
    for key in keys:
        held = read(held, key)
    return int(held)


def unshare(module: nn.Module, keys: Keys) -> None:
    """Copies of its own of the objects that ``keys`` lead through, for a module that needs another value than those it shares them with."""
    held: Any = module
    for key in keys[:-1]:
        inner = read(held, key)
        if isinstance(held, tuple) or isinstance(inner, tuple):
            return  # a tuple is made again where it is written to
        inner = copy.copy(inner)
        if isinstance(held, (list, dict)):
            held[key] = inner
        else:
            held.__dict__[key] = inner
        held = inner


def integers(holder: Any, depth: int = _DEPTH) -> Iterator[tuple[Keys, int]]:
    """The integers that an object holds, and the keys to them."""
    items: Any
    if isinstance(holder, (list, tuple)):
        items = enumerate(holder) if len(holder) <= 64 else ()
    else:
        items = list(holder.items() if isinstance(holder, dict) else holder.__dict__.items())
    for key, value in items:
        if isinstance(key, str) and key.startswith("_") or isinstance(value, (bool, torch.Tensor, nn.Module, types.ModuleType, type)):
            continue
        if is_number(value):
            yield (key,), value
        elif depth and (isinstance(value, (list, tuple, dict)) or hasattr(value, "__dict__") and not callable(value)):
            for keys, found in integers(value, depth - 1):
                yield (key, *keys), found


def names_reached(module: nn.Module) -> frozenset[str]:
    """Names in the code of a module's class, of functions that it holds, and of those that these name: what it may read of others."""
    kinds = [base for base in type(module).__mro__ if base not in (nn.Module, object)]
    todo = [function for holder in (*kinds, module) for function in holder.__dict__.values()]
    seen: set[types.CodeType] = set()
    names: set[str] = set()
    while todo:
        function = _function(todo.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen or str(function.__module__).startswith("torch."):
            continue
        seen.add(code)
        own = _names_of_code(code) if function.__name__ != "__init__" else set()
        names |= own
        todo += [function.__globals__[name] for name in own if isinstance(function.__globals__.get(name), types.FunctionType)]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                todo.append(cell.cell_contents)
    return frozenset(names)


@cache
def names_of_class(kind: Any) -> frozenset[str]:
    names: set[str] = set()
    for base in kind.__mro__:
        if base not in (nn.Module, object):
            for key, function in base.__dict__.items():
                names |= _names(function) if key != "__init__" else set()
    return frozenset(names)


def _names(function: Any) -> set[str]:
    code = getattr(_function(function), "__code__", None)
    return set() if code is None else _names_of_code(code)


def _function(function: Any) -> Any:
    function = getattr(function, "__wrapped__", function)
    return function.fget if isinstance(function, property) else getattr(function, "__func__", function)


def _names_of_code(code: types.CodeType) -> set[str]:
    """Names of attributes, and texts that may be keys."""
    names = {name for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names |= _names_of_code(inner)
    return names


@cache
def names_at(where: str) -> frozenset[str]:
    """The attributes that the function at ``file:line`` names; empty where it is not found."""
    file, _, line = where.rpartition(":")
    number = int(line) if line.isdigit() else 0
    best: tuple[int, types.CodeType] | None = None
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) != file:
            continue
        todo: list[Any] = list(vars(module).values())
        for one in todo:
            if isinstance(one, type) and one.__module__ == module.__name__:
                todo.extend(vars(one).values())
                continue
            one = getattr(one, "__wrapped__", one)
            code = getattr(getattr(one, "__func__", one), "__code__", None)
            if code is None or code.co_filename != file or not code.co_firstlineno <= number:
                continue
            if number <= max((n for *_, n in code.co_lines() if n), default=0) and (best is None or code.co_firstlineno > best[0]):
                best = code.co_firstlineno, code
    return frozenset(_names_of_code(best[1])) if best else frozenset()


class Attributes:
    """The candidates for every number of the traced code, and the values that they have to take."""

    def __init__(self, original: nn.Module, found: Sequence[Literal]) -> None:
        self.modules = dict(original.named_modules(remove_duplicate=False))
        self._integers: dict[int, list[tuple[Keys, int]]] = {}
        self.sites: dict[Any, list[Literal]] = defaultdict(list)
        for literal in found:
            self.sites[literal.site].append(literal)
        self.candidates = {site: self._candidates(site, of) for site, of in self.sites.items()}

    def _held(self, module: nn.Module) -> list[tuple[Keys, int]]:
        if id(module) not in self._integers:
            self._integers[id(module)] = list(integers(module))
        return self._integers[id(module)]

    def _candidates(self, site: Any, of: Sequence[Literal], derived: bool = False) -> list[Attribute]:
        """The likeliest first. A number that stays is a candidate's only where the code around it names it.

        ``derived``: attributes whose multiple or part the number is (``self.width // 2``).
        """
        changes = any(one.old != one.new for one in of)
        if not changes and of[0].along is None:
            return []
        here, around = names_at(of[0].where), names_of_class(site[0])
        common: dict[Attribute, tuple[Any, ...]] | None = None
        for one in of:
            mine: dict[Attribute, tuple[Any, ...]] = {}
            path, up = one.owner, 0
            while True:
                for keys, value in self._held(self.modules[path]):
                    share = _share(value, one.old) if derived else (1, 1) if value == one.old else None
                    if share is None or one.new * share[0] % share[1]:
                        continue
                    name = next(k for k in reversed(keys) if isinstance(k, str))
                    rank = 0 if name in here else 1 if name in around else 2
                    place = isinstance(keys[-1], int) and keys[-1] != site[-1]  # the second of three parts is the second of a list
                    if rank == 0 or changes and not derived and (rank == 1 or not up):
                        mine[Attribute(up, keys, *share)] = (rank, up, place, len(keys), str(keys))
                if not path:
                    break
                path, up = path.rpartition(".")[0], up + 1
            common = mine if common is None else {key: rank for key, rank in common.items() if key in mine}
        common = common or {}
        return sorted(common, key=common.__getitem__)

    def slot(self, literal: Literal, choice: Attribute) -> Slot:
        path = literal.owner
        for _ in range(choice.up):
            path = path.rpartition(".")[0]
        return Slot(path, choice.keys)

    def choices(self, most: int) -> Iterator[dict[Any, Attribute]]:
        """One candidate for every site, the likeliest together first; other combinations follow, ``most`` in all.

        Two attributes of one value (as many heads as each is wide) are exchanged in all the code of a class, then line by line.
        """
        likely = {site: found[0] for site, found in self.candidates.items() if found}
        best = {site: one for site, one in likely.items() if not self.sites[site][0].implied}
        if len(best) < len(likely):
            yield likely
        yield best
        unmet = {
            site: of for site, of in self.sites.items() if site not in best and not of[0].implied and any(one.old != one.new for one in of)
        }
        parts = {site: found for site, of in unmet.items() if (found := self._candidates(site, of, derived=True))}
        if parts:
            best = {**best, **{site: found[0] for site, found in parts.items()}}
            yield best
        changing = {
            site: self.candidates[site] for site in best if site not in parts and any(one.old != one.new for one in self.sites[site])
        } | parts
        for site in [one for one in changing if one not in parts]:  # eight heads, and each 64 // 8 wide: the number is no attribute's own
            derived = self._candidates(site, self.sites[site], derived=True)
            changing[site] = [*changing[site], *(one for one in derived if one not in changing[site])]
        others: dict[Any, None] = {}
        for site, found in changing.items():
            others.update(dict.fromkeys((site[0], found[0], other) for other in found[1:]))
        switched = [
            {site: other for site, found in changing.items() if site[0] is kind and found[0] == first and other in found}
            for kind, first, other in others
        ]
        single = [{site: other} for site, found in changing.items() for other in found[1:]]
        for change in [*switched, *single][: most - 1]:
            yield {**best, **change}

    def values(self, choice: Mapping[Any, Attribute]) -> dict[Slot, list[tuple[Literal, int]]]:
        """What every chosen attribute stands for, and what it has to be for that."""
        found: dict[Slot, list[tuple[Literal, int]]] = defaultdict(list)
        for site, picked in choice.items():
            for literal in self.sites[site]:
                found[self.slot(literal, picked)].append((literal, literal.new * picked.times // picked.over))
        return found


def _share(value: int, number: int) -> tuple[int, int] | None:
    """(a, b) with value = number * a / b, where one is a multiple of the other; None elsewhere."""
    if value == number or min(value, number) < 2:
        return None
    return (value // number, 1) if value % number == 0 else (1, number // value) if number % value == 0 else None
