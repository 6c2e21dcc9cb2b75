"""Not a classifier: a small segmentation network, pruned so that its mean intersection over union suffers least."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.driver import SearchConfig

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"
CLASSES = 3  # background, discs, squares


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 24, 24) with a bright disc and a dim square in noise, and the class of every pixel (count, 24, 24)."""
    drawn = torch.Generator().manual_seed(seed)
    at = torch.randint(5, 19, (count, 4, 1, 1), generator=drawn)
    rows, columns = torch.arange(24).view(1, 24, 1), torch.arange(24).view(1, 1, 24)
    disc = (rows - at[:, 0]) ** 2 + (columns - at[:, 1]) ** 2 < 20
    square = ((rows - at[:, 2]).abs() < 4) & ((columns - at[:, 3]).abs() < 4)
    labels = torch.where(disc, 1, torch.where(square, 2, 0))
    images = disc.float() + 0.6 * (square & ~disc).float() + 0.3 * torch.randn(count, 24, 24, generator=drawn)
    return images.unsqueeze(1), labels


class Segmenter(nn.Module):
    """Down, up again by a transposed convolution, and the early features put beside."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Conv2d(32, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)
        late = self.up(self.deep(self.down(early)))
        scores: Tensor = self.head(torch.cat([early, F.relu(late)], 1))
        return scores


def mean_iou(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean over the classes of intersection over union, 0 to 1."""
    found = network(images).argmax(1)
    each = [((found == c) & (labels == c)).sum() / ((found == c) | (labels == c)).sum().clamp_min(1) for c in range(CLASSES)]
    return float(torch.stack(each).mean())


torch.manual_seed(0)
torch.set_num_threads(1)
model = Segmenter()
images, labels = scenes(256, seed=1)
optimiser = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(15 if SMALL else 60):
    optimiser.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimiser.step()
model.eval()

held_out = scenes(64, seed=2)  # what candidates are scored on
config = SearchConfig(targets=("macs=0.4",), rounds=2 if SMALL else 10, samples=4)
result = fxprune.search(model, images[:1], lambda network: mean_iou(network, *held_out), config=config, calibration=images.split(64))

unseen = scenes(64, seed=3)
with torch.no_grad():
    before, after = mean_iou(model, *unseen), mean_iou(result.model.eval(), *unseen)
record = fxprune.record(result.model)
print(f"mIoU {before:.3f} before, {after:.3f} with {record.after.macs / record.before.macs:.0%} of the MACs, without any training")
for name, sparsity in result.policy.sparsity.items():
    print(f"  {name}: {sparsity:.0%} of its units removed")
