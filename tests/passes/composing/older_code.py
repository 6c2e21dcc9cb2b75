"""Blocks in the manner of older code: Variable, ``x.new``, casts by name, lists that a module changes, einsum in its shorter forms, sizes
and strides kept in tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable

from tests.passes.composing.blocks import Block, Made, block


@block
def before_04(c: int, s: int, v: int) -> Made:
    """Tensors made and cast as before torch 0.4."""

    def run(x: Tensor, f: nn.Module) -> Any:
        y: Any = f(x)
        if v == 0:
            y = y + Variable(torch.arange(0, y.size(3)).view(1, 1, 1, -1).repeat(y.size(0), 1, y.size(2), 1).float())
        elif v == 1:
            y = y * Variable(y.data.new(y.size(0), y.size(1), 1, 1).fill_(2))
        elif v == 2:
            y = y + torch.Tensor(y.size(0), 1, y.size(2), 1).fill_(0.5) + torch.FloatTensor(y.size()).zero_()
        elif v == 3:
            y = y * (torch.Tensor([y.size(2), y.size(3)]) + torch.LongTensor([y.size(3), 1]).float()).mean()
        elif v == 4:
            y = y * (y > 0).type(torch.FloatTensor).type_as(y) + y.new([y.size(2)])
        elif v == 5:
            y = y + y.new(1, y.size(1), 1, 1).zero_() + (y > 1).type(y.type())
        else:
            y = y + torch.zeros(y.size(0), 5, 1, y.size(3), requires_grad=False) * y.new_ones(y.shape, requires_grad=False)
        return y

    return Block(run, nn.Conv2d(c, 5, 1)), 5, s


class Changes(nn.Module):
    """Takes a list or a dictionary and leaves another one behind."""

    def __init__(self, c: int, kind: int) -> None:
        super().__init__()
        self.conv, self.kind = nn.Conv2d(c, c, 3, padding=1), kind

    def forward(self, given: Any) -> Any:
        if self.kind == 0:
            given.append(self.conv(given[0]))
            return given[-1] * 0.5
        if self.kind == 1:
            return self.conv(given.pop(0)) + given[0]
        if self.kind == 2:
            given[0] = self.conv(given[1])
            return given[0].relu()
        if self.kind == 3:
            given.reverse()
            return self.conv(given[0])
        if self.kind == 4:
            given["made"] = self.conv(given["a"])
            return given.pop("b")
        if self.kind == 5:
            given.update(b=self.conv(given["a"]))
            return given["b"].relu()
        del given["a"]
        return self.conv(given["b"])


@block
def changed_by_a_module(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: nn.Module, g: nn.Module, changes: nn.Module) -> Any:
        given: Any = [f(x), g(x)] if v < 4 else {"a": f(x), "b": g(x)}
        y = changes(given)
        for one in given if v < 4 else given.values():
            y = y + one
        return y

    return Block(run, nn.Conv2d(c, 6, 1), nn.Conv2d(c, 6, 1), Changes(6, v)), 6, s


@block
def einsums(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: nn.Module, square: Any) -> Any:
        y, w = f(x), square.weight
        if v == 0:
            return torch.einsum("bchw,cc->bchw", y, w)
        if v == 1:
            return torch.einsum("b...c,cd", y.movedim(1, -1), w).permute(2, 3, 0, 1)  # gives (..., b, d)
        if v == 2:
            return torch.einsum(y, [0, 4, 1, 2], w, [4, 7], [0, 7, 1, 2])
        if v == 3:
            return torch.einsum("bcchw->bchw", y[:, :, None] * y[:, None])
        if v == 4:
            return torch.einsum("...chw,oc->...ohw", [y, w])
        if v == 5:
            return y * torch.einsum("ii", w)
        return torch.einsum("bchw,bdhw->bcd", y, y)[:, :, :1, None] + y

    return Block(run, nn.Conv2d(c, 6, 1), nn.Linear(6, 6)), 6, s


@block
def sizes_in_tensors(c: int, s: int, v: int) -> Made:
    def run(x: Tensor, f: nn.Module) -> Any:
        y = f(x)
        if v % 4 == 0:
            height, width = (int(n) for n in torch.tensor(y.shape[2:]))
            return y.reshape(y.shape[0], -1, height * width).view(y.size(0), y.size(1), height, width)
        if v % 4 == 1:
            return y / torch.tensor([y.shape[2], y.shape[3]]).prod().sqrt()
        if v % 4 == 2:
            y = y.contiguous()
            return torch.as_strided(y, y.size(), y.stride())
        ends = torch.tensor([y.size(1) // 2, y.size(2)])
        return y[:, :, : ends[1]] * F.softplus(y)

    return Block(run, nn.Conv2d(c, 6, 1)), 6, s
