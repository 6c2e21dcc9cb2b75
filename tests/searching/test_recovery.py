"""Recovery: what a slim network learned goes back to where it was sliced from, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.api import analyze
from fxprune.errors import FileError
from fxprune.models.small import digits_net
from fxprune.searching.problem import make_problem
from fxprune.searching.recovery import Recovery, read_weights, write_weights


def added_one(slim: nn.Module) -> None:
    """Stands for training: every parameter grows by one."""
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.add_(1)


def test_trained_weights_go_back_to_their_places() -> None:
    model = digits_net().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = analyze(model, torch.randn(1, 1, 8, 8))
    problem, candidates = make_problem(graph, lambda module: 0.0, importance="l2")
    removed = np.array([5, 11, 19, 14])
    sliced = {name: tensor.clone() for name, tensor in candidates.slim(removed).state_dict().items()}
    recovered = Recovery(candidates, model, added_one).attached(problem)
    assert recovered.recover is not None
    recovered.recover(removed)
    parameters = dict(model.named_parameters())
    for name, tensor in candidates.slim(removed).state_dict().items():
        assert torch.equal(tensor, sliced[name] + (1 if name in parameters else 0))
    for name, tensor in model.state_dict().items():
        changed = int((tensor != before[name]).sum())
        assert changed == (sliced[name].numel() if name in parameters else 0), name


def test_weights_survive_the_file(tmp_path: Path) -> None:
    one, other = digits_net(), digits_net()
    write_weights(one, tmp_path / "deeper" / "w.safetensors")
    read_weights(other, tmp_path / "deeper" / "w.safetensors")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["w.safetensors"]
    with pytest.raises(FileError, match="cannot go on"):
        read_weights(nn.Linear(2, 2), tmp_path / "deeper" / "w.safetensors")
    with pytest.raises(FileError, match="cannot write"):
        write_weights(one, tmp_path / "deeper" / "w.safetensors" / "below")
