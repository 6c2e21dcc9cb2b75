"""Torch's own samples of its operations, each on channels of a small network: what can be pruned is pruned soundly, the rest is locked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from tests.passes.helpers import SPARSITIES, TOLERANCE, gap, zeroed

# Their results are random, even those that torch's samples give a seed of their own; jiterator needs a GPU.
RANDOM = (
    "rand",
    "multinomial",
    "bernoulli",
    "dropout",
    "empty",
    "svd",
    "normal",
    "cauchy",
    "exponential",
    "geometric",
    "uniform",
    "pca",
    "rrelu",
    "fractional",
    "jiterator",
)
# Operations that went wrong once -> whether there is a sample whose channels can be pruned and compared with zeroing, by the form of the
# call: f(unction), m(ethod), i(n place). A form that is missing has no sample that fits a network.
ONCE_WRONG = {
    "cdist": {"f": True},
    "nn.functional.cosine_similarity": {"f": True},
    "nn.functional.pairwise_distance": {"f": True},
    "linalg.vecdot": {"f": True},
    "diff": {"f": True, "m": True},
    "norm": {"f": True, "m": True},
    "linalg.norm": {"f": True},
    "masked.norm": {"f": True},
    "diagonal": {"f": False, "m": False},
    "linalg.diagonal": {"f": False},
    "narrow": {"f": True, "m": True},
    "tensor_split": {"f": True, "m": True},
    "index_put": {"f": True, "m": True, "i": True},
    "unfold_copy": {"f": True},
    "unfold": {"f": True, "m": True},
    "nn.functional.pixel_shuffle": {"f": True},
    "nn.functional.pixel_unshuffle": {"f": False},
    "nn.functional.binary_cross_entropy_with_logits": {"f": False},
    "squeeze": {"f": True, "m": True, "i": True},
    "gather": {"f": False, "m": False},
    "nn.functional.linear_cross_entropy": {"f": False},
}


class Around(nn.Module):
    """A linear layer, the operation on a tensor of the sample's shape whose ``axis`` carries its channels, and linear layers after it."""

    def __init__(self, call: Callable[..., Any], first: Tensor, axis: int, args: Any, kwargs: Any, held: bool) -> None:
        super().__init__()
        self.call, self.held = call, held
        self.others = nn.ParameterList()
        self.args, self.kwargs = self._taken(args), self._taken(kwargs)
        self.gain = nn.Parameter(first.detach().clone())
        self.layer = nn.Linear(6, first.shape[axis])
        self.form = [n if a == axis else 1 for a, n in enumerate(first.shape)]
        self.heads = nn.ModuleList()

    def _taken(self, nested: Any) -> Any:
        """The arguments, with parameters in place of the tensors in them where those are to be held."""
        if self.held and isinstance(nested, Tensor) and nested.is_floating_point() and nested.ndim:
            self.others.append(nn.Parameter(nested.detach().clone(), requires_grad=False))
            return Held(len(self.others) - 1)
        return self._each(nested, self._taken)

    def _given(self, nested: Any) -> Any:
        return self.others[nested.number] if isinstance(nested, Held) else self._each(nested, self._given)

    def _each(self, nested: Any, change: Callable[[Any], Any]) -> Any:
        if isinstance(nested, dict):
            return {k: change(v) for k, v in nested.items()}
        return type(nested)(change(v) for v in nested) if type(nested) in (tuple, list) else nested

    def results(self, x: Any) -> list[Any]:
        y = self.gain * self.layer(x).mean(0).view(self.form)
        found = list(_flat(self.call(y, *self._given(self.args), **self._given(self.kwargs))))
        return [t for t in found if t.is_floating_point() and t.numel()]

    def forward(self, x: Tensor) -> Any:
        return sum(head(y.reshape(1, -1)) for head, y in zip(self.heads, self.results(x), strict=True))


class Held:
    def __init__(self, number: int) -> None:
        self.number = number


def _flat(nested: Any) -> Iterator[Any]:
    if isinstance(nested, (tuple, list)):
        for part in nested:
            yield from _flat(part)
    elif hasattr(nested, "is_floating_point"):
        yield nested


def database() -> list[Any]:
    found = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    return [op for op in found.op_db if not any(word in op.name for word in RANDOM) and op.supports_dtype(torch.float32, "cpu")]


