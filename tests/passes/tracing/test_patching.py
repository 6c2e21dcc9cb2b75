"""What tracing replaces in the process is put back whatever happens, and only the tracing thread ever sees it."""

from __future__ import annotations

import builtins
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes.tracing.modes import trace
from fxprune.passes.tracing.patching import PATCHES, Patch

ABSENT = object()


def held() -> dict[tuple[str, str], Any]:
    """What every owner of a patched name holds under it, and what fx itself replaces."""
    found = {(getattr(p.owner, "__name__", repr(p.owner)), p.name): vars(p.owner).get(p.name, ABSENT) for p in PATCHES}
    found |= {("Module", name): vars(nn.Module).get(name, ABSENT) for name in ("__getattr__", "__call__", "training")}
    return found | {("mha", "fastpath"): torch.backends.mha.get_fastpath_enabled(), ("torch", "grad"): torch.is_grad_enabled()}


class Net(nn.Module):
    """``during`` runs in the middle of ``forward``."""

    def __init__(self, during: Callable[[Tensor], Any] = lambda _: None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.during = during

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * torch.ones(x.shape[0], 1, 1, 1)
        self.during(y)
        made = self.last(y)
        assert isinstance(made, Tensor)
        return made


def raising(error: BaseException) -> Callable[[Tensor], Any]:
    def during(_: Tensor) -> None:
        raise error

    return during


X = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("error", [None, ValueError("the user's"), KeyboardInterrupt(), SystemExit(3)])
def test_every_name_is_put_back(error: BaseException | None) -> None:
    before = held()
    if error is None:
        fxprune.analyze(Net(), X)
    else:
        with pytest.raises(fxprune.FxPruneError if isinstance(error, Exception) else type(error)):
            fxprune.analyze(Net(raising(error)), X)
    assert held() == before


def test_names_are_replaced_meanwhile() -> None:
    """So that the comparison above is not one of nothing."""
    before = held()
    seen: queue.Queue[dict[tuple[str, str], Any]] = queue.Queue()  # what a plain list is given would be taken back
    fxprune.analyze(Net(lambda _: seen.put(held())), X)
    during = seen.get_nowait()
    changed = {name for name in before if during[name] is not before[name]}
    assert changed >= before.keys() - {("mha", "fastpath"), ("torch", "grad")}


def test_a_patch_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name's way back is known before it is replaced."""

    def broken(tracer: Any, original: Any) -> Any:
        raise RuntimeError("broken")

    before = held()
    monkeypatch.setattr("fxprune.passes.tracing.patching.PATCHES", (*PATCHES, Patch(builtins, "print", broken)))
    with pytest.raises(fxprune.FxPruneError):
        fxprune.analyze(Net(), X)
    assert held() == before


def test_analyses_in_threads_and_an_innocent_one() -> None:
    """Two analyses that overlap, and a thread that makes tensors and modules in the middle of both."""
    before = held()
    meet = threading.Barrier(2, timeout=30)
    wrong: list[str] = []
    results: list[Any] = []

    def make(_: Tensor) -> None:
        """In the middle of a trace: the innocent thread gets its turn, with every name replaced."""
        meet.wait()
        meet.wait()

    def innocent() -> None:
        for _ in range(4):  # two analyses of two graphs' worth of modes at most
            try:
                meet.wait()
            except threading.BrokenBarrierError:
                return
            layer = nn.Linear(2, 2)
            checks = {
                "zeros": type(torch.zeros(3)) is Tensor,
                "like": type(torch.zeros_like(torch.ones(2))) is Tensor,
                "parameters": [type(p) for _, p in layer.named_parameters()] == [nn.Parameter] * 2,
                "attribute": type(layer.weight) is nn.Parameter,
                "call": type(layer(torch.ones(1, 2))) is Tensor and layer(torch.ones(1, 2)).requires_grad,
                "training": layer.training and not layer.eval().training,
                "len": len(torch.ones(3)) == 3 and isinstance(torch.ones(1), Tensor) and callable(layer),
            }
            with torch.no_grad():
                checks["no_grad"] = not torch.is_grad_enabled()
            wrong.extend(name for name, ok in checks.items() if not ok)
            meet.wait()

    def analyse() -> None:
        try:
            results.append(fxprune.analyze(Net(make).eval(), X))
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            results.append(error)

    other = threading.Thread(target=innocent, daemon=True)
    analyses = [threading.Thread(target=analyse) for _ in range(2)]
    for thread in (other, *analyses):
        thread.start()
    for thread in analyses:
        thread.join(60)
    meet.abort()
    other.join(60)
    assert [len(getattr(r, "groups", ())) for r in results] == [3, 3], results
    assert not any(r.notes for r in results), [r.notes for r in results] or "another thread's blocks are nobody's notes"
    assert not wrong and held() == before


def test_an_analysis_within_a_trace_is_refused() -> None:
    before = held()
    with pytest.raises(fxprune.FxPruneError, match="analyses a model itself while it is traced"):
        fxprune.analyze(Net(lambda _: trace(nn.Linear(2, 2), torch.ones(1, 2), lambda _: True)), X)
    assert held() == before
    assert fxprune.analyze(Net(), X).groups, "the next one is served"


def test_no_patch_is_installed_twice() -> None:
    places = [(id(p.owner), p.name) for p in PATCHES]
    assert len(set(places)) == len(places)


class Fragile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 8:
            raise ValueError("not this width")
        return x


class Careful(nn.Module):
    """Catches what a submodule raises; what follows is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fragile, self.last = nn.Conv2d(3, 8, 1), Fragile(), nn.Conv2d(8, 4, 1)
        self.gain = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        try:
            y = self.fragile(y)
        except ValueError:
            y = y * self.gain
        made = self.last(y)
        assert isinstance(made, Tensor)
        return made


def test_a_caught_error_does_not_keep_its_module_at_work() -> None:
    traced = trace(Careful().eval(), X, lambda m: isinstance(m, nn.Conv2d))
    assert not traced.opaque
    assert {n.meta["owner"] for n in traced.graphs["eval"].nodes} == {""}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y.relu() if self.training else y


class ByType(nn.Module):
    """Looks at the classes of its children, as networks with a list of layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), Block(), nn.Conv2d(4, 4, 1), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x if type(layer) is Block and layer.__class__ is Block else layer(x)
        return x


@pytest.mark.parametrize("training", [False, True])
def test_modules_keep_their_classes(training: bool) -> None:
    model = ByType().train(training)
    slim = fxprune.compress(model, 0.0, X)
    for mode in (True, False):
        torch.testing.assert_close(slim.train(mode)(X), model.train(mode)(X))


class Masked(nn.Module):
    """As transformers does: who traces is not asked for the values of a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x: Any, mask: Any) -> Any:
        y = self.first(x)
        if isinstance(mask, torch.fx.Proxy) or not mask.all():
            y = y * mask
        return self.last(y)


def test_code_that_asks_for_proxies_is_told() -> None:
    graph = fxprune.analyze(Masked().eval(), (torch.randn(3, 10), torch.ones(3, 1)))
    assert not graph.traced.in_parts and any(group.prunable for group in graph.groups)
