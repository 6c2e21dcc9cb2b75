"""Networks whose point is data movement: views, shuffles, pads, rolls, windows, and tensors made on the way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.zoo.catalogue import Body, add, conv_bn, image


@add("flatten_literal")
class FlattenLiteral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.f1, self.f2 = conv_bn(3, 10), nn.Linear(10 * 4 * 4, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(self.a(x), 2)
        return self.f2(F.relu(self.f1(x.view(-1, 10 * 4 * 4))))


@add("permute_flatten")
class PermuteFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.f = nn.Conv2d(3, 10, 3), nn.Linear(360, 4)

    def forward(self, x: Tensor) -> Any:
        return self.f(F.relu(self.a(x)).permute(0, 2, 3, 1).flatten(1))


@add("flatten_start")
class FlattenModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.flat, self.bn, self.f = nn.Conv2d(3, 6, 5), nn.Flatten(), nn.BatchNorm1d(96), nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Any:
        return self.f(F.relu(self.bn(self.flat(self.a(x)))))


@add("shuffle_view")
class ShuffleView(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 12, groups=3)

    def mix(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.a(x)


@add("shufflenet_units")
class ShuffleUnit(Body):
    def build(self) -> None:
        self.a, self.b = (nn.Sequential(conv_bn(6, 8, 1), conv_bn(8, 8, groups=8), conv_bn(8, 6, 1)) for _ in range(2))

    def mix(self, x: Tensor) -> Any:
        for branch in (self.a, self.b):
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, branch(right)), dim=1)
            b, c, h, w = x.size()
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)
        return x


@add("shuffle_module")
class ShuffleModule(Body):
    def build(self) -> None:
        self.shuffle, self.a = nn.ChannelShuffle(2), conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        return self.shuffle(self.a(x)) + x


@add("shuffle_buffer")
class ShuffleBuffer(Body):
    def build(self) -> None:
        self.register_buffer("order", torch.tensor([5, 0, 7, 1, 2, 11, 10, 3, 4, 9, 8, 6]))
        self.order: Tensor

    def mix(self, x: Tensor) -> Any:
        return x[:, self.order].relu()


@add("glu")
class Glu(Body):
    width = 7

    def build(self) -> None:
        self.a = nn.Conv2d(12, 14, 3)

    def mix(self, x: Tensor) -> Any:
        return F.glu(self.a(x), dim=1)


@add("gating")
class Gating(Body):
    width = 9

    def build(self) -> None:
        self.a, self.b, self.c = nn.Conv2d(12, 18, 1), nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.Conv2d(12, 9, 1)

    def mix(self, x: Tensor) -> Any:
        value, gate = self.a(x).chunk(2, 1)
        return self.c(x).tanh() * value * F.silu(self.b(gate))


@add("pixel_shuffle")
class PixelShuffle(Body):
    width = 5

    def build(self) -> None:
        self.a, self.shuffle = nn.Conv2d(12, 20, 1), nn.PixelShuffle(2)

    def mix(self, x: Tensor) -> Any:
        return self.shuffle(F.relu(self.a(x)))


@add("pixel_unshuffle")
class PixelUnshuffle(Body):
    width = 48

    def mix(self, x: Tensor) -> Any:
        return F.pixel_unshuffle(x, 2)


@add("space_to_depth_view")
class SpaceToDepth(Body):
    width = 48

    def mix(self, x: Tensor) -> Any:
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


@add("pad_channels")
class PadChannels(Body):
    width = 17

    def mix(self, x: Tensor) -> Any:
        return F.pad(x, (1, 1, 0, 0, 2, 3), value=0.5)


@add("crop_channels")
class CropChannels(Body):
    width = 9

    def mix(self, x: Tensor) -> Any:
        return F.pad(x, (0, 0, 0, 0, -2, -1))


@add("reflect_pad")
class ReflectPad(Body):
    def build(self) -> None:
        self.pad, self.a = nn.ReflectionPad2d(1), nn.Conv2d(12, 12, 3)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.a(self.pad(x)))


@add("roll_channels")
class RollChannels(Body):
    def mix(self, x: Tensor) -> Any:
        return torch.roll(x, 5, 1) + x.roll((2, -3), (2, 1)).relu()


@add("roll_alone")
class RollAlone(Body):
    def mix(self, x: Tensor) -> Any:
        return torch.roll(x, shifts=5, dims=1)


@add("flip_channels")
class FlipChannels(Body):
    def mix(self, x: Tensor) -> Any:
        return x.flip(1)


@add("temporal_shift", image(4, 3, 6, 6))
class TemporalShift(Body):
    """Part of the channels moves one frame on, part one frame back (frames are folded into the batch)."""

    def mix(self, x: Tensor) -> Any:
        nt, c, h, w = x.shape
        x = x.view(nt // 2, 2, c, h, w)
        a = F.pad(x[:, 1:, :3], (0, 0, 0, 0, 0, 0, 0, 1))
        b = F.pad(x[:, :-1, 3:6], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([a, b, x[:, :, 6:]], 2).view(nt, c, h, w)


@add("window_partition")
class WindowPartition(Body):
    def build(self) -> None:
        self.mlp = nn.Linear(12, 12)

    def mix(self, x: Tensor) -> Any:
        x = x.permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = torch.roll(x, (-2, -2), (1, 2))
        windows = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        windows = self.mlp(windows)
        x = windows.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return torch.roll(x, (2, 2), (1, 2)).permute(0, 3, 1, 2)


@add("unfold_fold")
class UnfoldFold(Body):
    def build(self) -> None:
        self.unfold, self.f = nn.Unfold(3, padding=1), nn.Linear(12 * 9, 12 * 4)

    def mix(self, x: Tensor) -> Any:
        columns = self.f(self.unfold(x).transpose(1, 2)).transpose(1, 2)
        return F.fold(columns, (9, 9), (2, 2))


@add("unfold_functional")
class UnfoldFunctional(Body):
    width = 48

    def mix(self, x: Tensor) -> Any:
        return F.unfold(x, 2, stride=2).view(x.shape[0], 48, 4, 4)


@add("unfold_method")
class UnfoldMethod(Body):
    width = 48

    def mix(self, x: Tensor) -> Any:
        x = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (b, c, 4, 4, 2, 2)
        return x.permute(0, 1, 4, 5, 2, 3).reshape(x.size(0), -1, x.size(2), x.size(3))


@add("where_masked_fill")
class WhereMaskedFill(Body):
    def build(self) -> None:
        self.a = conv_bn(12, 12)

    def mix(self, x: Tensor) -> Any:
        y = self.a(x)
        x = torch.where(x > y, x, y * 0.5)
        return x.masked_fill(y < 0.1, 0.0)


@add("interpolate_like", image(2, 3, 9, 9))
class InterpolateLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv_bn(3, 8), conv_bn(8, 10, stride=2), nn.Conv2d(10, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        b = F.interpolate(self.c(self.b(a)), size=a.shape[-2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.d(a + b), scale_factor=2.0)


@add("made_in_forward")
class MadeInForward(nn.Module):
    """Tensors made in forward from the shapes of others: zeros to add, coordinates to concatenate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 8), conv_bn(10, 9), nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        n, c, h, w = x.shape
        state = torch.zeros(n, c, h, w, device=x.device, dtype=x.dtype)
        rows = torch.arange(h, device=x.device, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w) / h
        columns = torch.linspace(0, 1, 8).view(1, 1, 1, 8).expand(n, 1, h, w)
        x = self.b(torch.cat([x + state, rows, columns], 1))
        return self.c(x * torch.ones_like(x) + x.new_zeros(x.size(1), 1, 1))


@add("broadcast_constants")
class BroadcastConstants(Body):
    """Numbers and tensors of one element meet channels."""

    def build(self) -> None:
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def mix(self, x: Tensor) -> Any:
        x = (x - 0.1) * self.gain / 3
        return x.clamp(min=-1, max=2) ** 2 + torch.tensor(0.25)


@add("outer_product")
class OuterProduct(nn.Module):
    """Bilinear pooling: every pair of channels meets, so the linear layer's inputs vary along two channel axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 5, 3), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        return self.f(torch.bmm(a, b.transpose(1, 2)).flatten(1) / 10)
