"""Modules that are called in other ways than by their own forward: hooks, an overridden call, other weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.zoo.catalogue import add, tokens


class Between(nn.Module):
    """A layer in front of ``inner`` and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.inner, self.head = nn.Linear(12, 14), nn.Linear(14, 10), nn.Linear(10, 3)
        self.build()

    def build(self) -> None:
        """Change ``inner``."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.inner(F.relu(self.front(x))))


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2 + 1


def squared(module: nn.Module, args: Any) -> Any:
    return (args[0] ** 2,)


@add("hook_on_the_network", tokens())
class HookOnTheNetwork(Between):
    def build(self) -> None:
        self.register_forward_pre_hook(squared)
        self.register_forward_hook(doubled)


@add("hook_on_a_layer", tokens())
class HookOnALayer(Between):
    def build(self) -> None:
        self.inner.register_forward_pre_hook(squared)
        self.inner.register_forward_hook(doubled)


class Louder(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x).relu() * 3


@add("call_overridden", tokens())
class CallOverridden(Between):
    def build(self) -> None:
        self.inner = Louder(14, 10)


@add("called_with_other_weights", tokens())
class OtherWeights(Between):
    """A layer is run with weights that are computed of its own."""

    def build(self) -> None:
        self.gain = nn.Parameter(torch.randn(10, 1))

    def forward(self, x: Tensor) -> Any:
        weight = self.inner.weight * self.gain
        return self.head(torch.func.functional_call(self.inner, {"weight": weight}, (F.relu(self.front(x)),)))


@add("vmap_over_gains", tokens())
class VmapOverGains(Between):
    """The same small computation with three sets of weights; written out call by call."""

    def build(self) -> None:
        self.gains = nn.Parameter(torch.randn(3, 10))

    def forward(self, x: Tensor) -> Any:
        y = self.inner(F.relu(self.front(x)))
        first, second = torch.vmap(lambda gain, of: (torch.tanh(of * gain), of + gain), in_dims=(0, None), out_dims=(0, -1))(self.gains, y)
        return self.head(first.sum(0) + second.prod(-1))


@add("modules_made_in_forward", tokens())
class MadeInForward(Between):
    """Modules that are made on the spot, and one in a plain list; neither has a name in the network."""

    def build(self) -> None:
        self.outer = nn.Linear(14, 14)
        self.held = [nn.Sequential(nn.Tanh(), nn.Hardtanh())]

    def forward(self, x: Tensor) -> Any:
        y = nn.GELU()(self.front(x))
        y = self.held[0](self.outer(nn.Softmax(dim=1)(y))) + nn.Dropout(0.0)(y)
        return self.head(self.inner(y))


@add("length_of_a_tensor", tokens())
class LengthOfATensor(Between):
    """``len(x)`` is the batch, and stays it."""

    def build(self) -> None:
        self.token = nn.Parameter(torch.randn(14))

    def forward(self, x: Tensor) -> Any:
        y = torch.cat([self.token.expand(len(x), 1, -1), self.front(x)], 1)
        return self.head(self.inner(F.relu(y)))[:, 0]


@add("products_by_other_names", tokens())
class OtherProducts(Between):
    """tensordot, a Kronecker product of two small weights, distances to a codebook."""

    def build(self) -> None:
        self.left, self.right = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(7, 5))
        self.mixed, self.codes = nn.Parameter(torch.randn(15, 12) * 0.2), nn.Parameter(torch.randn(10, 12))

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.front(x)) @ torch.kron(self.left, self.right)
        y = torch.tensordot(torch.tanh(y), self.mixed, dims=([-1], [0]))
        return self.head(torch.exp(-torch.cdist(y, self.codes[None])))
