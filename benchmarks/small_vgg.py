"""A second network for benchmarks/cifar10.py: a VGG, small enough to be trained on a CPU in minutes, without residual connections."""

from __future__ import annotations

from torch import nn

WIDTHS = ((32, 32), (64, 64), (128, 128))
"""Channels of the convolutions of each stage; a stage ends with max pooling."""


def small_vgg(num_classes: int = 10) -> nn.Module:
    """Images of (batch, 3, 32, 32) -> logits; 38 million MACs and 0.29 million parameters for ten classes."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in WIDTHS:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
