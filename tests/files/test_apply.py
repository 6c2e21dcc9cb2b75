"""``fxprune.apply``: the channels of one pruning out of another copy of the network."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxprune
from fxprune.errors import InputError, UnsupportedError
from tests.files.two_ranks import network
from tests.passes.helpers import zeroed
from tests.test_asking import Attention, X, net

ROOT = Path(__file__).resolve().parents[2]


def other(model: nn.Module) -> Any:
    """A copy with weights of its own."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return twin


@pytest.mark.parametrize("by_record", [True, False])
def test_the_same_channels_of_another_copy(by_record: bool) -> None:
    model = net()
    slim = fxprune.compress(model, {"stem": 0.5, "blocks.0": 0.25, "blocks.1.up": 0.7}, X)
    copied = other(model)
    state = copy.deepcopy(copied.state_dict())
    made = fxprune.apply(fxprune.record(slim) if by_record else slim, copied)
    kept = fxprune.record(slim).kept
    for name, p in copied.named_parameters():
        whole = p.detach()
        for dim, indices in kept.get(name, {}).items():
            whole = whole.index_select(dim, indices)
        assert torch.equal(whole, made.get_parameter(name))
    with torch.no_grad():
        assert torch.allclose(made(X), zeroed(copied, kept)(X), atol=1e-4)
    assert all(torch.equal(v, state[k]) for k, v in copied.state_dict().items())
    assert {n: u.tolist() for n, u in fxprune.record(made).removed_units.items()} == {
        n: u.tolist() for n, u in fxprune.record(slim).removed_units.items()
    }


def test_the_copys_modes_and_flags_hold() -> None:
    model = net()
    slim = fxprune.compress(model, 0.5, X)
    copied = other(model).train()
    copied.stem.requires_grad_(False)
    made = fxprune.apply(slim, copied)
    assert made.training and not made.get_parameter("stem.weight").requires_grad and not slim.training


def test_an_average_of_the_weights(tmp_path: Path) -> None:
    model = net()
    average = AveragedModel(model)
    average.update_parameters(other(model))
    average.update_parameters(other(model))
    slim = fxprune.compress(model, 0.5, X)
    made = fxprune.apply(slim, average.module)
    assert torch.equal(made.get_parameter("head.bias"), average.module.get_parameter("head.bias"))
    fxprune.save(made, tmp_path / "ema.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "ema.safetensors", net())(X), made(X))


def test_pruned_twice_with_heads_the_class_kept_and_norms_exact() -> None:
    x = torch.randn(2, 5, 10)
    model = Attention().eval()
    copied = other(model)
    for options in ({"attention": "heads"}, {"norms": "exact"}):
        slim = fxprune.compress(model, 0.5, x, **options)  # type: ignore[arg-type]
        made = fxprune.apply(slim, copied)
        assert type(made).__name__ == type(slim).__name__ and made(x).shape == slim(x).shape
        assert [p.shape for p in made.parameters()] == [p.shape for p in slim.parameters()]
    kept = fxprune.apply(fxprune.compress(net(), 0.5, X, keep_class=True), other(net()))
    assert type(kept) is type(net()) and kept(X).shape == (2, 5)
    twice = fxprune.compress(fxprune.compress(model, 0.5, x), 0.3, x)
    made = fxprune.apply(twice, copied)
    assert [p.shape for p in made.parameters()] == [p.shape for p in twice.parameters()]


def test_a_repair_is_not_made_again_and_the_notes_say_so() -> None:
    model = net()
    slim = fxprune.compress(model, 0.5, X, calibration=[X, X + 1], repair="bn", importance="l2")
    record = fxprune.record(fxprune.apply(slim, model))
    assert record.repair == "none" and "the repair 'bn' of the record was not made again" in record.notes[-1]


def test_wrappers_on_both_sides() -> None:
    model = net()
    slim = fxprune.compress(model, 0.5, X)
    compiled: Any = torch.compile(slim, backend="eager")
    assert torch.equal(fxprune.apply(nn.DataParallel(compiled), nn.DataParallel(model))(X), slim(X))


def test_what_does_not_fit_is_refused() -> None:
    slim = fxprune.compress(net(), 0.5, X)
    words = r"cannot apply the record to this Linear: .*the record's original .*; pass a copy of what was pruned"
    with pytest.raises(InputError, match=words):
        fxprune.apply(slim, nn.Linear(3, 3))
    with pytest.raises(InputError, match="this Net is no pruning record and carries none"):
        fxprune.apply(net(), net())
    given: Any = {"kept": {}}
    with pytest.raises(InputError, match="this dict is no pruning record"):
        fxprune.apply(given, net())


def test_every_rank_takes_the_channels_of_the_first(tmp_path: Path) -> None:
    """Two processes with data of their own: their gradients choose other channels; apply makes them one network again."""
    launch = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "tests.files.two_ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["chosen"] != second["chosen"]
    assert first["taken"] == second["taken"] == first["chosen"] and first["weights"] == second["weights"]
    assert first["record"] == "PruningRecord"
    words = r"^this process holds a part of 0\.weight alone \(DTensor\): prune before FSDP.* shards the model, by the record of one process"
    for told in (first, second):
        assert len(told["refused"]) == 2 and all(re.match(words, one) for one in told["refused"])
        assert told["equal"] and told["behind_fsdp"] == "PruningRecord"
    loaded = fxprune.load(tmp_path / "slim.safetensors", network())
    assert fxprune.record(loaded).removed_units["0"].tolist() == first["taken"]["0"]


class FlatParameter(nn.Parameter):
    """Stands for that of the first FSDP, which needs a process group."""


def test_parameters_that_are_in_parts_are_refused() -> None:
    for mark in (FlatParameter(torch.zeros(3)), nn.Parameter(torch.zeros(0))):
        model = net()
        if type(mark) is nn.Parameter:
            mark.ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed does
        model.register_parameter("part", mark)
        with pytest.raises(UnsupportedError, match=r"this process holds a part of part alone .*: prune before FSDP"):
            fxprune.compress(model, 0.5, X)
        with pytest.raises(UnsupportedError, match=r"this process holds a part of part alone .*: prune before FSDP"):
            fxprune.apply(fxprune.compress(net(), 0.5, X), model)


class Batch(NamedTuple):
    x: torch.Tensor
    mask: Any = None


class TakesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, batch: Batch) -> Any:
        assert isinstance(batch, tuple) and hasattr(batch, "_fields")
        return self.b(self.a(batch.x).relu())


def test_named_tuples_as_inputs_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = TakesBatch().eval(), (Batch(torch.randn(3, 10)),)
    slim = fxprune.compress(model, 0.5, inputs, verify=True)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    for again in (fxprune.load(tmp_path / "slim.safetensors", TakesBatch()), fxprune.apply(slim, model)):
        torch.testing.assert_close(again(*inputs), slim(*inputs))
    graph = fxprune.analyze(model, inputs)
    policy = fxprune.Policy.uniform(graph, 0.5)
    policy.save(tmp_path / "policy.json")
    torch.testing.assert_close(fxprune.compress(model, str(tmp_path / "policy.json"))(*inputs), slim(*inputs))
    same = fxprune.compress(model, 0.5, inputs, keep_class=True, verify=True)
    torch.testing.assert_close(same(*inputs), slim(*inputs))
