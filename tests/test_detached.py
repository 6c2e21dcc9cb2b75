"""``slim.detached()``: a plain graph module for places without fxprune."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.errors import UnsupportedError
from fxprune.evaluation.running import call
from tests.passes.helpers import prime, without_fxprune
from tests.passes.zoo.networks import ZOO
from tests.test_asking import X, net

LOADED = """
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
    assert without_fxprune(LOADED, *files, folder=tmp_path).strip() == "GraphModule"


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


class Sized(nn.Module):
    """Sizes of the input in a factory's arguments, which fx does not see."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(x.shape[0], 2)
        zeros[:, 0] = x.sum(1)
        return torch.cat([x, zeros], 1)


class Counted(nn.Module):
    """A buffer that is written, and one that is read through nothing but buffers."""

    steps: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return x * (self.scale + self.steps)


class Noisy(nn.Module):
    """Numbers that are drawn at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]  # unlike its derivative


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Double.apply(x)
        return found


class Absent(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(6, 10), inner, nn.LazyLinear(3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.b(self.inner(self.a(x).relu(), mask) if mask is not None else self.inner(self.a(x).relu()))
        return found


def pickled(module: nn.Module, place: Path) -> Any:
    torch.save(module, place)
    assert b"fxprune" not in place.read_bytes()
    return torch.load(place, weights_only=False)


@pytest.mark.parametrize("kind", [Sized, Counted, Noisy, Doubled, Absent])
def test_calls_that_another_trace_would_lose_are_kept(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Around(kind()).eval()
    x, y = torch.randn(2, 6), torch.randn(5, 6)
    model(x)
    slim: Any = fxprune.compress(model, 0.5, (x, None) if kind is Absent else x)
    given = (slim, slim.detached())
    before = {name: value.clone() for name, value in given[1].state_dict().items()}
    loaded = pickled(given[1], tmp_path / "plain.pt")
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())  # nothing ran at loading
    for inputs in (x, y, y):
        found = []
        for module in (*given, loaded):
            torch.manual_seed(1)
            leaf = inputs.clone().requires_grad_()
            output = module(leaf, None) if kind is Absent else module(leaf)
            output.sum().backward()
            found.append((output, leaf.grad))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        torch.manual_seed(2)
        assert torch.equal(copy.deepcopy(loaded)(inputs), found[0][0]) == (kind not in (Noisy, Counted))


class Memory:
    """What a network returns beside its output, as a cache is; ``kind`` is a class and ``parts`` hold objects too."""

    def __init__(self, values: list[Tensor]) -> None:
        self.kind, self.parts, self.seen = Slot, [Slot(v) for v in values], 1


@dataclass(frozen=True)
class Slot:
    value: Tensor


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.a(x).relu()
        return {"output": self.b(y), "memory": Memory([x, 2 * x])}


def test_objects_that_are_returned(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    slim: Any = fxprune.compress(Remembering().eval(), 0.5, x)
    for plain in (slim.detached(), pickled(slim.detached(), tmp_path / "plain.pt")):
        plain.graph.eliminate_dead_code()
        plain.recompile()
        first, second = plain(x), plain(x + 1)
        assert torch.equal(first["output"], slim(x)["output"]) and first["memory"] is not second["memory"]
        memory = first["memory"]
        assert type(memory) is Memory and memory.kind is Slot and memory.seen == 1 and type(memory.parts) is list
        assert [type(part) for part in memory.parts] == [Slot, Slot] and torch.equal(memory.parts[1].value, 2 * x)


@pytest.mark.filterwarnings("ignore")
def test_a_cache_of_transformers_where_fxprune_is_not_installed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    ids = torch.arange(8).reshape(2, 4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    slim: Any = fxprune.compress(model, 0.5, {"input_ids": ids}, attention="heads")
    torch.save(slim.detached(), tmp_path / "plain.pt")
    wanted = slim(input_ids=ids)
    torch.save((ids, wanted.logits, wanted.past_key_values.layers[1].keys), tmp_path / "data.pt")
    script = (
        "import sys; sys.modules['fxprune'] = None\n"
        "import torch\n"
        "ids, logits, keys = torch.load('data.pt')\n"
        "found = torch.load('plain.pt', weights_only=False)(input_ids=ids)\n"
        "assert torch.equal(found.logits, logits) and torch.equal(found.past_key_values.layers[1].keys, keys)\n"
        "print(type(found.past_key_values).__name__, found.past_key_values.get_seq_length())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["DynamicCache", "4"], done.stderr[-2000:]


ORDINARY = ("attention_causal_triu", "attention_rotary_complex", "codebook", "lstm_cell", "none_between_inputs")


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ORDINARY else pytest.mark.long) for n in sorted(ZOO)])
def test_networks_of_the_zoo(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = ZOO[name].inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxprune.PruningWarning)  # some are locked as a whole
        slim: Any = fxprune.compress(prime(ZOO[name].make(), inputs), 0.4, inputs).eval()
    if not hasattr(slim, "detached"):
        return  # the root is the user's module
    loaded = pickled(slim.detached(), tmp_path / "plain.pt")
    found = []
    for module in (slim, loaded):
        torch.manual_seed(1)
        with torch.no_grad():
            found.append([leaf for leaf in tree_leaves(call(module, inputs)) if isinstance(leaf, Tensor)])
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*found, strict=True))


def test_what_is_fxprunes_own_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    slim: Any = fxprune.compress(Own().eval(), 0.5, torch.randn(2, 6))
    graph = slim.graph
    end = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(end):
        graph.call_function(fxprune.record, (end.args[0],))
    slim.recompile()
    with pytest.raises(UnsupportedError, match=r"calls 'record' of fxprune at 'record'.*torch\.export"):
        slim.detached()
