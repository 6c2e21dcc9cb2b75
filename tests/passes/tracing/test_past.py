"""Neither what ran before a trace nor the trace itself shows: caches, globals, closures, and what forward keeps on its modules."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.passes.tracing.modes import trace
from fxprune.passes.tracing.side_effects.reachable import imported
from tests.passes.helpers import gap, zeroed

torch.manual_seed(0)
X, OTHER = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 6, 10)
TABLES: dict[int, Tensor] = {}
NAMED: dict[str, Tensor] = {}
SEEN: list[Tensor] = []
GRID: Tensor | None = None
SHAPE: Any = None


@functools.cache
def ramp(length: int) -> Tensor:
    return torch.linspace(0, 1, length)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        made = self.last(nn.functional.dropout(y + self.table(y), 0.25, self.training))
        assert isinstance(made, Tensor)
        return made

    def table(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class LruCache(Layers):
    def table(self, y: Tensor) -> Tensor:
        return ramp(y.shape[2])[:, None] + ramp(y.shape[3])


class LruMethod(Layers):
    @functools.lru_cache(maxsize=8)  # noqa: B019 - what users write
    def grown(self, length: int) -> Tensor:
        return torch.arange(length).float()

    def table(self, y: Tensor) -> Tensor:
        return self.grown(y.shape[3])


def cached_unless_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers has it: the cache is what a decorator holds, and under a static method nothing says so."""
    kept = functools.lru_cache(maxsize=8)(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else kept(*args, **kwargs)

    return wrapper


class LruStatic(Layers):
    @staticmethod
    @cached_unless_compiling
    def grown(length: int, dtype: torch.dtype) -> Tensor:
        return torch.arange(length, dtype=dtype)

    def table(self, y: Tensor) -> Tensor:
        made: Tensor = self.grown(y.shape[3], dtype=y.dtype)
        return made


class LruAttribute(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.grown = functools.lru_cache(maxsize=4)(self.make)

    def make(self, length: int) -> Tensor:
        return torch.arange(length).float()

    def table(self, y: Tensor) -> Tensor:
        return self.grown(y.shape[3])


class LocalImport(Layers):
    """As code does that can go without a package, or that would import in a circle."""

    def table(self, y: Tensor) -> Tensor:
        from tests.passes.composing.as_people_write import plan_of

        folded, back = plan_of(tuple(y.shape), 2)
        return y.reshape(folded).relu().reshape(back)


class LocalModule(Layers):
    def table(self, y: Tensor) -> Tensor:
        import tests.passes.composing.as_people_write as people

        folded, back = people.plan_of(tuple(y.shape), 2)
        return y.reshape(folded).reshape(back) * people.step(y.shape[3])


class InADict(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.makers, self.part = {"ramp": ramp}, functools.partial(ramp)

    def table(self, y: Tensor) -> Tensor:
        return self.makers["ramp"](y.shape[2])[:, None] + MAKERS["ramp"](y.shape[3]) + self.part(y.shape[3]) + RAMP()


MAKERS, RAMP = {"ramp": ramp}, functools.partial(ramp, 1)


class GlobalDict(Layers):
    def table(self, y: Tensor) -> Tensor:
        SEEN.append(y)
        if y.shape[2] not in TABLES:
            TABLES[y.shape[2]] = torch.arange(y.shape[2])[:, None].float()
        NAMED["last"] = y
        return TABLES[y.shape[2]]


class GlobalMemo(Layers):
    def table(self, y: Tensor) -> Tensor:
        global GRID, SHAPE
        if GRID is None or y.shape[-2:] != SHAPE:
            GRID, SHAPE = torch.arange(y.shape[3]).float(), y.shape[-2:]
        return GRID


class ClassDict(Layers):
    tables: dict[Any, Tensor] = {}

    def table(self, y: Tensor) -> Tensor:
        key = (y.shape[2], y.shape[3])
        if key not in self.tables:
            self.tables[key] = torch.arange(y.shape[2] * y.shape[3]).view(y.shape[2], y.shape[3]) / 10
        return self.tables[key]


def closed_over() -> Callable[[int], Tensor]:
    known: dict[int, Tensor] = {}

    def table(length: int) -> Tensor:
        if length not in known:
            known[length] = torch.arange(length).float()
        return known[length]

    return table


class Closure(Layers):
    make = staticmethod(closed_over())

    def table(self, y: Tensor) -> Tensor:
        return self.make(y.shape[3])


def by_default(length: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006 - what users write
    if length not in known:
        known[length] = torch.arange(length).float()
    return known[length]


class Default(Layers):
    def table(self, y: Tensor) -> Tensor:
        return by_default(y.shape[3])


class Memo(Layers):
    """As detectors have it: grids for the last shape."""

    shape = None
    grid = torch.empty(0)

    def table(self, y: Tensor) -> Tensor:
        shape = y.shape
        if self.shape != shape:
            self.grid = torch.arange(shape[2] * shape[3]).view(shape[2], shape[3]) / 10
            self.shape = shape
        return self.grid


class Entered:
    """What the import of a module entered into a registry of the process, which refuses it when it comes again."""


ENTERED: set[type] = {Entered}
UNDER: set[tuple[str, int]] = {("grid", 1)}


class MemoBesideARegistry(Memo):
    """As transformers has it: classes that were entered are in a set of the code's own, so that each is entered once."""

    def table(self, y: Tensor) -> Tensor:
        if Entered not in ENTERED:
            ENTERED.add(Entered)
            raise ValueError("it is entered already")
        return super().table(y)


class MemoBesideAnother(Memo):
    """The same with what is no class, which might be a cache."""

    def table(self, y: Tensor) -> Tensor:
        if ("grid", 1) not in UNDER:
            UNDER.add(("grid", 1))
            raise ValueError("it is entered already")
        return super().table(y)


class MemoList(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.grids = [torch.zeros(1)] * 2
        self.scales = [torch.empty(0) for _ in range(2)]

    def table(self, y: Tensor) -> Tensor:
        if self.grids[1].shape[2:4] != y.shape[2:4]:
            self.grids[1] = torch.arange(y.shape[3]).expand(1, 1, y.shape[2], y.shape[3]) / 10
            self.scales[0] = torch.ones(y.shape[2], 1)
        return self.grids[1] * self.scales[0]


class MemoLate(Layers):
    """There only since the first call."""

    late: Tensor

    def table(self, y: Tensor) -> Tensor:
        if not hasattr(self, "late") or self.late.shape[0] != y.shape[3]:
            self.late = torch.arange(y.shape[3]).float()
        return self.late


class MemoDict(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[Any, Tensor] = {}

    def table(self, y: Tensor) -> Tensor:
        if y.shape[3] not in self.memo:
            self.memo[y.shape[3]] = torch.arange(y.shape[3]).float()
        return self.memo[y.shape[3]]


class Cache:
    def __init__(self) -> None:
        self.grid: Tensor | None = None

    def of(self, y: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[0] != y.shape[3]:
            self.grid = torch.arange(y.shape[3]).float()
        return self.grid


class MemoObject(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()

    def table(self, y: Tensor) -> Tensor:
        return self.cache.of(y)


class MemoBuffer(Layers):
    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(1), persistent=False)

    def table(self, y: Tensor) -> Tensor:
        if self.grid.shape[-1] != y.shape[3]:
            self.grid = torch.arange(y.shape[3]).float()
        return self.grid


class ByValue(nn.Module):
    """It follows values, so it is kept whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if bool((x.mean() < 1e9).item()) else x


class MemoBesideCode(Memo):
    """A trace from before the first call has to keep a part whole, and so has one from what the call left."""

    def __init__(self) -> None:
        super().__init__()
        self.by_value = ByValue()

    def forward(self, x: Tensor) -> Tensor:
        made = self.by_value(super().forward(x))
        assert isinstance(made, Tensor)
        return made


def columns(length: int) -> Tensor:
    return torch.arange(length).float()


class ByAHelper(Layers):
    """What ``__init__`` leaves to a method, which forward never calls, or with an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()
        self.give(None)

    def reset(self) -> None:
        self.rows: Tensor | None = None

    def give(self, grid: Tensor | None) -> None:
        self.grid = grid

    def table(self, y: Tensor) -> Tensor:
        if self.rows is None or self.rows.shape[0] != y.shape[2]:
            self.rows = columns(y.shape[2])
        if self.grid is None or self.grid.shape[0] != y.shape[3]:
            self.give(columns(y.shape[3]))
        assert self.grid is not None
        return self.rows[:, None] + self.grid


class BySetattr(Layers):
    rows: Tensor
    grid: Tensor

    def table(self, y: Tensor) -> Tensor:
        if not hasattr(self, "rows") or self.rows.shape[0] != y.shape[2]:
            object.__setattr__(self, "rows", columns(y.shape[2]))
        if not hasattr(self, "grid") or self.grid.shape[0] != y.shape[3]:
            setattr(self, "grid", columns(y.shape[3]))  # noqa: B010 - what users write
        return self.rows[:, None] + self.grid


class ByDict(Layers):
    rows: Tensor
    grid: Tensor

    def table(self, y: Tensor) -> Tensor:
        if "rows" not in self.__dict__ or self.rows.shape[0] != y.shape[2]:
            self.__dict__["rows"] = columns(y.shape[2])
        if "grid" not in vars(self) or self.grid.shape[0] != y.shape[3]:
            vars(self).update(grid=columns(y.shape[3]))
        return self.rows[:, None] + self.grid


class ByComputedName(Layers):
    def table(self, y: Tensor) -> Tensor:
        name = f"grid_{self.first.out_channels}"
        if not hasattr(self, name) or getattr(self, name).shape[0] != y.shape[3]:
            setattr(self, name, columns(y.shape[3]))
        return getattr(self, name)  # type: ignore[no-any-return]


def remember(module: Any, length: int) -> Any:
    if getattr(module, "grid", None) is None or module.length != length:
        module.grid, module.length = columns(length), length
    return module.grid


class ByAFunction(Layers):
    def table(self, y: Tensor) -> Tensor:
        return remember(self, y.shape[3])  # type: ignore[no-any-return]


class OnAChild(Layers):
    def table(self, y: Tensor) -> Tensor:
        last: Any = self.last
        if not hasattr(last, "grid") or last.grid.shape[0] != y.shape[3]:
            last.grid = columns(y.shape[3])
        return last.grid  # type: ignore[no-any-return]


class OnTheClass(Layers):
    rows: Tensor
    grid: Tensor | None = None

    def table(self, y: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[0] != y.shape[3]:
            type(self).grid = columns(y.shape[3])
        if getattr(OnTheClass, "rows", None) is None or OnTheClass.rows.shape[0] != y.shape[2]:
            OnTheClass.rows = columns(y.shape[2])
        assert self.grid is not None
        return self.rows[:, None] + self.grid


class OnAFunction(Layers):
    def table(self, y: Tensor) -> Tensor:
        make: Any = columns
        if getattr(make, "grid", None) is None or make.grid.shape[0] != y.shape[3]:
            make.grid = columns(y.shape[3])
        return make.grid  # type: ignore[no-any-return]


class InANamespace(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.other = types.SimpleNamespace(grid=None), types.SimpleNamespace(**dict.fromkeys(["rows"]))

    def table(self, y: Tensor) -> Tensor:
        if self.bag.grid is None or self.bag.grid.shape[0] != y.shape[3]:
            self.bag.grid = columns(y.shape[3])
        if self.other.rows is None or self.other.rows.shape[0] != y.shape[2]:
            self.other.rows = columns(y.shape[2])
        return self.other.rows[:, None] + self.bag.grid  # type: ignore[no-any-return]


class Slotted:
    __slots__ = ("grid",)

    def __init__(self) -> None:
        self.grid: Tensor | None = None


@dataclass
class Fields:
    rows: Tensor | None = None
    length: int = -1
    inner: list[Slotted] = field(default_factory=lambda: [Slotted()])


class InObjects(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.states = {"one": Fields()}

    def table(self, y: Tensor) -> Tensor:
        one = self.states["one"]
        if one.rows is None or one.length != y.shape[2]:
            one.rows, one.length = columns(y.shape[2]), y.shape[2]
        grid = one.inner[0].grid
        if grid is None or grid.shape[0] != y.shape[3]:
            grid = one.inner[0].grid = columns(y.shape[3])
        return one.rows[:, None] + grid


def bound_again() -> Callable[[int], Tensor]:
    known: Tensor | None = None

    def table(length: int) -> Tensor:
        nonlocal known
        if known is None or known.shape[0] != length:
            known = columns(length)
        return known

    return table


class Nonlocal(Layers):
    make = staticmethod(bound_again())

    def table(self, y: Tensor) -> Tensor:
        return self.make(y.shape[3])


class InGlobals(Layers):
    def table(self, y: Tensor) -> Tensor:
        if "LATE" not in globals() or LATE.shape[0] != y.shape[3]:  # type: ignore[name-defined]  # noqa: F821 - it is there since the first call
            globals()["LATE"] = columns(y.shape[3])
        return LATE  # type: ignore[name-defined, no-any-return]  # noqa: F821


class Properties(Layers):
    @functools.cached_property
    def scale(self) -> Tensor:
        return torch.linspace(1, 2, 8)[:, None, None]

    def table(self, y: Tensor) -> Tensor:
        return y * self.scale


class Grown(Layers):
    """Tables that only grow, from a length that a method of the user's gave them."""

    grid: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", self.make(3), persistent=False)
        self.build(3)

    def make(self, length: int) -> Tensor:
        return columns(length)

    def build(self, length: int) -> None:
        self.register_buffer("rows", self.make(length), persistent=False)
        self.longest = length

    def table(self, y: Tensor) -> Tensor:
        if self.grid.shape[0] < y.shape[3]:
            self.grid = self.make(y.shape[3])
        if y.shape[2] > self.longest:
            self.build(y.shape[2])
        return self.rows[: y.shape[2], None] + self.grid[: y.shape[3]]


class Late(Layers):
    """A buffer that forward registers, in and outside of the state_dict."""

    def table(self, y: Tensor) -> Tensor:
        if not hasattr(self, "grid"):
            self.register_buffer("grid", columns(16), persistent=False)
            self.register_buffer(name="rows", tensor=columns(16))
        return self.get_buffer("rows")[: y.shape[2], None] + self.get_buffer("grid")[: y.shape[3]]


def memo(function: Callable[..., Tensor]) -> Any:
    """A decorator whose table is in a closure."""
    table: dict[Any, Tensor] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        if args not in table:
            table[args] = function(*args)
        return table[args]

    return call


def counting_memo(function: Callable[..., Tensor]) -> Any:
    """One whose table is an attribute of the function that it gives."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        call.calls += 1  # type: ignore[attr-defined]
        if args not in call.table:  # type: ignore[attr-defined]
            call.table[args] = function(*args)  # type: ignore[attr-defined]
        return call.table[args]  # type: ignore[attr-defined]

    call.calls, call.table = 0, {}  # type: ignore[attr-defined]
    return call


class MemoOf:
    """One that is an object, with its table among its attributes."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.table = function, dict[Any, Tensor]()

    def __call__(self, *args: Any) -> Tensor:
        try:
            return self.table[args]
        except KeyError:
            return self.table.setdefault(args, self.function(*args))


class Store:
    """Tables in an object that code finds by a global name."""

    single: Any = None

    def __init__(self) -> None:
        self.tables: dict[int, Tensor] = {}
        self.length = 0
        self.last: Tensor | None = None

    def get(self, length: int) -> Tensor:
        if length not in self.tables:
            self.tables[length] = torch.linspace(0, 1, length)
        return self.tables[length]

    def latest(self, length: int) -> Any:
        if self.length != length:
            self.length, self.last = length, torch.linspace(0, 1, length)
        return self.last

    @staticmethod
    @functools.cache
    def plain(length: int) -> Tensor:
        return torch.linspace(0, 1, length)

    @classmethod
    @functools.cache
    def of_class(cls, length: int) -> Tensor:
        return torch.linspace(0, 1, length)

    @functools.lru_cache  # noqa: B019
    def own(self, length: int) -> Tensor:
        return torch.linspace(0, 1, length)


class Alone:
    """An object of which there is one, made by the first call."""

    one: Any = None
    tables: dict[int, Tensor]

    def __new__(cls) -> Alone:
        if cls.one is None:
            cls.one = super().__new__(cls)
            cls.one.tables = {}
        made: Alone = cls.one
        return made

    def get(self, length: int) -> Tensor:
        return self.tables.setdefault(length, torch.linspace(0, 1, length))


STORE = Store()
BOUND = STORE.own
in_closure, in_attribute, in_object = memo(torch.linspace), counting_memo(torch.linspace), MemoOf(torch.linspace)


@torch.no_grad()
@functools.cache
def under_a_decorator(length: int) -> Tensor:
    return torch.linspace(0, 1, length)


RAMPS: dict[str, Callable[[int], Any]] = {
    "static method": lambda n: STORE.plain(n),
    "class method": lambda n: Store.of_class(n),
    "method": lambda n: STORE.own(n),
    "bound method": lambda n: BOUND(n),
    "under a decorator": lambda n: under_a_decorator(n),
    "decorator with a closure": lambda n: in_closure(0, 1, n),
    "decorator with an attribute": lambda n: in_attribute(0, 1, n),
    "decorator that is an object": lambda n: in_object(0, 1, n),
    "object": lambda n: STORE.get(n),
    "the latest of an object": lambda n: STORE.latest(n),
    "one object": lambda n: Alone().get(n),
}


class ByRamp(Layers):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.ramp = RAMPS[how]

    def table(self, y: Tensor) -> Any:
        return self.ramp(y.shape[3])  # of one size: by a dictionary, a size that is equal on the example is the same


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("how", RAMPS)
def test_caches_in_whatever_they_are_wrapped(how: str, ran: bool) -> None:
    model = ByRamp(how).eval()
    with torch.no_grad():
        if ran:
            model(X), model(OTHER), model(X)
        slim = fxprune.compress(model, 0.5, X)
        asked = [note for note in fxprune.record(slim).notes if "specialised" in note]
        assert not asked or how == "the latest of an object"  # which asks whether a size is another than 0
        for x in (X, OTHER, X[:1]):
            assert type(model(x)) is Tensor
            assert gap(zeroed(model, fxprune.record(slim).kept)(x), slim(x)) < 1e-4


KINDS = [LruCache, LruMethod, LruStatic, LruAttribute, LocalImport, LocalModule, InADict]
KINDS += [GlobalDict, GlobalMemo, ClassDict, Closure, Default]
KINDS += [Memo, MemoBesideARegistry, MemoBesideAnother, MemoList, MemoLate, MemoDict, MemoObject, MemoBuffer, MemoBesideCode]
KINDS += [ByAHelper, BySetattr, ByDict, ByComputedName, ByAFunction, OnAChild, OnTheClass, OnAFunction, InANamespace, InObjects]
KINDS += [Nonlocal, InGlobals, Properties, Grown, Late]


def einops_net() -> nn.Module:
    einops = pytest.importorskip("einops")

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.out, self.last = nn.Conv2d(3, 12, 1), nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = einops.rearrange(self.embed(x), "b c h w -> b (h w) c")
            q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=3) for t in self.qkv(y).chunk(3, -1))
            y = y + self.out(einops.rearrange((q @ k.transpose(-1, -2)).softmax(-1) @ v, "b h n d -> b n (h d)"))
            made = self.last(einops.reduce(y, "b n c -> b c", "mean"))
            assert isinstance(made, Tensor)
            return made

    return Attention()


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    """What runs leave outside of a model is gone when the next one comes."""
    OnTheClass.grid, known = None, vars(OnTheClass).keys() & {"rows"}
    for name in known:
        delattr(OnTheClass, name)
    vars(columns).clear()
    globals().pop("LATE", None)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("make", [*KINDS, einops_net], ids=lambda kind: kind.__name__)
def test_the_past_does_not_matter(make: Callable[[], nn.Module], ran: bool) -> None:
    model = make().eval()
    fresh = copy.deepcopy(model)
    if ran:
        with torch.no_grad():
            model(X), model.train()(X), model.eval()
    proxies = alive()
    slim = fxprune.compress(model, 0.0, X)
    assert alive() == proxies, "the trace is gone"
    with torch.no_grad():
        for x in (X, OTHER, X, X[:1]):
            want = model(x)
            assert type(want) is Tensor
            torch.testing.assert_close(slim(x), want)
    notes = [note for note in fxprune.record(slim).notes if "specialised" in note and "dtype" not in note]
    assert not notes or make in (MemoBuffer, Grown), notes  # which ask a buffer for its size, and buffers are the graph's
    pruned = fxprune.compress(model, 0.5, X, verify=True)
    again = fxprune.compress(fresh, fxprune.record(pruned).policy, X)
    with torch.no_grad():
        torch.testing.assert_close(pruned(OTHER), again(OTHER))


def test_relative_imports_are_followed() -> None:
    importlib.import_module("tests.passes.composing.as_people_write")  # what is not imported yet is not looked for
    space: dict[str, Any] = {"__package__": "tests.passes.tracing"}
    exec("def take():\n from ..composing.as_people_write import step\n from . import nothing\n return step", space)
    names = {module.__name__ for module in imported(space["take"])}
    assert names == {"tests.passes.composing.as_people_write", "tests", "tests.passes.tracing"}


def alive() -> int:
    gc.collect()
    return sum(issubclass(type(one), fx.Proxy) for one in gc.get_objects())


def test_plain_containers_are_as_they_were() -> None:
    TABLES.clear()
    NAMED.clear()
    SEEN.clear()
    model = GlobalDict().eval()
    model(X)
    before: Any = (dict(TABLES), dict(NAMED), list(SEEN))
    fxprune.analyze(model, OTHER)
    now: Any = (TABLES, NAMED, SEEN)
    assert all(a is b for old, new in zip(before, now, strict=True) for a, b in zip(old, new, strict=True))
    assert TABLES[8] is before[0][8] and NAMED["last"] is before[1]["last"]


class Hidden:
    """Keeps things where nobody looks: behind an attribute that is found by a computed name."""

    def __init__(self) -> None:
        self.kept: list[Any] = []


HIDDEN = {"some": {"where": {"deep": {"inside": {"of": Hidden()}}}}}


class Leaking(Layers):
    def table(self, y: Tensor) -> Tensor:
        globals()["HID" + "DEN"]["some"]["where"]["deep"]["inside"]["of"].kept.append(y * 2)
        return y


def test_what_is_left_is_found_and_named() -> None:
    hidden = HIDDEN["some"]["where"]["deep"]["inside"]["of"]
    graph = fxprune.analyze(Leaking().eval(), X, check=False)
    assert not hidden.kept and any("forward kept what it computed while it was traced in a list" in note for note in graph.notes)
    fxprune.analyze(Leaking().eval(), X)
    assert all(type(one) is Tensor for one in hidden.kept), "what a run of the model itself keeps there, and no proxies"
    hidden.kept.clear()


class Trusting(Layers):
    """The table of widths was there before; forward only reads it, and adds the last result under a name."""

    table_of = {8: 2.0, 16: 3.0}

    def table(self, y: Tensor) -> Tensor:
        return y * self.table_of[y.shape[1]]


def test_tables_that_forward_only_reads_are_read() -> None:
    model = Trusting().eval()
    torch.testing.assert_close(fxprune.compress(model, 0.0, X)(X), model(X))


class Counter(Layers):
    """No memo: what it computes depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def table(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y


def test_what_forward_counts_is_named() -> None:
    model = Counter().eval()
    model(X)
    assert "forward sets 'calls', which the slim module does not do" in fxprune.analyze(model, X).notes
    assert model.calls == 1


class Warm(Layers):
    """What a method sets is the user's, whatever else is called the same; and what forward computes from its calls is no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.bank = [torch.zeros(1)]

    def update(self, scale: float) -> None:
        self.scale = scale

    def table(self, y: Tensor) -> Tensor:
        known: dict[str, Tensor] = {}
        known.update(a=y)
        if self.bank[0].numel() == 1:
            self.bank[0] = torch.full((8, 1, 1), 3.0)
        return known["a"] * self.scale


class Remembers(Layers):
    """Every later call adds what the first one saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def table(self, y: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = y.detach().mean((0, 2, 3)).view(-1, 1, 1)
            return y
        return y + self.seen


def test_state_that_is_no_cache_is_kept() -> None:
    warm, remembers = Warm().eval(), Remembers().eval()
    warm.update(3.0)
    for model in (warm, remembers):
        with torch.no_grad():
            model(X)
            slim = fxprune.compress(model, 0.0, X)
            torch.testing.assert_close(slim(X), model(X))
            torch.testing.assert_close(slim(OTHER), model(OTHER))
        assert any("depends on its earlier calls" in note for note in fxprune.record(slim).notes)


class Selfish(Layers):
    """A function that holds the module it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(8, 1, 1))
        self.run: Callable[[Tensor], Tensor] = lambda y: y * self.last.weight.mean() + self.shift

    def table(self, y: Tensor) -> Tensor:
        return self.run(y)


def test_closures_over_the_module_compute_with_the_slim_weights() -> None:
    model = Selfish().eval()
    slim = fxprune.compress(model, 0.0, X)
    assert set(slim.state_dict()) == set(model.state_dict())
    slim(X).sum().backward()
    model(X).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(slim.get_parameter(name).grad, p.grad)
    assert not trace(model, X, lambda m: isinstance(m, nn.Conv2d)).constants


class Registered(Layers):
    """A registry that does not keep what it names alive."""

    def table(self, y: Tensor) -> Tensor:
        return y * (1.0 if WEAK else 2.0)


WEAK: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
WEAK_KEYS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class Keyed(Layers):
    def table(self, y: Tensor) -> Tensor:
        return y * float(len(WEAK_KEYS) > 0)


@pytest.mark.parametrize("kind", [Registered, Keyed])
def test_weak_dictionaries_are_searched_too(kind: type[Layers]) -> None:
    model = kind().eval()
    WEAK["one"], WEAK_KEYS[model] = model, 1
    slim = fxprune.compress(model, 0.0, X)
    torch.testing.assert_close(slim(OTHER), model(OTHER))
