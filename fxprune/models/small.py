"""The small networks that the demo and the benchmarks need; everything else comes from torchvision or timm.

All take images of shape (batch, channels, height, width), float, and return class logits of shape (batch, num_classes).
Batch and resolution are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# He 2016 draws its CIFAR networks for 32x32 inputs and these widths (sec. 4.2).
_CIFAR_WIDTHS = (16, 32, 64)
_EXPANSION = 8  # how much wider the blocks of the network for warped digits are inside
# Simonyan 2015, table 1, column E; "M" halves the resolution.
_VGG19 = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M")


def digits_net(num_classes: int = 10) -> nn.Module:
    """A residual and a depthwise stage for 8x8 grey digits: 37 k parameters, 1.25 M multiply-accumulates an image."""
    return _DigitsNet(num_classes)


def warped_digits_net(num_classes: int = 10) -> nn.Module:
    """Two stages for 16x16 grey digits, 12 and 24 wide and eight times wider inside their blocks, as networks for phones are.

    86 k parameters, 2.5 M multiply-accumulates an image.
    """
    return _WarpedDigitsNet((12, 24), num_classes)


def resnet20(num_classes: int = 10) -> nn.Module:
    """ResNet-20 for CIFAR with parameter-free shortcuts (option A) of https://arxiv.org/abs/1512.03385, sec. 4.2."""
    return _CifarResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> nn.Module:
    """ResNet-32 for CIFAR, as ``resnet20`` with five blocks a stage."""
    return _CifarResNet(5, num_classes)


def resnet44(num_classes: int = 10) -> nn.Module:
    """ResNet-44 for CIFAR, as ``resnet20`` with seven blocks a stage."""
    return _CifarResNet(7, num_classes)


def resnet56(num_classes: int = 10) -> nn.Module:
    """ResNet-56 for CIFAR, as ``resnet20`` with nine blocks a stage."""
    return _CifarResNet(9, num_classes)


def vgg19(num_classes: int = 100, *, batch_norm: bool = True, dropout: float = 0.5) -> nn.Module:
    """VGG-19 for CIFAR: the 16 convolutions of https://arxiv.org/abs/1409.1556, and three linears, 512 wide where the paper has 4096."""
    return _CifarVgg(_VGG19, num_classes, batch_norm, dropout)


def _conv_bn(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class _DigitsNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(1, 24, 3), nn.ReLU())
        self.residual = nn.Sequential(*_conv_bn(24, 32, 3), nn.ReLU(), *_conv_bn(32, 24, 3))
        self.depthwise = nn.Sequential(*_conv_bn(24, 24, 3, stride=2, groups=24), nn.ReLU())
        self.pointwise = nn.Sequential(*_conv_bn(24, 48, 1), nn.ReLU())
        self.mix = nn.Sequential(*_conv_bn(48, 48, 3), nn.ReLU())
        self.classifier = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.residual(x))
        x = self.mix(self.pointwise(self.depthwise(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class _FusedBlock(nn.Module):
    """The fused inverted residual of EfficientNetV2 (https://arxiv.org/abs/2104.00298, fig. 2) without squeeze and excitation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        inner = _EXPANSION * in_channels
        self.layers = nn.Sequential(*_conv_bn(in_channels, inner, 3, stride=stride), nn.ReLU(), *_conv_bn(inner, channels, 1))
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


class _WarpedDigitsNet(nn.Module):
    def __init__(self, widths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(1, widths[0], 3), nn.ReLU())
        before = (widths[0], *widths[:-1])
        stages = ((_FusedBlock(i, o, 2), _FusedBlock(o, o, 1)) for i, o in zip(before, widths, strict=True))
        self.blocks = nn.Sequential(*(block for stage in stages for block in stage))
        self.last = nn.Sequential(*_conv_bn(widths[-1], 4 * widths[-1], 1), nn.ReLU())
        self.classifier = nn.Linear(4 * widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class _CifarBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(in_channels, channels, 3, stride=stride)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3)
        self.stride = stride
        self.widen = (channels - in_channels) // 2  # zero channels put on either side of the shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.widen:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.widen, self.widen))
        return F.relu(out + x)


class _CifarResNet(nn.Module):
    """Parameter names are those of the CIFAR ResNets in wide use: conv1, bn1, layer{1,2,3}.{n}.{conv1,bn1,conv2,bn2}, linear."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        first, second, third = _CIFAR_WIDTHS
        self.conv1, self.bn1 = _conv_bn(3, first, 3)
        self.layer1 = _stage(first, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.linear = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [_CifarBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(_CifarBlock(in_channels, channels, stride), *rest)


class _CifarVgg(nn.Module):
    def __init__(self, plan: Sequence[int | str], num_classes: int, batch_norm: bool, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in plan:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)] if batch_norm else [nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        hidden = [nn.Linear(channels, 512), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        self.classifier = nn.Sequential(
            *hidden, nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(512, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.pool(self.features(x)), 1)
        logits: Tensor = self.classifier(x)
        return logits
