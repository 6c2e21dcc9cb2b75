"""Masks of torch.nn.utils.prune, and norms that sparse training drove to zero, become smaller layers that compute the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import resnet18

import fxprune

torch.manual_seed(0)
model = resnet18(num_classes=10).eval()
images = torch.randn(2, 3, 64, 64)

# What users have: filters masked before norms whose shift is zero, and scales that a penalty pressed to zero.
for name, module in model.named_modules():
    if isinstance(module, nn.Conv2d) and name.endswith("conv1") and name != "conv1":
        prune.ln_structured(module, "weight", amount=0.4, n=2, dim=0)
    if isinstance(module, nn.BatchNorm2d):
        with torch.no_grad():
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 1.5)
            if name.endswith("bn2"):
                module.weight[:8] = 0  # the shift is zero in a new network
            if name.endswith("downsample.1"):
                module.weight[:8] = 0

policy = fxprune.Policy.from_zeros(fxprune.analyze(model, images))
slim = fxprune.compress(model, policy)
for group, places in policy.meta.get("partly_zero", {}).items():
    print(f"{group}: zero in {', '.join(f'{layer} ({units})' for layer, units in places.items())} but not everywhere")

with torch.no_grad():
    want, got = model(images), slim(images)
worst = ((want - got).abs().max() / want.abs().max()).item()
record = fxprune.record(slim)
print(f"{record.before.params:,} parameters -> {record.after.params:,}; the outputs differ by {worst:.1e}")
assert worst < 1e-5 and record.after.params < 0.75 * record.before.params
