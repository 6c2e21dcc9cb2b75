"""What is computed by kinds of reasons rather than their words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune
from fxprune.allocation.prices import output_channels
from fxprune.passes.labels.values import Value


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.gain, self.table = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.gain * self.a(x)) @ self.b(x).transpose(0, 1) @ (self.a(x) @ self.table.exp())
        return out


def test_an_activation_scaled_by_a_parameter_is_no_weight() -> None:
    walk = fxprune.analyze(Gained(), torch.randn(4, 6))._walk
    found = {node.name: value for node, value in walk.env["eval"].items() if isinstance(value, Value)}
    assert walk.is_weight(found["gain"]) and walk.is_weight(found["exp"])
    assert not walk.is_weight(found["mul"]) and not walk.is_weight(found["matmul"])


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


class InParts(nn.Module):
    """Its root branches on values, so that the body is traced by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.detach().sum()) < 1e9 else x.new_zeros(len(x), 5)


def test_outputs_are_not_counted_as_fixed_however_the_model_was_traced() -> None:
    x = torch.randn(3, 6)
    whole, parts = fxprune.analyze(Body(), x), fxprune.analyze(InParts(), x)
    assert list(parts.traced.parts) == ["body"]
    assert output_channels(whole)[1] == output_channels(parts)[1] == 0
