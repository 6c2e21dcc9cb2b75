"""``repeat_interleave`` with the length of its result given beside the repeats, as diffusers writes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 8, 1), nn.Conv1d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        made = self.last(y.repeat_interleave(2, dim=1, output_size=y.shape[1] * 2))
        assert isinstance(made, Tensor)
        return made


class Literal(Interleaved):
    def forward(self, x: Tensor) -> Tensor:
        made = self.last(torch.repeat_interleave(self.first(x), 2, dim=1, output_size=16))
        assert isinstance(made, Tensor)
        return made


def test_the_length_of_the_result_is_that_of_what_is_left() -> None:
    for kind in (Interleaved, Literal):
        torch.manual_seed(0)
        slim = fxprune.compress(kind().eval(), 0.5, torch.randn(2, 3, 5), verify=True)
        assert slim.get_parameter("last.weight").shape == (4, 8, 1)
        assert slim(torch.randn(3, 3, 7)).shape == (3, 4, 7)
