"""Modules and tensors of the user's that are called what a graph module calls something of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import UnsupportedError


class Named(nn.Module):
    def __init__(self, name: str, is_module: bool) -> None:
        super().__init__()
        self.first, self.last, self.name = nn.Linear(4, 16), nn.Linear(16, 3), name
        if is_module:
            self.add_module(name, nn.Linear(16, 16))
        else:
            self.register_parameter(name, nn.Parameter(torch.randn(16)))

    def forward(self, x: Tensor) -> Tensor:
        given, y = getattr(self, self.name), self.first(x).relu()
        made = self.last(given(y) if isinstance(given, nn.Module) else y * given)
        assert isinstance(made, Tensor)
        return made


@pytest.mark.parametrize("is_module", [True, False])
@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile", "detached"])
def test_they_are_refused_by_name(name: str, is_module: bool) -> None:
    model, x = Named(name, is_module).eval(), torch.randn(2, 4)
    with pytest.raises(UnsupportedError, match=f"modules or tensors '{name}', which torch.fx.GraphModule has.*keep_class=True"):
        fxprune.compress(model, 0.5, x)
    slim = fxprune.compress(model, 0.5, x, keep_class=True, verify=True)
    assert slim.get_parameter("first.weight").shape == (8, 4)