def way(op: Any, how: str) -> Callable[..., Any] | None:
    """The operation as a function, as a method, or in place on a copy that is returned too."""
    if how in ("function", "held"):
        return op.op  # type: ignore[no-any-return]
    variant = op.method_variant if how == "method" else op.inplace_variant
    name = getattr(variant, "__name__", None) or getattr(getattr(variant, "func", None), "__name__", None)
    if name is None:
        return None
    if how == "method":
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)

    def in_place(x: Any, *args: Any, **kwargs: Any) -> Any:
        x = x.clone()
        return getattr(x, name)(*args, **kwargs), x

    return in_place


def networks(op: Any, how: str, most: int) -> Iterator[tuple[Around, Tensor]]:
    """Networks around ``most`` of the operation's samples, on every axis of three channels or more; none that fail themselves."""
    call = way(op, how)
    samples = list(itertools.islice(op.sample_inputs("cpu", torch.float32), 60)) if call is not None else []
    random.Random(0).shuffle(samples)
    made = 0
    for sample in samples:
        first = sample.input
        if made >= most or not isinstance(first, Tensor) or not first.is_floating_point() or not first.numel():
            continue
        for axis in (a for a in range(first.ndim) if first.shape[a] >= 3):
            torch.manual_seed(0)
            x = torch.randn(2, 6)
            model = Around(call, first, axis, sample.args, sample.kwargs, how == "held").eval()  # type: ignore[arg-type]
            try:
                model.heads.extend(nn.Linear(y.numel(), 3) for y in model.results(x))
                want = model(x)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
                continue
            drops = "dropout" in str(sample.kwargs) or "attention" in op.name and sample.kwargs.get("training")
            if drops or not isinstance(want, Tensor) or not torch.isfinite(want).all():
                continue
            made += 1
            yield model, x


def check(model: Around, x: Tensor) -> bool:
    """Whether the operation's channels can be pruned and compared with zeroing; then that it is right, and in any case that it runs."""
    try:
        graph = fxprune.analyze(model, x)
    except TraceError:
        return False
    exact = [g.name for g in graph.groups if g.prunable and not g.notes]
    for seed in range(2 if exact else 0):
        draw = random.Random(seed)
        slim = fxprune.compress(model, {name: draw.choice(SPARSITIES) for name in exact}, x)
        with torch.no_grad():
            want = zeroed(model, fxprune.record(slim).kept)(x)
            assert not torch.isfinite(want).all() or gap(want, slim(x)) < TOLERANCE, (
                model.gain.shape,
                model.form,
                model.args,
                model.kwargs,
            )
    with torch.no_grad():
        fxprune.compress(model, {g.name: 0.5 for g in graph.groups if g.prunable}, x)(x)
        assert torch.equal(fxprune.compress(model, 0.0, x)(x), model(x))
    return bool(exact)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONCE_WRONG)
def test_operations_that_went_wrong_once(name: str) -> None:
    variants = [op for op in database() if op.name == name]
    forms = {"f": "function", "m": "method", "i": "in_place", "held": "held"}
    checked = {form: [check(model, x) for op in variants for model, x in networks(op, how, 4)] for form, how in forms.items()}
    found = {form: any(exact) for form, exact in checked.items() if exact}
    assert found.pop("held") == found["f"] and found == ONCE_WRONG[name]


def module_networks(info: Any) -> Iterator[tuple[Around, Tensor]]:
    """Networks around torch's samples of a module type."""
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    for sample in samples[:14]:
        if sample.forward_input is None or not sample.forward_input.args:
            continue
        first, *others = sample.forward_input.args
        if not isinstance(first, Tensor) or not first.is_floating_point():
            continue
        for axis in (a for a in range(first.ndim) if first.shape[a] >= 3):
            torch.manual_seed(0)
            module = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            x = torch.randn(2, 6)
            model = Around(module, first, axis, tuple(others), sample.forward_input.kwargs, False).eval()
            try:
                model.heads.extend(nn.Linear(y.numel(), 3) for y in model.results(x))
                want = model(x)
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue
            if isinstance(want, Tensor) and torch.isfinite(want).all():
                yield model, x


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # it rounds otherwise than the operations it stands for
    found = pytest.importorskip("torch.testing._internal.common_modules")
    exact = [check(model, x) for info in found.module_db for model, x in module_networks(info)]
    assert sum(exact) > len(exact) / 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["function", "held", "method", "in_place"])
def test_all_operations(how: str) -> None:
    exact = [check(model, x) for op in database() for model, x in networks(op, how, 8)]
    assert sum(exact) > len(exact) / 4
