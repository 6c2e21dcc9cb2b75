"""BatchNorm folded into convolutions: the same outputs from fewer layers, and a record that still saves and loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, UnsupportedError
from tests.passes.helpers import prime

X = torch.randn(2, 3, 12, 12)


class Net(nn.Module):
    """Three BatchNorms can go: after a convolution, a depthwise one without a bias, and a transposed one. Four cannot: two share a
    convolution's weight, one comes first, one's convolution is read twice. Training mode computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up, self.two = nn.ConvTranspose2d(8, 6, 2), nn.BatchNorm2d(6)
        self.first = nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.right.weight = self.left.weight
        self.after_left, self.after_right = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.twice, self.after_twice = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.one(self.stem(x))))
        x = torch.relu(self.first(torch.relu(self.two(self.up(x)))))
        x = self.after_left(self.left(x)) + self.after_right(self.right(x))
        y = self.twice(x)
        x = self.after_twice(y) + y * (0.5 if self.training else 1.0)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def slimmed() -> Any:
    torch.manual_seed(0)
    model = prime(Net(), (X,))
    return fxprune.compress(model, 0.4, X).eval()


def norms(module: nn.Module) -> set[str]:
    return {name for name, one in module.named_modules() if isinstance(one, nn.BatchNorm2d)}


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def test_outputs_stay_and_norms_go() -> None:
    slim = slimmed()
    before, state = norms(slim), {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    folded = fxprune.fold_batchnorm(slim)
    assert norms(folded) == before - {"one", "deep.1", "two"} and norms(slim) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in slim.state_dict().items())
    assert torch.allclose(folded(X), slim(X), atol=1e-5)
    assert folded.get_parameter("deep.0.bias").shape == (5,)
    assert torch.equal(folded.train()(X), folded.eval()(X)) is False  # the norms that stayed take statistics of the batch
    assert fxprune.fold_batchnorm(folded.eval()) is folded


@pytest.mark.parametrize("fresh", [Net, lambda: Net().eval(), on_meta], ids=["training", "eval", "meta"])
def test_the_record_stays_and_files_load(tmp_path: Path, fresh: Callable[[], nn.Module]) -> None:
    slim = slimmed()
    folded = fxprune.fold_batchnorm(slim)
    mine, theirs = fxprune.record(folded), fxprune.record(slim)
    assert mine.folded and not theirs.folded and mine.after.macs == theirs.after.macs
    assert mine.after.params == sum(p.numel() for p in folded.parameters()) < theirs.after.params
    fxprune.save(folded, tmp_path / "folded.safetensors")
    back = fxprune.load(tmp_path / "folded.safetensors", fresh()).eval()
    assert norms(back) == norms(folded) and torch.equal(back(X), folded(X))
    again = fxprune.compress(folded, 0.3, X, verify=True).eval()
    fxprune.save(again, tmp_path / "again.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "again.safetensors", fresh()).eval()(X), again(X))


def test_what_cannot_be_folded() -> None:
    with pytest.raises(InputError, match=r"call slim.eval\(\) first"):
        fxprune.fold_batchnorm(slimmed().train())
    with pytest.raises(UnsupportedError, match="this Net has no graph"):
        fxprune.fold_batchnorm(Net().eval())
