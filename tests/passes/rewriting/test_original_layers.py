"""``compress(exported, ..., original=model)``: layers where the export left calls of functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError


class Net(nn.Module):
    """Every kind of layer that is put back, a tied weight, a layer used twice, and what stays a call: a batch norm, a scaled weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.wide = nn.Conv1d(16, 12, 3, padding="same", dilation=2, bias=False)
        self.batch, self.group = nn.BatchNorm1d(12), nn.GroupNorm(3, 12)
        self.up, self.norm, self.down = nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 16, bias=False)
        self.scaled = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).transpose(1, 2)
        x = torch.relu(self.wide(self.conv(torch.relu(self.conv(x)))))
        x = self.group(self.batch(x)).transpose(1, 2)
        x = self.down(self.norm(torch.relu(self.up(x))))
        x = F.linear(x, self.scaled.weight * 2, self.scaled.bias)
        out: Tensor = self.head(x)
        return out


IDS = torch.arange(12).reshape(2, 6) % 19 + 1


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (IDS,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))


def test_layers_of_the_original_stand_where_calls_stood() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    program = exported(model)
    bare = fxprune.compress(program, 0.5, IDS)
    slim: Any = fxprune.compress(program, 0.5, IDS, original=model, verify=True)
    assert not any(isinstance(m, nn.Linear) for m in bare.modules())
    kinds = {
        name: type(m) for name, m in slim.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Embedding, nn.LayerNorm, nn.GroupNorm))
    }
    assert kinds == {
        "words": nn.Embedding, "conv": nn.Conv1d, "wide": nn.Conv1d, "group": nn.GroupNorm, "up": nn.Linear, "norm": nn.LayerNorm,
        "down": nn.Linear, "head": nn.Linear,
    }  # fmt: skip
    assert torch.equal(slim(IDS), bare(IDS)) and slim(torch.ones(5, 6, dtype=torch.long)).shape == (5, 6, 20)
    assert (slim.up.in_features, slim.up.out_features) == tuple(reversed(slim.up.weight.shape)) and slim.up.out_features == 12
    assert slim.words.embedding_dim == 8 and slim.words.padding_idx == 0 and slim.head.weight is slim.words.weight
    assert slim.norm.normalized_shape == (12,) and slim.conv.in_channels == slim.conv.out_channels == 8
    assert {n: p.shape for n, p in slim.named_parameters()} == {n: p.shape for n, p in bare.named_parameters()}
    assert list(fxprune.record(slim).removed_units) == list(fxprune.record(bare).removed_units)
    assert type(copy.deepcopy(slim).up) is nn.Linear and torch.equal(copy.deepcopy(slim)(IDS), slim(IDS))
    assert type(model.up) is nn.Linear and model.up.out_features == 24 and model.up.weight.shape == (24, 12)
    slim(IDS).sum().backward()
    assert slim.up.weight.grad is not None


def test_a_layer_that_computes_something_else_stays_a_call() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    other = copy.deepcopy(model)
    other.norm.eps, other.wide.dilation, other.words.padding_idx = 1e-3, (1,), None
    other.up.register_forward_hook(lambda *_: None)
    slim = fxprune.compress(exported(model), 0.5, IDS, original=other)
    left = {name for name, m in slim.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Embedding, nn.LayerNorm))}
    assert left == {"conv", "down", "head"}
    assert torch.equal(slim(IDS), fxprune.compress(exported(model), 0.5, IDS)(IDS))


def test_a_class_that_is_kept_has_its_layers() -> None:
    with pytest.raises(InputError, match="needs the graph of the whole network"):
        fxprune.compress(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.5, torch.ones(1, 4), keep_class=True, original=nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore")
def test_adapters_and_integers_find_them() -> None:
    peft, ao = pytest.importorskip("peft"), pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = Net().eval()
    slim: Any = fxprune.compress(exported(model), 0.5, IDS, original=model)
    adapted = peft.get_peft_model(copy.deepcopy(slim), peft.LoraConfig(r=2, target_modules=["up", "down"]))
    adapted(IDS).square().mean().backward()
    assert any("lora" in n and p.grad is not None for n, p in adapted.named_parameters())
    wanted = slim(IDS)
    ao.quantize_(slim, ao.Int8WeightOnlyConfig())
    assert type(slim.up.weight) is not nn.Parameter and 0 < float((slim(IDS) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
