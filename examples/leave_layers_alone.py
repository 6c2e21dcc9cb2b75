"""Layers that keep their channels: ``ignore=`` takes a module, a qualified name, or a glob over names."""

from __future__ import annotations

import torch
from torchvision.models import mobilenet_v3_small

import fxprune

model = mobilenet_v3_small(num_classes=10).eval()
example = torch.randn(1, 3, 64, 64)


def widths(slim: torch.nn.Module) -> str:
    """Output channels of the stem, the first block's expansion and the classifier's first layer."""
    names = ("features.0.0.weight", "features.2.block.0.0.weight", "classifier.0.weight")
    return ", ".join(str(slim.get_parameter(name).shape[0]) for name in names)


print("original:           ", widths(model))
print("half of everything: ", widths(fxprune.compress(model, 0.5, example)))

kept = [
    model.features[0],  # a module: the stem, with all the layers in it
    "features.2.block.0",  # a name
    "classifier.*",  # a glob: every layer of the classifier
]
slim = fxprune.compress(model, 0.5, example, ignore=kept, verify=True)
print("with ignore:        ", widths(slim))

locked = [group.name for group in fxprune.analyze(model, example, ignore=kept).groups if "ignore" in group.reason]
print("groups that ignore= locks:", ", ".join(locked))
