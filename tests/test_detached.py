"""``slim.detached()``: a plain graph module for places without fxprune."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import UnsupportedError
from tests.test_asking import X, net

LOADED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fxprune":
            raise ImportError("fxprune is not installed here")
sys.meta_path.insert(0, Blocked())
import torch
found = torch.load(sys.argv[1], weights_only=False)
x, wanted = torch.load(sys.argv[2])
assert torch.equal(found(x), wanted) and torch.equal(torch.jit.load(sys.argv[3])(x), wanted)
assert "fxprune" not in sys.modules
print(type(found).__mro__[1].__name__)
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")  # of torch's own batch norm
def test_it_pickles_scripts_and_loads_where_fxprune_is_not_installed(tmp_path: Path) -> None:
    slim: Any = fxprune.compress(net(), 0.5, X)
    plain = slim.detached()
    assert isinstance(plain, fx.GraphModule) and not type(plain).__mro__[1].__module__.startswith("fxprune")
    with torch.no_grad():
        wanted = slim(X)
        assert torch.equal(plain(X), wanted)
    torch.save(plain, tmp_path / "plain.pt")
    torch.save((X, wanted), tmp_path / "data.pt")
    torch.jit.script(plain).save(str(tmp_path / "scripted.pt"))
    files = [str(tmp_path / name) for name in ("plain.pt", "data.pt", "scripted.pt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", LOADED, *files]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "GraphModule", done.stderr[-2000:]


def test_it_shares_nothing_and_keeps_names_modes_and_flags() -> None:
    model: Any = net().train()
    model.stem.requires_grad_(False)
    model.blocks[0].norm.eval()
    slim: Any = fxprune.compress(model, 0.5, X)
    plain = slim.detached()
    assert set(dict(plain.named_parameters())) == set(dict(slim.named_parameters())) and plain.training
    assert not plain.get_parameter("stem.weight").requires_grad and plain.get_parameter("head.weight").requires_grad
    assert not plain.get_submodule("blocks.0.norm").training and plain.get_submodule("blocks.1.norm").training
    with torch.no_grad():
        plain.get_parameter("head.weight").zero_()
    assert slim.get_parameter("head.weight").abs().sum() > 0
    with pytest.raises(fxprune.FxPruneError, match="carries no pruning record"):
        fxprune.record(plain)


def test_the_graph_of_the_mode_it_is_in() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            z: Tensor = self.b(2 * y if self.training else y)
            return z

    slim: Any = fxprune.compress(Both().eval(), 0.5, torch.randn(2, 6))
    x = torch.randn(4, 6)
    for mode in (True, False):
        slim.train(mode)
        assert torch.equal(slim.detached()(x), slim(x))


def test_what_fx_cannot_trace_again_is_refused() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x) + torch.zeros(x.shape[0], 1))
            return y

    slim: Any = fxprune.compress(Sized().eval(), 0.5, torch.randn(2, 6))
    try:
        plain = slim.detached()
    except UnsupportedError as error:
        assert "trace the slim network's code again" in str(error) and "torch.export" in str(error)
    else:
        assert torch.equal(plain(torch.ones(3, 6)), slim(torch.ones(3, 6)))
