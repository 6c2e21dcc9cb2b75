"""A rule for an operation that fxprune does not know: without it the channels are locked and the reason is named, with it they can go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxprune


class Snake(nn.Module):
    """x + sin(a x)^2 / a, with one a for each channel (https://arxiv.org/abs/2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.example.snake(x, self.a)  # type: ignore[no-any-return]


@torch.library.custom_op("example::snake", mutates_args=())
def snake(x: Tensor, a: Tensor) -> Tensor:
    return x + (a * x).sin().square() / a


@snake.register_fake
def _(x: Tensor, a: Tensor) -> Tensor:
    return torch.empty_like(x)


model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Snake(16), nn.Conv2d(16, 8, 3)).eval()
example = torch.randn(1, 3, 12, 12)

first = fxprune.analyze(model, example).groups[0]
print(f"without a rule: {first.name}, prunable: {first.prunable} ({first.reason})")


@fxprune.register_op(torch.ops.example.snake)
def snake_rule(walk: Any, node: Any, x: Any, a: Any) -> Any:
    return walk.pointwise(node, x, a)  # element by element: channels stay where they are, and so do those of a


graph = fxprune.analyze(model, example)
print(f"with a rule: {graph.groups[0].name}, prunable: {graph.groups[0].prunable}, {graph.groups[0].size} units")
slim = fxprune.compress(graph, 0.5, example, verify=True)
print("kept of the activation's parameter:", tuple(slim.get_parameter("1.a").shape))
