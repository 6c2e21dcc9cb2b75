"""Take whole attention heads from a vision transformer, and positions inside the heads; both axes of the same projection.

About ten seconds on one core. With FXPRUNE_EXAMPLE_BUDGET=small a smaller network.
"""

from __future__ import annotations

import os

import torch
from torchvision.models import VisionTransformer

import fxprune

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"

torch.manual_seed(0)
layers, heads, width = (2, 4, 64) if SMALL else (12, 12, 768)
model = VisionTransformer(
    image_size=64, patch_size=16, num_layers=layers, num_heads=heads, hidden_dim=width, mlp_dim=4 * width, num_classes=10
).eval()
images = torch.randn(2, 3, 64, 64)

for axis in ("heads", "head_dim"):
    graph = fxprune.analyze(model, images, attention=axis)
    # A group of attention is one that the fused projection of queries, keys and values is a member of by its output.
    attention = {
        group.name: group.size
        for group in graph.groups
        if group.prunable and any(name.endswith("in_proj_weight") and dim == 0 for name, dim, _ in group.members)
    }
    slim = fxprune.compress(graph, dict.fromkeys(attention, 0.5), images, verify=True)
    with torch.no_grad():
        logits = slim(images)
    costs = fxprune.record(slim)
    units = next(iter(attention.values()))
    print(
        f"{axis}: {units} units in each of {len(attention)} groups, half of them gone; parameters left "
        f"{costs.after.params / costs.before.params:.1%}, MACs {costs.after.macs / costs.before.macs:.1%}, output {tuple(logits.shape)}"
    )
