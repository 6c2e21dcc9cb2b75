"""Convolutional networks: residual, concatenated, grouped, transposed, shared, functional."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.quiet import old_weight_norm
from tests.passes.zoo.catalogue import Body, add, conv_bn, image


@add("chain")
class Chain(Body):
    def build(self) -> None:
        self.a, self.b = conv_bn(12, 10), conv_bn(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return self.b(self.a(x))


@add("residual")
class Residual(Body):
    def build(self) -> None:
        self.a, self.b, self.down = conv_bn(12, 16), nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 12, 1)

    def mix(self, x: Tensor) -> Any:
        x = F.relu(x + self.b(self.a(x)))
        return F.relu(self.down(x) + x)


@add("residual_from_input")
class ResidualFromInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 10), nn.Conv2d(10, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.c(x + self.b(self.a(x)))


@add("concat")
class Concat(Body):
    width = 12 + 7 + 9

    def build(self) -> None:
        self.a, self.b = conv_bn(12, 7), conv_bn(12, 9, 1)

    def mix(self, x: Tensor) -> Any:
        return torch.cat([self.a(x), x, self.b(x)], dim=-3)


@add("concat_with_input")
class ConcatWithInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), nn.Conv2d(11, 6, 3)
        self.c = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(torch.cat((x, self.a(x)), 1)))


@add("dense_block")
class DenseBlock(Body):
    width = 12 + 3 * 5

    def build(self) -> None:
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(12 + 5 * i), nn.ReLU(), nn.Conv2d(12 + 5 * i, 5, 3, padding=1)) for i in range(3)
        )

    def mix(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


@add("unet", image(2, 3, 16, 16))
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.mid = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 16)
        self.up2, self.u2 = nn.ConvTranspose2d(16, 12, 2, 2), conv_bn(24, 10)
        self.up1, self.u1 = nn.ConvTranspose2d(10, 6, 2, 2), conv_bn(14, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        c = self.mid(F.max_pool2d(b, 2))
        b = self.u2(torch.cat([self.up2(c), b], 1))
        return self.out(self.u1(torch.cat([a, self.up1(b)], 1)))


@add("option_a_shortcut")
class OptionA(Body):
    width = 20

    def build(self) -> None:
        self.a, self.b = conv_bn(12, 20, stride=2), nn.Conv2d(20, 20, 3, padding=1)

    def mix(self, x: Tensor) -> Any:
        return F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.b(self.a(x)))


@add("squeeze_excitation")
class SqueezeExcitation(Body):
    def build(self) -> None:
        self.f1, self.f2, self.bn = nn.Linear(12, 5), nn.Linear(5, 12), nn.BatchNorm2d(12)

    def mix(self, x: Tensor) -> Any:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = torch.sigmoid(self.f2(F.relu(self.f1(y)))).view(b, c, 1, 1)
        return self.bn(x * y.expand_as(x))


@add("layer_used_twice")
class UsedTwice(Body):
    def build(self) -> None:
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.b(F.relu(self.a(F.relu(self.a(x))))))


@add("shared_between_branches")
class SharedBetweenBranches(nn.Module):
    """One convolution and one BatchNorm, read by two branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.bn, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 9, 1)
        self.out = nn.Conv2d(18, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.cat([self.conv(F.relu(self.bn(side(x)))) for side in (self.left, self.right)], 1))


@add("grouped")
class Grouped(Body):
    width = 18

    def build(self) -> None:
        self.g, self.h = conv_bn(12, 18, groups=3), conv_bn(18, 18, groups=2)

    def mix(self, x: Tensor) -> Any:
        return self.h(self.g(x))


@add("resnext_block")
class ResNeXt(Body):
    def build(self) -> None:
        self.a, self.g, self.b = conv_bn(12, 16, 1), conv_bn(16, 16, groups=4), nn.Conv2d(16, 12, 1)

    def mix(self, x: Tensor) -> Any:
        return F.relu(x + self.b(self.g(self.a(x))))


@add("depthwise")
class Depthwise(Body):
    width = 16

    def build(self) -> None:
        self.d, self.p = conv_bn(12, 12, groups=12), conv_bn(12, 16, 1)

    def mix(self, x: Tensor) -> Any:
        return self.p(self.d(x))


@add("depthwise_multiplier")
class DepthwiseMultiplier(Body):
    width = 24

    def build(self) -> None:
        self.d = conv_bn(12, 24, groups=12)

    def mix(self, x: Tensor) -> Any:
        return self.d(x)


@add("one_output_channel")
class OneOutput(Body):
    """A convolution with one output channel is not depthwise; its map gates all channels."""

    def build(self) -> None:
        self.gate, self.a = nn.Conv2d(12, 1, 3, padding=1), nn.Conv2d(1, 12, 1)

    def mix(self, x: Tensor) -> Any:
        gate = self.gate(x)
        return x * torch.sigmoid(gate) + self.a(gate)


@add("transposed_grouped")
class TransposedGrouped(Body):
    width = 9

    def build(self) -> None:
        self.t = nn.ConvTranspose2d(12, 9, 3, stride=2, groups=3)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.t(x))


