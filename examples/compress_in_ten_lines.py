"""A network loses half of every coupled group of channels, proves that it still computes the same, and goes through a file."""

from __future__ import annotations

import torch
from torchvision.models import resnet18

import fxprune

model = resnet18(weights=None).eval()
example = torch.randn(1, 3, 64, 64)

slim = fxprune.compress(model, 0.5, example, verify=True)
fxprune.save(slim, "slim.safetensors")
with torch.device("meta"):  # the fresh original needs no weights of its own
    fresh = resnet18(weights=None)
loaded = fxprune.load("slim.safetensors", fresh).eval()

before, after = fxprune.record(slim).before, fxprune.record(slim).after
print(f"{before.macs / 1e6:.0f} -> {after.macs / 1e6:.0f} million multiply-accumulates")
print(f"{before.params / 1e6:.2f} -> {after.params / 1e6:.2f} million parameters")
print("loaded and saved answer alike:", torch.equal(loaded(example), slim.eval()(example)))
