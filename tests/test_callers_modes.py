"""Calls in a block of ``no_grad``, ``inference_mode``, ``autocast`` or the meta device do what they do outside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune

AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    return nn.Sequential(*layers).eval()


def images(seed: int) -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def by_taylor(model: nn.Module) -> nn.Module:
    labels = torch.arange(8) % 4
    return fxprune.compress(model, 0.5, images(0), importance="taylor", calibration=[(images(1), labels)], verify=True)


def by_a_table(model: nn.Module) -> nn.Module:
    return fxprune.compress(model, "macs=0.5", images(0), calibration=[images(1), images(2)], repair="joint")


def without_data(model: nn.Module) -> nn.Module:
    inputs = fxprune.synthetic_batches(model, images(0), 8, batch_size=4, steps=2)
    return fxprune.compress(model, 0.5, images(0), calibration=inputs, repair="bn")


def searched(model: nn.Module) -> nn.Module:
    config = fxprune.SearchConfig(targets="macs=0.6", strategy="random", evaluations=3)
    return fxprune.search(model, images(0), lambda net: float(net(images(3)).var()), config=config, calibration=[images(1)]).model


def distilled(model: nn.Module) -> nn.Module:
    slim = fxprune.compress(model, 0.5, images(0))
    fxprune.distill(slim, model, [(images(1), torch.arange(8) % 4)], config=fxprune.DistillConfig(epochs=1))
    return slim


def applied(model: nn.Module) -> nn.Module:
    return fxprune.apply(fxprune.record(fxprune.compress(model, 0.5, images(0))), model)


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode, AUTOCAST])
@pytest.mark.parametrize("made", [by_taylor, by_a_table, without_data, searched, distilled, applied])
def test_it_is_as_outside(made: Callable[[nn.Module], nn.Module], block: Callable[[], Any]) -> None:
    outside, model = made(network()), network()
    if block in (torch.no_grad, torch.inference_mode):
        with block():
            within = made(network())
    else:
        with block():  # the calls alone: what the test itself makes would be on the device, or rounded
            within = made(model)
    assert outside.state_dict().keys() == within.state_dict().keys()
    for name, tensor in within.state_dict(keep_vars=True).items():
        assert not tensor.is_inference() and torch.equal(tensor, outside.state_dict()[name]), name
    within.train()(images(4)).sum().backward()


def test_the_meta_device_as_the_default_one() -> None:
    model, x, batches = network(), images(0), [images(1), images(2)]
    outside = fxprune.compress(model, "macs=0.5", x, calibration=batches, repair="lstsq")
    with torch.device("meta"):
        within = fxprune.compress(model, "macs=0.5", x, calibration=batches, repair="lstsq")
    for name, tensor in within.state_dict().items():
        assert torch.equal(tensor, outside.state_dict()[name]), name


def test_a_file_is_read_in_inference_mode(tmp_path: Path) -> None:
    model = network()
    fxprune.save(fxprune.compress(model, 0.5, images(0)), tmp_path / "slim.safetensors")
    with torch.inference_mode():
        slim = fxprune.load(tmp_path / "slim.safetensors", network())
        folded = fxprune.fold_batchnorm(slim)
    for found in (slim, folded):
        assert not any(tensor.is_inference() for tensor in found.state_dict(keep_vars=True).values())
        found.train()(images(1)).sum().backward()


def test_warnings_are_at_the_call() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxprune.compress(nn.Linear(4, 4), 0.5, torch.randn(2, 4))
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