@add("transposed_depthwise")
class TransposedDepthwise(Body):
    width = 24

    def build(self) -> None:
        self.t = nn.ConvTranspose2d(12, 24, 2, stride=2, groups=12)

    def mix(self, x: Tensor) -> Any:
        return F.relu(self.t(x))


@add("conv1d", image(2, 4, 20))
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.d = nn.Conv1d(4, 10, 3), nn.BatchNorm1d(10), nn.Conv1d(10, 10, 3, groups=10)
        self.t, self.head = nn.ConvTranspose1d(10, 6, 2, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.t(self.d(F.relu(self.bn(self.a(x))))))
        return self.head(F.avg_pool1d(x, 3).amax(-1))


@add("conv3d", image(2, 2, 5, 6, 6))
class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.g = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 12, 1, groups=4)
        self.t, self.head = nn.ConvTranspose3d(12, 5, 2), nn.Conv3d(5, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.t(F.max_pool3d(self.g(F.relu(self.bn(self.a(x)))), 2))))


@add("functional_weights")
class FunctionalWeights(nn.Module):
    """Layers written with ``torch.nn.functional`` on parameters the module holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(10, 3, 3, 3)), nn.Parameter(torch.randn(10))
        self.deep = nn.Parameter(torch.randn(10, 1, 3, 3))
        self.matrix, self.bias = nn.Parameter(torch.randn(7, 10)), nn.Parameter(torch.randn(7))
        self.last = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(F.conv2d(x, self.kernel, self.shift, padding=1))
        x = F.conv2d(x, weight=self.deep, groups=10)
        return F.relu(F.linear(x.mean((2, 3)), self.matrix, self.bias)) @ self.last


@add("weight_norm_hook", exact=False)
class WeightNormHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = old_weight_norm(nn.Conv2d(3, 8, 3)), old_weight_norm(nn.Conv2d(8, 10, 1)), nn.Conv2d(10, 6, 1)
        self.d = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


@add("weight_norm_parametrized", exact=False)
class WeightNormParametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = torch.nn.utils.parametrizations.weight_norm
        self.a, self.b, self.c = norm(nn.Conv2d(3, 8, 3)), norm(nn.Conv2d(8, 10, 1)), nn.Conv2d(10, 6, 1)
        self.d = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


@add("spectral_norm", exact=False)
class SpectralNorm(nn.Module):
    """The largest singular value is one number for the whole weight, estimated by two vectors that are cut with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3)
        self.s = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(10, 6, 1))
        self.d = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.d(F.relu(self.s(F.relu(self.b(F.relu(self.a(x)))))))


@add("computed_kernel")
class ComputedKernel(nn.Module):
    """Weights standardised before use (over input and window, each output channel alone)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.b = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(10, 8, 3, 3)), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.relu(F.conv2d(F.relu(self.a(x)), self.w * 0.5)))


@add("conv_over_stacked_tokens")
class ConvOverStackedTokens(Body):
    """A kernel of one element mixes what it reads and leaves the axis that it runs along as it is: there the channels stay prunable."""

    def build(self) -> None:
        self.a, self.b = conv_bn(12, 10), conv_bn(12, 10, 1)
        self.stack, self.up = nn.Conv1d(2, 1, 1), nn.ConvTranspose1d(1, 4, 1)
        self.grouped, self.down = nn.Conv1d(4, 4, 1, groups=2, bias=False), nn.Conv1d(4, 1, 1)
        self.back = nn.Conv2d(10, 12, 1)

    def mix(self, x: Tensor) -> Any:
        x, y = F.relu(self.a(x)), F.relu(self.b(x))
        vectors = F.relu(self.stack(torch.stack([x.mean((2, 3)), y.mean((2, 3))], 1)))
        vectors = F.conv1d(F.relu(self.grouped(F.relu(self.up(vectors)))), self.down.weight, self.down.bias, padding="same")
        return self.back(x * vectors[:, 0, :, None, None])


@add("conv_along_channels")
class ConvAlongChannels(Body):
    """Wider kernels, strides and paddings do change the axis that they run along: those channels stay."""

    def build(self) -> None:
        self.a, self.b, self.c, self.d = (nn.Conv2d(12, 10, 1) for _ in range(4))
        self.wide, self.strided, self.padded = (
            nn.Conv1d(1, 1, 3, padding=1),
            nn.Conv1d(1, 1, 1, stride=3, padding=10),
            nn.Conv1d(1, 1, 1, padding=1),
        )
        self.grown = nn.ConvTranspose1d(1, 1, 1, stride=2, output_padding=1)
        self.e = conv_bn(12, 12, 1)

    def mix(self, x: Tensor) -> Any:
        vectors = [layer(x).mean((2, 3))[:, None] for layer in (self.a, self.b, self.c, self.d)]
        made = [layer(v).sum((1, 2)) for layer, v in zip((self.wide, self.strided, self.padded, self.grown), vectors, strict=True)]
        return self.e(x) * torch.stack(made).sum(0)[:, None, None, None]
