"""What people do besides: cascades over splits, zeros concatenated, cells in loops, own autograd functions, checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d, Permute, SqueezeExcitation

from tests.passes.zoo.catalogue import Body, add, conv_bn, image, tokens, words


@add("res2net_cascade")
class Res2Net(Body):
    """Each part of a split is added to the result of the part before."""

    def build(self) -> None:
        self.layers = nn.ModuleList(conv_bn(4, 4) for _ in range(2))
        self.mixed = conv_bn(12, 12, 1)

    def mix(self, x: Tensor) -> Any:
        parts = torch.split(x, x.size(1) // 3, 1)
        done = [parts[0]]
        for part, layer in zip(parts[1:], self.layers, strict=True):
            done.append(layer(part + done[-1]))
        return self.mixed(torch.cat(done, 1)) + x


@add("option_a_zeros")
class OptionAZeros(Body):
    """The shortcut is widened by concatenating zeros."""

    width = 20

    def build(self) -> None:
        self.a = conv_bn(12, 20, stride=2)

    def mix(self, x: Tensor) -> Any:
        y = self.a(x)
        short = F.avg_pool2d(x, 2)
        zeros = torch.zeros(short.size(0), y.size(1) - short.size(1), short.size(2), short.size(3), device=x.device, dtype=x.dtype)
        return y + torch.cat([short, zeros], 1)


@add("option_a_mul")
class OptionAMul(Body):
    """The same by concatenating the shortcut with itself times zero."""

    width = 24

    def build(self) -> None:
        self.a = conv_bn(12, 24)

    def mix(self, x: Tensor) -> Any:
        return self.a(x) + torch.cat((x, x.mul(0)), 1)


@add("slice_in_place")
class SliceInPlace(Body):
    """``x[:, :5] += y``: a part of the channels goes with those that are added to it."""

    def build(self) -> None:
        self.a, self.b = conv_bn(12, 5), conv_bn(12, 9)
        self.c = nn.Conv2d(9, 12, 1)

    def mix(self, x: Tensor) -> Any:
        y = x * 1.0
        y[:, :5] += self.a(x)
        return self.c(self.b(y))


@add("lstm_cell", tokens())
class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.gru, self.head = nn.Linear(12, 9), nn.LSTMCell(9, 7), nn.GRUCell(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        h = c = x.new_zeros(x.size(0), 7)
        g = torch.zeros(x.size(0), 6)
        for i in range(x.size(1)):
            h, c = self.cell(x[:, i], (h, c))
            g = self.gru(h, g)
        return self.head(g)


@add("lstm_given_state", lambda: (torch.randn(5, 2, 4), torch.randn(1, 2, 6), torch.randn(1, 2, 6)))
class GivenState(nn.Module):
    """The user hands in the first state: hidden units stay, the layer in front does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.b, self.c = nn.Linear(4, 8), nn.LSTM(8, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, state = self.rnn(self.a(x), (h, c))
        return self.c(torch.relu(self.b(y))), state


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s * (1 + x * (1 - s)))


@add("autograd_function")
class AutogradFunction(Body):
    def build(self) -> None:
        self.a, self.b = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return self.b(Swish.apply(self.a(x)))


@add("checkpointed")
class Checkpointed(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 10)
        self.b = nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        if self.training:
            return self.b(checkpoint(self.a, x, use_reentrant=False))
        return self.b(self.a(x))


@add("frozen_batch_norm")
class FrozenNorm(Body):
    def build(self) -> None:
        self.a, self.n = nn.Conv2d(12, 12, 3), FrozenBatchNorm2d(12)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.n(self.a(x)))


@add("torchvision_pieces")
class TorchvisionPieces(Body):
    def build(self) -> None:
        self.se, self.permute, self.back, self.f = SqueezeExcitation(12, 4), Permute([0, 2, 3, 1]), Permute([0, 3, 1, 2]), nn.Linear(12, 12)

    def mix(self, x: Tensor) -> Any:
        return self.back(self.f(self.permute(self.se(x))))


@add("deformable")
class Deformable(Body):
    def build(self) -> None:
        self.offset, self.deform, self.b = nn.Conv2d(12, 18, 3, padding=1), DeformConv2d(12, 12, 3, padding=1), conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        return self.b(self.deform(x, self.offset(x)))


@add("padding_modes")
class PaddingModes(Body):
    def build(self) -> None:
        self.a = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(12, 12, 3, padding="same", padding_mode="circular", groups=12)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.b(F.relu(self.a(x))))


@add("pool_unpool")
class PoolUnpool(Body):
    def build(self) -> None:
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.a = conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        y, where = self.pool(self.a(x))
        return self.unpool(y, where)


