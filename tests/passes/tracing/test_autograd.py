"""Functions with a backward of their own: the slim module trains as the original does."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune
from fxprune.passes.tracing.autograd import AutogradCall
from tests.passes.helpers import zeroed


class Rounded(torch.autograd.Function):
    """A straight-through estimator: its own backward is all the gradient there is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return torch.round(x * scale) / scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 3), None


class Reversed(torch.autograd.Function):
    """Gradient reversal, by the newer form with a ``setup_context``; two results."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y, x + y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return -a * y - b, -a * x - b


class Masked(torch.autograd.Function):
    """As DeBERTa's softmax: it makes a tensor of a number, and writes into what the softmax would keep for its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        made = torch.softmax(x.masked_fill(mask, torch.tensor(torch.finfo(x.dtype).min)), 0).masked_fill_(mask, 0)
        ctx.save_for_backward(made)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (made,) = ctx.saved_tensors
        return made * (gradient - (gradient * made).sum(0)), None


class Mirrored(torch.autograd.Function):
    """The number of channels stands in the code, so the call cannot stay when they go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1, 2, 6).flip(1).reshape(-1, 12)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.view(-1, 2, 6).flip(1).reshape(-1, 12)


class Doubled(torch.autograd.Function):
    """It works in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return 3 * gradient


class Net(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self.first(x)))


def rounded(x: Tensor) -> Any:
    return Rounded.apply(x, 4.0)


def reversed_(x: Tensor) -> Any:
    a, b = Reversed.apply(torch.tanh(x), x)
    return a - b


def doubled(x: Tensor) -> Any:
    y = x + 1
    Doubled.apply(y)
    return y


def masked(x: Tensor) -> Any:
    return Masked.apply(x, torch.zeros_like(x[:, :1]) > torch.arange(len(x))[:, None] - 0.5)


def mirrored(x: Tensor) -> Any:
    return Mirrored.apply(x)


def recomputed(x: Tensor) -> Any:
    return checkpoint(torch.sigmoid, x, use_reentrant=True)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Reversible(torch.autograd.Function):
    """As reversible networks have it: layers and their keywords are arguments, and the code writes into these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[nn.Module], keywords: dict[str, Any]) -> Tensor:
        for layer in layers:
            keywords["kept"] = True
            x = x + layer(x) * keywords.pop("scale", 1.0)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise NotImplementedError


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(5, 12), nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)]), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(Reversible.apply(self.first(x), list(self.layers), {"scale": x.mean()}))
        assert isinstance(made, Tensor)
        return made


def test_arguments_that_the_code_writes_into() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 5)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("first.weight").shape == (6, 5)
    (note,) = fxprune.record(slim).notes
    assert "the forward of Reversible without its backward" in note


class Again(torch.autograd.Function):
    """Computes without gradients and, in its backward, the same once more with them, in blocks that change nothing here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Any:
        ctx.layer, ctx.x = layer, x
        with torch.no_grad():
            y = layer(x).view(-1, 12)
        with torch.enable_grad():
            return torch.tanh(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            torch.autograd.backward(torch.tanh(ctx.layer(x)), gradient)
        return x.grad, None


class Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        y = Again.apply(self.first(x), self.layer)
        with torch.no_grad():
            scale = self.first(x).sigmoid()
        return self.last(y * scale)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_blocks_without_gradients_in_a_forward_whose_backward_is_lost_keep_the_gradient(sparsity: float) -> None:
    torch.manual_seed(0)
    model, x = Recomputing().eval(), torch.randn(4, 5)
    slim = fxprune.compress(model, sparsity, x, verify=True)
    (note,) = fxprune.record(slim).notes
    assert "the forward of Again without its backward" in note
    kept = fxprune.record(slim).kept
    wanted, found = gradients(zeroed(model, kept), x), gradients(slim, x)
    assert wanted.keys() == found.keys() == dict(slim.named_parameters()).keys()
    for name, gradient in wanted.items():
        for dim, index in kept.get(name, {}).items():
            gradient = gradient.index_select(dim, torch.as_tensor(index))
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("middle", [rounded, reversed_, doubled, masked])
def test_gradients_are_those_of_its_own_backward(middle: Any, sparsity: float) -> None:
    torch.manual_seed(0)
    model, x = Net(middle).eval(), torch.randn(4, 5)
    slim = fxprune.compress(model, sparsity, x, verify=True)
    kept = fxprune.record(slim).kept
    assert len(kept) == (3 if sparsity else 0)
    wanted = gradients(zeroed(model, kept), x)
    for name, found in gradients(slim, x).items():
        want = wanted[name]
        for dim, indices in kept.get(name, {}).items():
            want = want.index_select(dim, indices)
        torch.testing.assert_close(found, want)
    assert not fxprune.record(slim).notes


def test_copies_pickles_and_compiles() -> None:
    model, x = Net(rounded).eval(), torch.randn(4, 5)
    slim = fxprune.compress(model, 0.5, x)
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim)), fxprune.compress(slim, 0.0, x)):
        assert gradients(twin, x)["first.weight"].count_nonzero()
        assert torch.equal(twin(x), slim(x))


def test_one_that_depends_on_channels_is_traced_into_and_says_so() -> None:
    model, x = Net(mirrored).eval(), torch.randn(4, 5)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert fxprune.record(slim).removed_units
    (note,) = fxprune.record(slim).notes
    assert "the forward of Mirrored without its backward" in note and "test_autograd.py" in note


def test_reentrant_checkpoints_train() -> None:
    torch.manual_seed(0)
    model, x = Net(recomputed).train(), torch.randn(4, 5)
    slim = fxprune.compress(model, 0.0, x)
    wanted = gradients(model, x)
    assert wanted["first.weight"].count_nonzero()
    for name, found in gradients(slim, x).items():
        torch.testing.assert_close(found, wanted[name])


def test_a_function_has_one_call_target() -> None:
    """torch 2.6 refuses to print a graph that has two targets of one name."""
    target = AutogradCall(Rounded)
    assert target is AutogradCall(Rounded) is copy.deepcopy(target) is pickle.loads(pickle.dumps(target))
    assert target is not AutogradCall(Reversed)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


class StraightBySetup(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


straight, straight_by_setup = Straight.apply, StraightBySetup.apply
TABLE = {"straight": Straight.apply}


@pytest.mark.parametrize("how", ["global", "attribute", "partial", "table", "setup", "direct"])
def test_apply_under_another_name_keeps_its_backward(how: str) -> None:
    """As torch's own documentation has it: ``linear = LinearFunction.apply``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.run, self.part = nn.Linear(8, 16), nn.Linear(16, 4), Straight.apply, functools.partial(Straight.apply)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            if how == "setup":
                return self.b(straight_by_setup(y))
            if how == "direct":
                return self.b(Straight.forward(None, y))  # what it computes, and no backward of its own
            run = {"global": straight, "attribute": self.run, "partial": self.part, "table": TABLE["straight"]}[how]
            return self.b(run(y))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 8) * 3
    slim = fxprune.compress(model, 0.5, x, verify=True)
    slim(x).square().sum().backward()
    gradient = slim.get_parameter("a.weight").grad
    assert gradient is not None and (float(gradient.norm()) == 0) == (how == "direct")
    model(x).square().sum().backward()
    assert model.a.weight.grad is not None and (float(model.a.weight.grad.norm()) == 0) == (how == "direct"), "it is as it was"
