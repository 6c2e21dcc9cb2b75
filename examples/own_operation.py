"""A rule for an operation that fxprune does not know: without it the channels are locked and the reason is named, with it they can go."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

import fxprune


@torch.library.custom_op("example::ripple", mutates_args=())
def ripple(x: Tensor, a: Tensor) -> Tensor:
    """x + a sin(x)^2, with one a for each channel."""
    return x + a * x.sin().square()


@ripple.register_fake
def ripple_shape(x: Tensor, a: Tensor) -> Tensor:
    return torch.empty_like(x)


class Ripple(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.example.ripple(x, self.a)  # type: ignore[no-any-return]


layers = {"stem": nn.Conv2d(3, 16, 3, padding=1), "ripple": Ripple(16), "head": nn.Conv2d(16, 8, 3)}
model = nn.Sequential(OrderedDict(layers)).eval()
example = torch.randn(1, 3, 12, 12)

first = fxprune.analyze(model, example).groups[0]
print(f"without a rule: {first.name}, prunable: {first.prunable} ({first.reason})")


@fxprune.register_op(torch.ops.example.ripple)
def ripple_rule(ctx: Any, node: Any, x: Any, a: Any) -> Any:
    return ctx.pointwise(node, x, a)  # element by element: channels stay where they are, and so do those of a


graph = fxprune.analyze(model, example)
print(f"with a rule: {graph.groups[0].name}, prunable: {graph.groups[0].prunable}, {graph.groups[0].size} units")
slim = fxprune.compress(graph, 0.5, example, verify=True)
print("kept of the activation's parameter:", tuple(slim.get_parameter("ripple.a").shape))