@add("builtin_sum")
class BuiltinSum(Body):
    def build(self) -> None:
        self.branches = nn.ModuleList(conv_bn(12, 10, k) for k in (1, 3, 5))
        self.down = nn.Conv2d(10, 12, 1)
        self.gains = nn.ParameterList(nn.Parameter(torch.rand(1)) for _ in range(3))

    def mix(self, x: Tensor) -> Any:
        return self.down(sum(g * b(x) for g, b in zip(self.gains, self.branches, strict=True)))


@add("video_fold", image(2, 3, 3, 8, 8))
class VideoFold(nn.Module):
    """Frames are folded into the batch for the 2-D part, unfolded for the temporal one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t, self.b, self.head = conv_bn(3, 10), nn.Conv1d(10, 8, 3, padding=1), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        b, t, c, h, w = x.shape
        y = self.a(x.reshape(b * t, c, h, w)).mean((-1, -2))
        y = self.t(y.view(b, t, -1).transpose(1, 2)).permute(0, 2, 1)
        return self.head(F.relu(self.b(y))).mean(1)


@add("patch_merging")
class PatchMerging(Body):
    width = 16

    def build(self) -> None:
        self.norm, self.reduce = nn.BatchNorm2d(48), nn.Linear(48, 16, bias=False)

    def mix(self, x: Tensor) -> Any:
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[..., 1::2, 1::2, :]], -1)
        return self.reduce(self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@add("fourier_filter")
class FourierFilter(Body):
    """Spatial frequencies are weighted, channel by channel."""

    def build(self) -> None:
        self.a, self.filter = conv_bn(12, 12), nn.Parameter(torch.randn(12, 8, 5, 2))

    def mix(self, x: Tensor) -> Any:
        spectrum = torch.fft.rfft2(self.a(x), norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho")


@add("mixture_of_kernels", exact=False)
class DynamicConvolution(Body):
    """Kernels are mixed with weights computed from the input, one set per image (a grouped convolution over the batch)."""

    def build(self) -> None:
        self.route, self.kernels = nn.Linear(12, 3), nn.Parameter(torch.randn(3, 12, 12, 3, 3) * 0.1)

    def mix(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        mixed = torch.einsum("bk,koihw->boihw", self.route(x.mean((2, 3))).softmax(1), self.kernels).reshape(-1, 12, 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), mixed, padding=1, groups=b).view(b, 12, h, w)


@add("cosine_head")
class CosineHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.w = conv_bn(3, 10), nn.Linear(10, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Any:
        return F.linear(F.normalize(self.f(self.a(x).mean((2, 3))), dim=1), F.normalize(self.w, dim=1)) * 10


@add("module_dict")
class Routed(Body):
    def build(self) -> None:
        self.table = nn.ModuleDict({"one": conv_bn(12, 9), "two": conv_bn(9, 12)})
        self.order = ["one", "two"]

    def mix(self, x: Tensor) -> Any:
        for key in self.order:
            x = self.table[key](x)
        return x


@add("sequence_lengths", lambda: (torch.randint(0, 11, (2, 6)), torch.tensor([6, 4])))
class SequenceLengths(nn.Module):
    """A mean over the words that are there, by a mask made from lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.head = nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Any:
        mask = torch.arange(ids.size(1), device=ids.device)[None, :] < lengths[:, None]
        x = torch.tanh(self.a(self.e(ids))) * mask.unsqueeze(-1)
        return self.head(x.sum(1) / lengths.unsqueeze(-1).float())


@add("embedding_bag", words())
class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.EmbeddingBag(11, 10, mode="mean"), nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Any:
        return self.head(torch.relu(self.e(ids)))


@add("sorted_positions")
class SortedPositions(Body):
    """The largest responses of each channel (k-max pooling): positions are sorted, channels are not touched."""

    def build(self) -> None:
        self.a = nn.Linear(12 * 4, 12)

    def mix(self, x: Tensor) -> Any:
        top = x.flatten(2).topk(4, dim=-1).values
        return self.a(top.flatten(1))[:, :, None, None] + x


@add("autocast_block")
class AutocastBlock(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = x * 2
        return self.a(x) + y


@add("dict_of_branches")
class DictOfBranches(nn.Module):
    """A pyramid held in a dict that is walked in forward (FPN)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([conv_bn(3, 8), conv_bn(8, 10, stride=2), conv_bn(10, 12, stride=2)])
        self.inner = nn.ModuleList([nn.Conv2d(c, 6, 1) for c in (8, 10, 12)])
        self.layer, self.out = conv_bn(6, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        found: dict[str, Tensor] = {}
        for i, stage in enumerate(self.body):
            x = stage(x)
            found[f"p{i}"] = self.inner[i](x)
        names = list(found)
        last = found[names[-1]]
        results = {names[-1]: self.out(self.layer(last))}
        for name in reversed(names[:-1]):
            last = found[name] + F.interpolate(last, size=found[name].shape[-2:], mode="nearest")
            results[name] = self.out(self.layer(last))
        return results
