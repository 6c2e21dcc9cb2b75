"""Scripted functions in forward; apart, since TorchScript reads the source without postponed annotations."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add


def _half_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) * 0.5


def _gated(x: Tensor, n: int) -> Tensor:
    if n > 0:
        a, b = x[:, :n], x[:, n:]
    else:
        a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    half_swish, gated = torch.jit.script(_half_swish), torch.jit.script(_gated)


@add("scripted_function")
class ScriptedFunction(Body):
    """TorchScript takes tensors alone; what is traced is the Python function that was scripted."""

    def build(self) -> None:
        self.a, self.b, self.c = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 14, 1), nn.Conv2d(7, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return self.c(gated(self.b(half_swish(self.a(x))), 7))
