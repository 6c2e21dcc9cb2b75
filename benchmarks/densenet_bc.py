"""DenseNet-BC for CIFAR (Huang 2017, https://arxiv.org/abs/1608.06993): every layer reads what all layers before it in its block made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROWTH, LAYERS = 12, 16  # channels that a layer adds; layers a block: 100 layers in all


class _Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * GROWTH, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * GROWTH), nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))], 1)


class _Transition(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNetBC(nn.Module):
    """Images of (batch, 3, 32, 32) -> logits; 100 layers, 0.8 million parameters for a hundred classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = 2 * GROWTH
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for block in (1, 2, 3):
            layers = [_Layer(channels + GROWTH * i) for i in range(LAYERS)]
            channels += GROWTH * LAYERS
            setattr(self, f"dense{block}", nn.Sequential(*layers))
            if block < 3:
                setattr(self, f"trans{block}", _Transition(channels))
                channels //= 2
        self.bn, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in ("dense1", "trans1", "dense2", "trans2", "dense3"):
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(F.avg_pool2d(F.relu(self.bn(x)), 8).flatten(1))
        return logits


def densenet_bc100(num_classes: int = 100) -> nn.Module:
    """DenseNet-BC of 100 layers that grow by 12 channels."""
    return DenseNetBC(num_classes)
