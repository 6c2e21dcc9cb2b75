"""What forward keeps outside of its modules: nothing of a trace is read from it or stays in it.

Functions behind ``functools.lru_cache`` are called past their caches. Dicts, lists and sets that the code of forward reaches by name
(globals, class attributes, closures, defaults) are put back afterwards, and so are the names themselves; those that it fills as a cache
start empty. Generators of random numbers go on where they stood. What holds a proxy all the same is found, and rid of it.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import gc
import random
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.errors import TraceError
from fxprune.passes.ir.contents import CONTAINERS, MAPPINGS, OF_EVERY_MODULE, CachedFunction, Contents
from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.tracing.proxies import ShapeAttribute, ShapeProxy, ShapeTuple
from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.side_effects.bindings import global_names
from fxprune.passes.tracing.side_effects.elsewhere import Place
from fxprune.passes.tracing.side_effects.memos import ABSENT, fresh
from fxprune.passes.tracing.side_effects.reachable import Reach, held
from fxprune.passes.tracing.sizes.arithmetic import stand_ins

ALONE = threading.RLock()  # one trace or comparison at a time in a process: they replace names and set generators
_isinstance = builtins.isinstance
_ABSENT = object()


@contextlib.contextmanager
def isolated(tracer: Recorder, reach: Reach, empty: Sequence[Any], first: Sequence[Place]) -> Iterator[None]:
    """For the time of a trace: ``empty`` are containers that start empty, ``first`` places that start with another value.

    A global, a closure or a default that holds a module of the model, and a container there that holds one or is keyed by it or by its
    ``id()``, holds the twin meanwhile.
    """
    before = Contents()
    for function in reach.functions:
        before.add((function.__defaults__, function.__kwdefaults__, function.__dict__))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_names_kept(reach))
        stack.callback(before.restore)
        for owner, name in reach.places.values():
            value = held(owner, name)
            before.add(value)
            if (past := _past_caches(value)) is not value:
                stack.callback(_bind, owner, name, value)
                _bind(owner, name, past)
            elif not _isinstance(value, (type, types.FunctionType, types.ModuleType, property)):
                stack.callback(_bind, owner, name, value)
        _exchange(reach, before, tracer.skeleton.twins, stack)
        for container in empty:
            container.clear()
        for owner, name, value in first:
            stack.callback(_bind, owner, name, held(owner, name))
            if value is not ABSENT:
                _bind(owner, name, fresh(value))
            elif isinstance(owner, dict):
                del owner[name]
            else:
                delattr(owner, name)
        for function in reach.functions:
            space = function.__globals__
            if "type" in function.__code__.co_names and "type" not in space:
                stack.callback(space.pop, "type", None)
                space["type"] = _Type
        for space, name, value in list(stand_ins(tracer, reach.functions)):
            stack.callback(_rebind, space, name, space.get(name, _ABSENT))
            space[name] = value
        with _generators(tracer, [*_own_generators(reach), *_of_modules(tracer.skeleton.module_names)]):
            yield


@contextlib.contextmanager
def _names_kept(reach: Reach) -> Iterator[None]:
    """What code binds that was not there goes again: globals, and attributes of classes (``type(self).table = ...``)."""
    spaces = [(f.__globals__, name) for f in reach.functions for name in global_names(f)]
    absent = [(space, name) for space, name in spaces if name not in space]
    classes = [(cls, set(cls.__dict__)) for cls in reach.classes]
    try:
        yield
    finally:
        for space, name in absent:
            space.pop(name, None)
        for cls, names in classes:
            for name in [n for n in cls.__dict__ if n not in names and not n.startswith("__")]:
                delattr(cls, name)


def _rebind(space: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        space.pop(name, None)
    else:
        space[name] = value


@contextlib.contextmanager
def contents_kept(reach: Reach, modules: Iterable[nn.Module] = ()) -> Iterator[None]:
    """For the time of a run of the model itself: what it leaves in globals, classes, closures and random generators, those that
    ``modules`` hold among them, is taken out again."""
    before = Contents()
    held_now = [(owner, name, held(owner, name)) for owner, name in reach.places.values()]
    for function in reach.functions:
        before.add((function.__defaults__, function.__kwdefaults__, function.__dict__))
    for _, _, value in held_now:
        before.add(value)
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002 - what the user's code may draw from
    own = [(one, _state_of(one)) for one in (*_own_generators(reach), *_of_modules(modules))]
    try:
        with _names_kept(reach):
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        for one, state in own:
            _set_state(one, state)
        before.restore()
        for owner, name, value in held_now:
            if not _isinstance(value, (type, types.FunctionType, types.ModuleType, property, CachedFunction)):
                _bind(owner, name, value)


@contextlib.contextmanager
def standing_in(reach: Reach, twins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """For the time of a run of a copy: what holds a module of the original, or is keyed by one, holds that of the copy (``twins``). What
    the run leaves outside of modules is taken out again."""
    before = Contents()
    for owner, name in reach.places.values():
        before.add(held(owner, name))
    for twin in twins.values():
        for name in twin.__dict__.keys() - OF_EVERY_MODULE:
            before.add(twin.__dict__[name])
    with contents_kept(reach), contextlib.ExitStack() as stack:
        stack.callback(before.restore)
        _exchange(reach, before, twins, stack)
        yield


def _exchange(reach: Reach, before: Contents, twins: Mapping[nn.Module, nn.Module], stack: contextlib.ExitStack) -> None:
    before.exchange(twins)
    for owner, name in reach.places.values():
        value = held(owner, name)
        if (other := _exchanged(value, twins)) is not value:
            stack.callback(_bind, owner, name, value)
            _bind(owner, name, other)
    for function in reach.functions:
        defaults = tuple(_exchanged(v, twins) for v in function.__defaults__ or ())
        if any(a is not b for a, b in zip(defaults, function.__defaults__ or (), strict=True)):
            stack.callback(setattr, function, "__defaults__", function.__defaults__)
            function.__defaults__ = defaults


def _exchanged(value: Any, twins: Mapping[nn.Module, nn.Module]) -> Any:
    """The twin of a module, and a twin's method: ``old = layer.forward; layer.forward = lambda x: old(x) * 2`` holds the layer's own."""
    if _isinstance(value, nn.Module):
        return twins.get(value, value)
    holder: Any = value.__self__ if type(value) is types.MethodType else None
    return types.MethodType(value.__func__, twins[holder]) if _isinstance(holder, nn.Module) and holder in twins else value


def _bind(owner: Any, name: str, value: Any) -> None:
    if held(owner, name) is value:
        return
    if _isinstance(owner, dict):
        owner[name] = value
    elif _isinstance(owner, types.CellType):
        owner.cell_contents = value
    else:
        setattr(owner, name, value)


def _past_caches(value: Any) -> Any:
    """What stands for a function with a cache, in whatever it is wrapped; anything else as it is."""
    if _isinstance(value, CachedFunction):
        return _past_cache(value)
    kind: Any = type(value)
    inner = {functools.partial: "func", property: "fget"}.get(kind, "__func__")
    if kind not in (functools.partial, property, staticmethod, classmethod, types.MethodType):
        return value
    held_in = getattr(value, inner)
    past = _past_caches(held_in)
    if past is held_in:
        return value
    if kind is functools.partial:
        return functools.partial(past, *value.args, **value.keywords)
    if kind is property:
        return value.getter(past)
    return types.MethodType(past, value.__self__) if kind is types.MethodType else kind(past)


def _past_cache(cached: Any) -> Any:
    """A cached function with a cache of this trace alone, for calls without proxies: a size is not the number that it equals."""
    thread, results = threading.get_ident(), {}

    @functools.wraps(cached.__wrapped__)
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return cached(*args, **kwargs)
        if any(_isinstance(leaf, fx.Proxy) for leaf in _flat((args, kwargs))):
            return cached.__wrapped__(*args, **kwargs)
        key = (args, tuple(sorted(kwargs.items())), tuple(map(type, args)))
        if key not in results:
            results[key] = cached.__wrapped__(*args, **kwargs)
        return results[key]

    call.cache_clear, call.cache_info = lambda: None, cached.cache_info  # type: ignore[attr-defined]
    return call


def _flat(value: Any) -> Iterator[Any]:
    if _isinstance(value, (tuple, list, set, frozenset)):
        for one in value:
            yield from _flat(one)
    elif type(value) is dict:
        yield from _flat(tuple(value.values()))
    else:
        yield value


class _SeenThrough(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1:
            return type(*args, **kwargs)
        kind = type(args[0])
        if kind is ShapeTuple:
            return torch.Size
        if kind in (ShapeProxy, ShapeAttribute):
            kind = type(args[0].value)
        frame = sys._getframe(1)
        if kind in (int, float) and kind.__name__ in frame.f_code.co_names:  # what stands for it there, so that ``type(x) is int`` holds
            stands_in = frame.f_globals.get(kind.__name__)
            return stands_in if stands_in is not None and stands_in == kind else kind
        return kind

    def __instancecheck__(cls, instance: Any) -> bool:
        return _isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class _Type(type, metaclass=_SeenThrough):
    """``type`` for code that is traced: what it says of a proxy is the type of its value."""


@contextlib.contextmanager
def _generators(tracer: Recorder, own: Sequence[Any]) -> Iterator[None]:
    """Random numbers that Python or NumPy drew stay what they were, which is said; the user's generators do not move. What is drawn is
    what a run draws that ``same_random_numbers`` governs, so that the two can be compared."""
    before = [_state_of(one) for one in own]
    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    first, second = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    try:
        yield
    finally:
        drew = []
        if random.getstate() != first:
            drew.append("random")
        now = np.random.get_state(legacy=False)  # noqa: NPY002
        if any(not np.array_equal(now["state"][key], second["state"][key]) for key in ("key", "pos")):
            drew.append("numpy.random")
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for one, state in zip(own, before, strict=True):
            if str(_state_of(one)) != str(state):
                drew.append(f"a {type(one).__module__}.{type(one).__name__} of its own")
                _set_state(one, state)
        for name in dict.fromkeys(drew):
            text = f"forward draws from {name}; what was drawn while it was traced is specialised, every call has the same"
            tracer.note(NoteKind.VALUE, text)
        if not torch.equal(torch.get_rng_state(), torch_state):
            torch.set_rng_state(torch_state)


def _own_generators(reach: Reach) -> list[Any]:
    """Generators of random numbers that code holds by a global name, an attribute of a class or a closure."""
    return list({id(v): v for v in (held(owner, name) for owner, name in reach.places.values()) if _draws(v)}.values())


def _of_modules(modules: Iterable[nn.Module]) -> list[Any]:
    found = [v for module in modules for v in module.__dict__.values() if _draws(v)]
    return list({id(one): one for one in found}.values())


def _draws(value: Any) -> bool:
    known = _isinstance(value, (random.Random, np.random.Generator, np.random.RandomState))
    return known and not _isinstance(value, random.SystemRandom)


def _state_of(generator: Any) -> Any:
    if _isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if _isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if _isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state) if _isinstance(generator, random.Random) else generator.set_state(state)


def remove_left(made: Sequence[weakref.ref[Any]]) -> list[str]:
    """Find which of the proxies of a finished trace something still holds, and take them out. Returns what held them, for a note.

    Raises:
        TraceError: Something holds one that it cannot be taken out of.
    """
    if not any(ref() is not None for ref in made):
        return []
    gc.collect()
    left = _alive(made)
    where: list[str] = []
    for _ in range(4):
        if not left:
            return where
        kept: list[Any] = list(left)
        ids = {id(k) for k in kept} | {id(left), id(kept)}
        for _ in range(3):  # tuples and links of a cache stand between a proxy and what holds it
            for holder in gc.get_referrers(*kept):
                if _isinstance(holder, types.FrameType) or id(holder) in ids:
                    continue
                ids.add(id(holder))
                if _isinstance(holder, CachedFunction):
                    holder.cache_clear()
                    where.append(f"the cache of {holder.__wrapped__.__qualname__}()")
                elif type(holder) in CONTAINERS:
                    _take_out(holder, {id(k) for k in kept})
                    where.append(f"a {type(holder).__name__}")
                else:
                    kept.append(holder)
        made = [weakref.ref(proxy) for proxy in left]
        left.clear()
        kept.clear()
        holder = None
        gc.collect()
        left = _alive(made)
    raise TraceError(f"forward keeps what it computes in something that outlives it ({type(left[0]).__name__}); it cannot be traced")


def _alive(made: Sequence[weakref.ref[Any]]) -> list[Any]:
    return [proxy for proxy in (ref() for ref in made) if proxy is not None]


def _take_out(holder: Any, wanted: set[int]) -> None:
    if type(holder) in MAPPINGS:
        for key in [k for k, v in holder.items() if id(k) in wanted or id(v) in wanted]:
            del holder[key]
    elif type(holder) in (set, weakref.WeakSet):
        for one in [v for v in holder if id(v) in wanted]:
            holder.discard(one)
    else:
        stay = [v for v in holder if id(v) not in wanted]
        holder.clear()
        holder.extend(stay)
