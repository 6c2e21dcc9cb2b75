"""Quantisation comes after pruning: prepared and quantised networks are refused in a line, slim ones are prepared, scripted and traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about its own quantisation
X = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.fc, self.out = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.relu(self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))))
        return found


def eager(model: Any) -> Any:
    quantization: Any = pytest.importorskip("torch.ao.quantization")
    model.train().qconfig = quantization.get_default_qat_qconfig("x86")
    return quantization.prepare_qat(model)


def symbolic(model: Any) -> Any:
    quantization: Any = pytest.importorskip("torch.ao.quantization")
    fx: Any = pytest.importorskip("torch.ao.quantization.quantize_fx")
    return fx.prepare_qat_fx(model.train(), quantization.get_default_qat_qconfig_mapping("x86"), (X,))


def fake(model: Any) -> Any:
    qat: Any = pytest.importorskip("torchao.quantization.qat")
    config = qat.QATConfig(weight_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_channel"), step="prepare")
    pytest.importorskip("torchao.quantization").quantize_(model, config)
    return model


def integers(model: Any) -> Any:
    ao: Any = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("prepare", [eager, symbolic, fake, integers])
def test_prune_first_then_prepare(prepare: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedError, match=r"^\S+ is a .*: prune the network first, then prepare or quantise the slim one") as caught:
        fxprune.compress(prepare(Net()), 0.5, X)
    assert "\n" not in str(caught.value)
    slim = fxprune.compress(Net(), 0.5, X, keep_class=prepare is eager)
    made = prepare(slim)
    made(X).square().mean().backward()
    assert made.out.weight.shape == (4, 4)


def test_stubs_of_a_network_that_is_to_be_prepared_are_no_quantisation() -> None:
    quantization: Any = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(quantization.QuantStub(), nn.Linear(4, 8), nn.Linear(8, 2), quantization.DeQuantStub())
    slim: Any = fxprune.compress(model, 0.5, torch.randn(2, 4))
    assert slim.get_parameter("1.weight").shape == (4, 4)


def test_slim_modules_are_scripted_and_traced() -> None:
    slim: Any = fxprune.compress(Net().eval(), 0.5, X)
    kept: Any = fxprune.compress(Net().eval(), 0.5, X, keep_class=True)
    jit: Any = torch.jit
    for made, module in ((jit.script(slim.detached()), slim), (jit.script(kept), kept), (jit.trace(slim, X), slim)):
        assert torch.equal(made(X), module(X))
