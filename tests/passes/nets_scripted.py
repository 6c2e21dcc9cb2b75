"""A scripted function in forward; apart, since TorchScript reads the source without postponed annotations."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.catalogue import Body, add


def _half_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) * 0.5


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    half_swish = torch.jit.script(_half_swish)


@add("scripted_function", locked=True)
class ScriptedFunction(Body):
    """TorchScript takes tensors alone, so the root cannot be traced, and its parts end in the network's own code."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return self.b(half_swish(self.a(x)))
