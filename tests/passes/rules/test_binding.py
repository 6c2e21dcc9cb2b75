"""Every form of a call is the same call: by keyword, by NumPy's names, as a method, one by one or as a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from fxprune.passes.labels.values import Value
from fxprune.passes.rules import binding, registry
from tests.passes.helpers import assert_sound, prime

torch_: Any = torch  # its stubs do not know NumPy's names


def names(call: Callable[..., Any], *shapes: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of the first call that ``call`` makes, by name; tensors as "T"."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    for node, shape in zip(inputs, shapes, strict=True):
        node.meta["val"] = torch.empty(shape)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    node = call(*(fx.Proxy(node, tracer) for node in inputs)).node
    found = binding.form_of(node).arguments(node.args, node.kwargs)
    return {k: "T" if isinstance(v, fx.Node) else v for k, v in found.items()}


X = (2, 6, 5)
FORMS: list[tuple[dict[str, Any], list[Callable[[Any], Any]]]] = [
    (
        {"input": "T", "dim": 1},
        [lambda x: x.cumsum(1), lambda x: x.cumsum(axis=1), lambda x: torch_.cumsum(input=x, dim=1), lambda x: torch_.cumsum(x, axis=1)],
    ),
    ({"input": "T", "dim": 1, "unbiased": True}, [lambda x: x.std(1, True), lambda x: torch_.std(x, 1, unbiased=True)]),
    ({"input": "T", "unbiased": True}, [lambda x: x.std(True), lambda x: torch_.var(x, unbiased=True)]),
    ({"input": "T", "dim": 1, "keepdim": True}, [lambda x: x.sum(1, True), lambda x: x.mean(axis=1, keepdims=True)]),
    ({"input": "T", "size": (2, 30)}, [lambda x: x.view(2, 30), lambda x: x.view((2, 30)), lambda x: x.view(size=(2, 30))]),
    ({"input": "T", "shape": (2, 30)}, [lambda x: x.reshape(2, 30), lambda x: torch_.reshape(input=x, shape=(2, 30))]),
    ({"input": "T", "dims": (0, 2, 1)}, [lambda x: x.permute(0, 2, 1), lambda x: torch_.permute(x, (0, 2, 1))]),
    ({"input": "T", "dims": (1,)}, [lambda x: x.flip(1), lambda x: torch_.flip(dims=(1,), input=x)]),
    ({"input": "T"}, [lambda x: x.squeeze(), lambda x: torch_.squeeze(input=x)]),
    ({"input": "T", "dim": -1}, [lambda x: x.unsqueeze(-1), lambda x: torch_.unsqueeze(input=x, dim=-1)]),
    ({"input": "T", "min": 0.0, "max": 1.0}, [lambda x: x.clamp(0.0, 1.0), lambda x: torch_.clamp(x, max=1.0, min=0.0)]),
    ({"input": "T", "output_size": 2}, [lambda x: F.adaptive_avg_pool1d(x, 2), lambda x: F.adaptive_avg_pool1d(input=x, output_size=2)]),
    ({"input": "T", "kernel_size": 2}, [lambda x: F.max_pool1d(x, 2), lambda x: F.max_pool1d(input=x, kernel_size=2)]),
    (
        {"input": "T", "p": 0.5, "training": False},
        [lambda x: F.dropout(x, 0.5, False), lambda x: F.dropout(p=0.5, training=False, input=x)],
    ),
    ({"input": "T", "dim": 1}, [lambda x: x.softmax(1), lambda x: F.softmax(input=x, dim=1)]),
    ({"input": "T", "split_size": 2, "dim": 1}, [lambda x: x.split(2, 1), lambda x: x.split(split_size=2, dim=1)]),
]


DEFAULTS = {"inplace", "dtype", "_stacklevel", "stride", "padding", "dilation", "ceil_mode", "return_indices"}


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms_of_one_call(number: int) -> None:
    want, calls = FORMS[number]
    for call in calls:
        found = names(call, X)  # functions in Python record their defaults too
        assert {k: v for k, v in found.items() if k in want} == want and found.keys() - want.keys() <= DEFAULTS


def test_two_tensors() -> None:
    assert list(names(lambda x, y: torch_.bmm(input=x, mat2=y), X, (2, 5, 3))) == ["input", "mat2"]
    assert list(names(lambda x, y: torch_.add(x1=x, x2=y), X, X)) == ["input", "other"]
    assert list(names(lambda x, y: torch_.lerp(weight=0.5, end=y, input=x), X, X)) == ["input", "end", "weight"]


def test_a_rule_takes_what_it_names_and_the_rest_in_order() -> None:
    def rule(fixed: int, input: Any, other: Any, *, scale: int = 0, **rest: Any) -> tuple[Any, ...]:
        return fixed, input, other, scale, rest

    def several(fixed: int, first: Any, *others: Any) -> tuple[Any, ...]:
        return fixed, first, others

    assert binding.call(rule, (7,), {"input": 1, "mat2": 2, "scale": 3, "out_dtype": 4}) == (7, 1, 2, 3, {"out_dtype": 4})
    assert binding.call(rule, (7,), {"other": 2, "self_": 1}) == (7, 1, 2, 0, {})
    assert binding.call(several, (7,), {"args": (1, 2, 3)}) == (7, 1, (2, 3))
    with pytest.raises(TypeError):
        binding.call(lambda fixed, input: None, (7,), {"input": 1, "dim": 2})


def own(x: Tensor, how: int = 1) -> Tensor:
    return x * how


torch.fx.wrap("own")


def test_a_rule_of_the_user_gets_arguments_as_they_were_written() -> None:
    seen = []

    try:

        @fxprune.register_op(own)
        def rule(ctx: Any, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
            seen.append((len(args), kwargs))
            found: Value = ctx.pointwise(node, args[0], zero="first")
            return found

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.b(own(self.a(x), how=2))
                return y

        fxprune.analyze(Net(), torch.randn(2, 6))
    finally:
        registry.FUNCTIONS.pop(own, None)
    assert seen == [(1, {"how": 2})]


class Around(nn.Module):
    """A convolution, a function on its channels, and a convolution that reads as many as there are."""

    def __init__(self, call: Callable[[Any], Any], out: int = 16) -> None:
        super().__init__()
        self.a, self.call, self.b = nn.Conv2d(3, 16, 3, padding=1), call, nn.Conv2d(out, 4, 3, padding=1)
        self.index = nn.Buffer(torch.randperm(16), persistent=True) if hasattr(nn, "Buffer") else torch.randperm(16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.call(self.a(x))).mean((2, 3))
        return y


KEYWORDS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "narrow": (lambda y: torch_.cat([torch_.narrow(input=y, dim=1, start=8, length=8), y.narrow(dim=1, start=0, length=8)], axis=1), True),
    "roll": (lambda y: torch_.roll(input=y, dims=1, shifts=3), True),
    "pad": (lambda y: F.pad(input=y, pad=(1, 1, 1, 1, 2, 2), mode="constant")[:, 2:-2], True),
    "chunk": (lambda y: torch_.cat(tensors=torch_.chunk(chunks=2, input=y, dim=1)[::-1], dim=1), True),
    "split": (lambda y: torch_.cat(torch_.split(tensor=y, split_size_or_sections=[4, 12], dim=1), axis=1), True),
    "hsplit": (lambda y: torch_.cat(y.hsplit(4), 1), True),
    "unsafe_split": (lambda y: torch_.cat(y.unsafe_split(4, 1), 1), True),
    "permute": (lambda y: torch_.permute(dims=(0, 2, 3, 1), input=y).permute(dims=(0, 3, 1, 2)), True),
    "movedim": (lambda y: torch_.movedim(y, source=1, destination=-1).movedim(-1, 1), True),
    "unflatten": (lambda y: y.unflatten(dim=1, sizes=(4, 4)).flatten(start_dim=1, end_dim=2), True),
    "reshape": (lambda y: torch_.reshape(shape=(y.shape[0], 16, -1), input=y).reshape(y.shape), True),
    "expand": (lambda y: y * torch_.ones(1).expand(size=(y.shape[0], 16, 1, 1)), True),
    "repeat": (lambda y: y + y.mean((2, 3), keepdim=True).repeat(repeats=(1, 1, 8, 8)), True),
    "repeat_interleave": (lambda y: torch_.repeat_interleave(repeats=2, input=y, dim=1)[:, ::2], True),
    "index_select": (lambda y: torch_.index_select(index=torch_.arange(15, -1, -1), dim=1, input=y), True),
    "select": (lambda y: y + torch_.select(input=y, dim=2, index=0)[:, :, None], True),
    "transpose": (lambda y: torch_.transpose(dim0=1, dim1=2, input=y).transpose(dim0=2, dim1=1), True),
    "linear": (lambda y: F.linear(weight=torch_.eye(8), input=y), True),
    "einsum": (lambda y: torch_.einsum("bchw,bc->bchw", y, y.mean(axis=(2, 3))), True),
    "where": (lambda y: torch_.where(input=y, other=0.0, condition=y > 0), True),
    "lerp": (lambda y: torch_.lerp(weight=0.5, end=y.relu(), input=y), True),
    "clamp": (lambda y: torch_.clamp(max=1.0, input=y, min=-1.0), True),
    "max": (lambda y: torch_.max(input=y, other=y.relu()), True),
    "amax": (lambda y: y * y.amax(axis=(2, 3), keepdims=True), True),
    "std": (lambda y: y * y.flatten(2).std(2, True)[..., None, None], True),
    "norm": (lambda y: y * torch_.norm(input=y, p=2, dim=(2, 3), keepdim=True), True),
    "normalize": (lambda y: F.normalize(input=y, dim=1), True),
    "glu": (lambda y: torch_.cat([F.glu(input=y, dim=1)] * 2, dim=1), True),
    "interpolate": (lambda y: F.interpolate(scale_factor=2, input=y, mode="nearest"), True),
    "pool": (lambda y: F.max_pool2d(kernel_size=2, input=y), True),
    "softmax": (lambda y: F.softmax(input=y, dim=2), True),
    "layer_norm": (lambda y: F.layer_norm(normalized_shape=(16,), input=y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), False),
    "group_norm": (lambda y: F.group_norm(num_groups=4, input=y), False),
    "attention": (
        lambda y: F.scaled_dot_product_attention(value=y.flatten(2).mT, key=y.flatten(2).mT, query=y.flatten(2).mT, scale=0.25).mT.reshape(
            y.shape
        ),
        True,
    ),
    "out": (lambda y: torch_.mul(y.detach(), 2.0, out=torch_.empty(y.shape)), True),
    "numel": (lambda y: y / (y.numel() / y.shape[0]) + y / (torch_.numel(input=y[:, :3]) / y.shape[0]), True),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_are_sound(name: str) -> None:
    call, exact = KEYWORDS[name]
    torch.manual_seed(0)
    model, inputs = Around(call), (torch.randn(2, 3, 8, 8),)
    graph = assert_sound(prime(model, inputs), inputs, exact=False, seed=3)
    channels = [g for g in graph.groups if g.prunable and g.name.startswith("a")]
    assert channels and exact == (not any(g.notes for g in channels)), [(g.name, g.size, g.notes, g.reason) for g in graph.groups]
