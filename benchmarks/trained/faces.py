"""The three networks of MTCNN (Zhang 2016, https://arxiv.org/abs/1604.02878): is it a face? On the 200 patches that scikit-image ships."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trained.network import CONVOLUTIONAL, Network, Task, file_of


def patches(size: int) -> tuple[Tensor, Tensor]:
    """(200, 3, size, size) as MTCNN takes them, faces first, and whether they are faces."""
    grey = torch.from_numpy(np.load(file_of("skimage", "data", "lfw_subset.npy"))).float()
    scaled = F.interpolate(grey[:, None], (size, size), mode="area" if size < grey.shape[-1] else "bilinear")
    return ((255 * scaled - 127.5) / 128).repeat(1, 3, 1, 1), torch.arange(len(grey)) < 100


def stage(name: str, size: int, _: Path) -> Task:
    from facenet_pytorch.models import mtcnn

    model = getattr(mtcnn, name)().eval()
    images, faces = patches(size)
    held = torch.arange(len(images)) % 2 == 0
    seen = images[held]

    def score(net: nn.Module) -> float:
        answer = net(images[~held])[-1].reshape(-1, 2)[:, 1]
        return float(((answer > 0.5) == faces[~held]).float().mean())

    return Task(model, images[:2], list(torch.cat([seen, seen.flip(3)]).split(50)), score)


NETWORKS = tuple(
    Network(
        f"mtcnn-{name[0].lower()}net",
        CONVOLUTIONAL,
        ("facenet-pytorch", "scikit-image"),
        f"face or not, {size} pixels",
        "100 patches of LFW and of background",
        partial(stage, name, size),
    )
    for name, size in (("PNet", 12), ("RNet", 24), ("ONet", 48))
)
