"""A network loses a third of its channels in the middle of somebody's own training loop; optimiser and schedule go on.

A few seconds on one core.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune

torch.manual_seed(0)
pixels = torch.randn(512, 1, 12, 12)
labels = (pixels.mean((1, 2, 3)) > 0).long() + 2 * (pixels[:, 0, :6].mean((1, 2)) > 0).long()

layers = [nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
model: nn.Module = nn.Sequential(*layers, nn.Linear(192, 4))
optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)


def epoch() -> Tensor:
    for rows in torch.randperm(len(labels)).split(64):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels[rows]), labels[rows])
        loss.backward()
        optimizer.step()
    scheduler.step()
    return loss.detach()


for number in range(12):
    if number == 6:
        model = fxprune.compress(model, 0.33, pixels[:1])
        # The moments of what is left go on; the schedule follows the new optimiser.
        optimizer = fxprune.rebind(optimizer, model, schedulers=[scheduler])
        costs = fxprune.record(model)
        print(f"pruned to {costs.after.params / costs.before.params:.0%} of the parameters")
    print(f"epoch {number + 1}: loss {float(epoch()):.3f}, learning rate {optimizer.param_groups[0]['lr']:.4f}")
