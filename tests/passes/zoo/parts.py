"""Parts and copies of tensors: splits, slices, indices, stacks, repeats, assignments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add, conv_bn


@add("split_uneven")
class SplitUneven(Body):
    width = 14

    def build(self) -> None:
        self.p, self.q, self.r = conv_bn(3, 6), conv_bn(4, 5, 1), conv_bn(5, 3)

    def mix(self, x: Tensor) -> Any:
        a, b, c = torch.split(x, [3, 4, 5], dim=1)
        return torch.cat([self.p(a), self.r(c), self.q(b)], 1)


@add("chunk")
class Chunk(Body):
    width = 17

    def build(self) -> None:
        self.a = conv_bn(12, 17)

    def mix(self, x: Tensor) -> Any:
        first, second = self.a(x).chunk(2, 1)  # 9 and 8
        return torch.cat([second, first * 2], 1)


@add("chunk_add")
class ChunkAdd(Body):
    width = 6

    def mix(self, x: Tensor) -> Any:
        a, b = x.chunk(2, dim=1)
        return a + b.relu()


@add("slices")
class Slices(Body):
    width = 5 + 6 + 4

    def mix(self, x: Tensor) -> Any:
        return torch.cat([x[:, :5], x[:, ::2], x[:, -4:]], 1)


@add("slice_add")
class SliceAdd(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 5)

    def mix(self, x: Tensor) -> Any:
        return torch.cat([x[:, :5] + self.a(x), x[:, 5:]], 1)


@add("narrow_select")
class NarrowSelect(Body):
    width = 7

    def mix(self, x: Tensor) -> Any:
        return torch.cat([x.narrow(1, 2, 6), x.select(1, 9).unsqueeze(1)], 1)


@add("list_index")
class ListIndex(Body):
    width = 6

    def mix(self, x: Tensor) -> Any:
        return x[:, [1, 3, 5, 7, 9, 11]]


@add("index_select_buffer")
class IndexSelect(Body):
    width = 5

    def build(self) -> None:
        self.register_buffer("picked", torch.tensor([11, 0, 4, 3, 8]))
        self.picked: Tensor

    def mix(self, x: Tensor) -> Any:
        return x.index_select(1, self.picked)


@add("stack_unbind")
class StackUnbind(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        pair = torch.stack([x, self.a(x)], dim=2)
        first, second = pair.unbind(2)
        return first - second


@add("stack_sum")
class StackSum(Body):
    """Selective kernel: branches are stacked, weighted and summed."""

    def build(self) -> None:
        self.a, self.b, self.w = conv_bn(12, 12), conv_bn(12, 12, 1), nn.Linear(12, 24)

    def mix(self, x: Tensor) -> Any:
        pair = torch.stack([self.a(x), self.b(x)], 1)
        weights = self.w(pair.sum(1).mean((2, 3))).view(-1, 2, 12).softmax(1)
        return (pair * weights[..., None, None]).sum(1)


@add("repeat_channels")
class RepeatChannels(Body):
    width = 24

    def mix(self, x: Tensor) -> Any:
        return x.repeat(1, 2, 1, 1)


@add("repeat_interleave_channels")
class RepeatInterleaveChannels(Body):
    width = 36

    def mix(self, x: Tensor) -> Any:
        return torch.repeat_interleave(x, 3, dim=1)


@add("unflatten")
class Unflatten(Body):
    width = 4

    def build(self) -> None:
        self.u = nn.Unflatten(1, (3, 4))

    def mix(self, x: Tensor) -> Any:
        return self.u(x).sum(1)


@add("maxout")
class Maxout(Body):
    width = 6

    def mix(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        return x.view(b, c // 2, 2, h, w).max(2).values


@add("setitem_space")
class SetitemSpace(Body):
    def mix(self, x: Tensor) -> Any:
        x = x.clone()
        x[:, :, 0, :] = 0
        x[..., 2:4] = x[..., 4:6] * 2
        return x


@add("setitem_channels")
class SetitemChannels(Body):
    """Some of the channels are set; they go like the others."""

    def mix(self, x: Tensor) -> Any:
        x = x.clone()
        x[:, 3:6] = 0.0
        return x
