"""Modules that look at values in a network that is traced: what their code calls is pruned as parts, whose outer sizes stay."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import UnsupportedError
from fxprune.passes.ir.slim_module import SlimModule
from tests.passes.helpers import assert_sound, gap, prime, without_fxprune, zeroed

Made = tuple[nn.Module, Any, set[str]]
NETWORKS: dict[str, Callable[[], Made]] = {}


def add(function: Callable[[], Made]) -> Callable[[], Made]:
    """A network, its inputs, and the parts that it has."""
    NETWORKS[function.__name__] = function
    return function


class Mlp(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, h), (d, h), (h, d)))

    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Conv(nn.Module):
    def __init__(self, c: int, h: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(c, h, 3, padding=1), nn.BatchNorm2d(h), nn.Conv2d(h, c, 1)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.relu(self.norm(self.a(x))))


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.size = d // heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 2**0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :], -1e4)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Around(nn.Module):
    """Traced layers before and after a module that is not."""

    def __init__(self, body: nn.Module, d: int = 8, residual: bool = True) -> None:
        super().__init__()
        self.first, self.body, self.mlp, self.last = nn.Linear(5, d), body, Mlp(d, 12), nn.Linear(d, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        y = self.body(x)
        x = x + y if self.residual else y
        return self.last(x + self.mlp(x))


def around(body: nn.Module, *parts: str, d: int = 8, residual: bool = True) -> Made:
    return Around(body, d, residual), (torch.randn(3, 6, 5),), {f"body.{name}" for name in parts}


class Mixture(nn.Module):
    """A loop over experts. ``way``: how their tokens are found."""

    def __init__(self, way: str, make: Callable[[int, int], nn.Module] = Gated, d: int = 8, h: int = 10, n: int = 4, top: int = 2) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(d, n, bias=False), nn.ModuleList(make(d, h) for _ in range(n))
        self.way, self.top = way, top

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.router(x).softmax(-1).topk(self.top)
        out = torch.zeros_like(x)
        if self.way == "any":
            for i, expert in enumerate(self.experts):
                mask = (chosen == i).any(-1)
                if mask.any():
                    share = (weights * (chosen == i)).sum(-1)
                    out[mask] += expert(x[mask]) * share[mask].unsqueeze(-1)
        elif self.way == "numel":
            picked = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
            for i in range(len(self.experts)):
                place, row = torch.where(picked[i])
                if row.numel() == 0:
                    continue
                out.index_add_(0, row, self.experts[i](x[None, row].reshape(-1, x.shape[1])) * weights[row, place, None])
        elif self.way == "hit":
            picked = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
            for i in (picked.sum((-1, -2)) > 0).nonzero():
                place, row = torch.where(picked[int(i)])
                out.index_add_(0, row, self.experts[int(i)](x[row]) * weights[row, place, None])
        else:  # sorted by expert, as DeepSeek's
            order = chosen.flatten().argsort()
            counts, start, found = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist(), 0, []
            for expert, count in zip(self.experts, counts, strict=True):
                if count:
                    found.append(expert(x[order[start : start + count] // self.top]))
                    start += count
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order))
            out = (torch.cat(found)[back].view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)
        return out.view(hidden.shape)


@add
def mixture_any() -> Made:
    return around(Mixture("any"), *(f"experts.{i}" for i in range(4)))


@add
def mixture_numel() -> Made:
    return around(Mixture("numel"), *(f"experts.{i}" for i in range(4)))


@add
def mixture_hit() -> Made:
    return around(Mixture("hit", Mlp), *(f"experts.{i}" for i in range(4)))


@add
def mixture_sorted() -> Made:
    return around(Mixture("sorted", top=1), *(f"experts.{i}" for i in range(1, 4)))  # no token goes to the first


class Shared(Mixture):
    """As Qwen's: one expert that gets all tokens beside those that are chosen."""

    def __init__(self) -> None:
        super().__init__("numel")
        self.shared, self.gate = Gated(8, 14), nn.Linear(8, 1)

    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden) + self.gate(hidden).sigmoid() * self.shared(hidden)


@add
def mixture_with_a_shared_expert() -> Made:
    return around(Shared(), "shared", *(f"experts.{i}" for i in range(4)))


class Encoder(nn.Module):
    """As ESM-2's: a mask that is left out where nothing is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"attention": Attention(8, 4), "mlp": Mlp(8, 16)}) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        mask: Tensor | None = x[..., 0] > 5.0
        if not mask.any():  # type: ignore[union-attr]
            mask = None
        for layer in self.layers:
            x = x + layer["attention"](x, mask)  # type: ignore[index]
            x = x + layer["mlp"](x)  # type: ignore[index]
        return self.norm(x)


@add
def a_mask_that_is_left_out() -> Made:
    return around(Encoder(), *(f"layers.{i}.{name}" for i in range(2) for name in ("attention", "mlp")))


class Halting(nn.Module):
    """A step that is repeated until all rows are done."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.halt = Mlp(8, 12), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        total = torch.zeros(x.shape[:-1])
        for _ in range(4):
            x = x + self.step(x)
            total = total + self.halt(x)[..., 0].sigmoid()
            if (total > 1.2).all():
                break
        return x


@add
def a_step_until_all_have_halted() -> Made:
    return around(Halting(), "step")


class Exit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = Mlp(8, 12), Mlp(8, 14), Mlp(8, 9)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        if x.abs().max() > 1e6:
            return self.never(x)
        return x + self.second(x)


@add
def a_branch_that_is_not_taken() -> Made:
    return around(Exit(), "first", "second")


class Reading(nn.Module):
    """Code that reads what a part holds. ``what``: its weight, a size, or a number that repeats one."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.open, self.read, self.what = Mlp(8, 12), Mlp(8, 12), what

    def forward(self, x: Tensor) -> Any:
        if x.abs().max() > 1e6:
            return x
        y, layer = self.open(x) + self.read(x), self.read.up
        if self.what == "training":
            return y * layer.out_features**-0.5 if self.training else y
        if self.what == "weight":
            return y + F.linear(F.linear(x, layer.weight), self.read.down.weight)
        if self.what == "shape":
            return y * layer.weight.shape[0] ** -0.5
        if self.what == "number":
            return y * layer.out_features**-0.5
        if self.what == "data":
            return y + layer.weight.data.sum()
        if self.what == "inner":
            return y + self.read.down(layer(x))
        if self.what == "parameters":
            return y + sum(p.square().sum() for p in self.read.parameters())
        return y.to(layer.weight.dtype) + self.read.forward(x) * 0


def _reading(what: str) -> Callable[[], Made]:
    return lambda: around(Reading(what), "open")


for kind in ("weight", "shape", "number", "data", "inner", "parameters", "forward", "training"):
    NETWORKS[f"what_a_part_holds_is_read_{kind}"] = _reading(kind)


class Dtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(8, 12)

    def forward(self, x: Tensor) -> Any:
        if not torch.isfinite(x).all():
            return x
        return self.mlp(x.to(self.mlp.up.weight.dtype).to(next(self.mlp.parameters()).device))


@add
def a_dtype_that_is_read() -> Made:
    return around(Dtype(), "mlp")


class Sharing(nn.Module):
    """The part of the module in the middle is called by traced code too, and one weight is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.mlp, self.other = Mlp(8, 12), Mlp(8, 12)
        self.body = Holder(self.mlp, Mlp(8, 12))
        self.body.own.up.weight = self.other.up.weight  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        x = x + self.mlp(x)
        return self.last(self.other(self.body(x)))


class Holder(nn.Module):
    def __init__(self, held: nn.Module, own: nn.Module) -> None:
        super().__init__()
        self.held, self.own = held, own

    def forward(self, x: Tensor) -> Any:
        return self.held(x) + self.own(x) if x.abs().max() < 1e6 else x


@add
def shared_with_traced_code() -> Made:
    return Sharing(), (torch.randn(3, 6, 5),), {"body.held", "body.own"}


class Tied(nn.Module):
    """A weight of a module is one of the code around it too, under another name: that module is no part."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.open = Mlp(8, 12), Mlp(8, 12)
        self.after: Any = nn.Module()
        self.after.table = self.mlp.up.weight

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x) + self.open(x) + self.after.table.mean() if x.abs().max() < 1e6 else x


@add
def tied_with_the_code_around() -> Made:
    return around(Tied(), "open")


class Methods(nn.Module):
    """Parts that are called by keyword, give several things, take numbers and are asked for attributes."""

    class Inner(Mlp):
        scale = 0.5

        def forward(self, x: Tensor, left: Tensor | None = None, gain: float = 1.0, mask: Tensor | None = None) -> Any:
            if left is not None:
                x = x + left
            y = self.down(F.relu(self.up(x)))
            return {"y": y * gain, "all": (y, [x])}

        def width(self) -> int:
            return 3

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner(8, 12)

    def forward(self, x: Tensor) -> Any:
        if isinstance(self.inner, Mlp) and x.abs().max() < 1e6:
            found = self.inner(x, gain=0.5, mask=None)
            return found["y"] * self.inner.scale + found["all"][0] / self.inner.width()
        return x


@add
def called_in_many_ways() -> Made:
    return around(Methods(), "inner")


class Selected(nn.Module):
    """A value says which module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.ModuleDict({"a": Mlp(8, 12), "b": nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8))})

    def forward(self, x: Tensor) -> Any:
        return self.table["a" if x.mean() > 1e6 else "b"](x)


@add
def chosen_by_a_value() -> Made:
    return around(Selected(), "table.b")


@add
def a_graph_module() -> Made:
    return around(Holder(fx.symbolic_trace(Mlp(8, 12)), Mlp(8, 12)), "held", "own")


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), Gate(), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(F.relu(self.body(self.body(x)) + x)).mean((2, 3))


class Gate(nn.Module):
    """Pictures that pass a gate go through more layers."""

    def __init__(self) -> None:
        super().__init__()
        self.light, self.heavy, self.gate = Conv(8, 6), Conv(8, 16), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.light(x)
        keep = self.gate(x.mean((2, 3)))[:, 0] > -1e6
        if not keep.any():
            return y
        y = y.clone()
        y[keep] = y[keep] + self.heavy(x[keep])
        return y


@add
def pictures_that_pass_a_gate() -> Made:
    return Pictures(), (torch.randn(3, 3, 6, 6),), {"body.light", "body.heavy"}


class Outer(nn.Module):
    """A part that has a module in it which cannot be traced, with parts of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), Mixture("any"), Mlp(8, 11))

    def forward(self, x: Tensor) -> Any:
        return self.block(x) if x.abs().max() < 1e6 else x


@add
def parts_in_parts() -> Made:
    return around(Outer(), "block", *(f"block.1.experts.{i}" for i in range(4)))


class Decoder(nn.Module):
    """Steps that end where a token says so; the second call of the part has more rows than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Any:
        found = x[:, :1]
        for step in range(x.shape[1] - 1):
            found = torch.cat([found, self.block(found)[:, -1:] + x[:, step + 1 : step + 2]], 1)
            if bool((found[:, -1] > 1e6).all()):
                break
        return found


@add
def a_decoder_that_may_stop() -> Made:
    return around(Decoder(), "block")


def made(name: str) -> Made:
    torch.manual_seed(0)
    model, inputs, parts = NETWORKS[name]()
    return prime(model, inputs), inputs, parts


@pytest.mark.parametrize("name", NETWORKS)
def test_children_of_untraced_modules_are_pruned_and_sound(name: str) -> None:
    model, inputs, parts = made(name)
    graph = assert_sound(model, inputs, exact=False, seed=3)
    assert set(graph.traced.parts) == parts
    open_groups = [{n for n, _, _ in g.members} for g in graph.groups if g.prunable]
    for part in parts:
        names = {alias for n in graph.traced.skeleton.names for alias in graph.traced.skeleton.aliases[n] if alias.startswith(f"{part}.")}
        first = {n for n in graph.traced.skeleton.names if names & set(graph.traced.skeleton.aliases[n])}
        assert any(first & members for members in open_groups), part
    slim = fxprune.compress(graph, 0.5, inputs, verify=True)
    assert isinstance(slim, SlimModule) and all(isinstance(slim.get_submodule(part), SlimModule) for part in parts)
    kept = fxprune.record(slim).kept
    outside = [n for n in kept if n.startswith("body.") and not any(n.startswith(f"{part}.") for part in parts)]
    assert not outside, outside
    for exact in (fxprune.compress(model, 0.5, inputs, norms="exact", verify=True), fxprune.compress(graph, 0.5, verify=True)):
        assert fxprune.record(exact).after.params < fxprune.record(exact).before.params


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_kept_applied_and_loaded(name: str, tmp_path: Path) -> None:
    model, inputs, parts = made(name)
    slim: Any = fxprune.compress(model, 0.5, inputs)
    with torch.no_grad():
        wanted = slim(*inputs)
        fxprune.save(slim, tmp_path / "slim.safetensors")
        fresh, meta = copy.deepcopy(model), copy.deepcopy(model)
        for parameter in fresh.parameters():
            parameter.zero_()
        tied = name in ("shared_with_traced_code", "tied_with_the_code_around")  # to("meta") takes tied weights apart
        for original in (fresh,) if tied else (fresh, meta.to("meta")):
            assert torch.equal(fxprune.load(tmp_path / "slim.safetensors", original).eval()(*inputs), wanted)
        assert torch.equal(fxprune.apply(slim, model)(*inputs), wanted)
        fxprune.record(slim).policy.save(tmp_path / "policy.json")
        assert torch.equal(fxprune.compress(model, tmp_path / "policy.json")(*inputs), wanted)
        again = fxprune.compress(slim, 0.5, inputs, verify=True)
        assert fxprune.record(again).after.params < fxprune.record(slim).after.params
        # Traced code now calls what is in a shared part, so that it is none any more.
        assert set(fxprune.analyze(slim, inputs).traced.parts) == parts - ({"body.held"} if name == "shared_with_traced_code" else set())
        own = fxprune.compress(model, 0.5, inputs, keep_class=True, verify=True)
        assert type(own) is type(model) and torch.equal(own(*inputs), wanted)


LOADED = """
import torch
found = torch.load(sys.argv[1], weights_only=False)
x, wanted = torch.load(sys.argv[2])
assert torch.equal(found(x), wanted) and "fxprune" not in sys.modules
"""
BODY = """
import torch
from torch import nn
class Body(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, 2.0
        inner.tag = 3
    def forward(self, x):
        return self.inner(x) * self.inner.tag if x.abs().max() < 1e6 else x
"""


def test_detached_from_fxprune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_body.py").write_text(BODY)
    monkeypatch.syspath_prepend(str(tmp_path))
    body: Any = __import__("a_body").Body(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))
    model, x = Around(body).eval(), torch.randn(3, 6, 5)
    slim: Any = fxprune.compress(model, 0.5, x)
    with torch.no_grad():
        torch.save((x, slim(x)), tmp_path / "data.pt")
    torch.save(slim.detached(), tmp_path / "plain.pt")
    files = [str(tmp_path / name) for name in ("plain.pt", "data.pt")]
    without_fxprune(LOADED, *files, folder=tmp_path)


def _error(model: nn.Module, inputs: Any, **options: Any) -> float:
    batches = [torch.randn(6, *inputs[0].shape[1:]) for _ in range(6)]
    slim = fxprune.compress(model, 0.5, inputs, importance="l2", calibration=batches, **options)
    held_out = torch.randn(40, *inputs[0].shape[1:])
    with torch.no_grad():
        return float((slim(held_out) - model(held_out)).square().mean())


@pytest.mark.parametrize(
    "name", ["mixture_any", "mixture_sorted", "a_mask_that_is_left_out", "parts_in_parts", "a_step_until_all_have_halted"]
)
def test_repairs_reach_them(name: str) -> None:
    """Experts get other tokens in the slim network, or none; what they are fitted on is what the original gives them."""
    model, inputs, parts = made(name)
    assert _error(model, inputs, repair="lstsq") < 0.6 * _error(model, inputs, repair="none")
    slim = fxprune.compress(model, 0.5, inputs, repair="lstsq", calibration=[torch.randn(6, 6, 5) for _ in range(4)])
    found = fxprune.record(slim).repaired
    assert all(any(layer.startswith(f"{part}.") for layer in found) for part in parts), found.keys()
    table = fxprune.compress(model, "params=0.8", inputs, repair="lstsq", calibration=[torch.randn(6, 6, 5) for _ in range(4)])
    done = fxprune.record(table)
    assert done.after.params <= 0.81 * done.before.params


def test_blocks_are_left_out_with_them_and_beside_them() -> None:
    model, inputs, _ = made("mixture_any")
    batches = [torch.randn(6, 6, 5) for _ in range(4)]
    graph = fxprune.analyze(model, inputs, blocks=True)
    blocks = {block.name: block for block in graph.blocks}
    assert blocks["body"].macs >= 4 * 8 * 10 * 3 and blocks["body"].params == sum(
        p.numel() for p in model.get_submodule("body").parameters()
    )
    rest = {g.name: 0.5 for g in graph.groups if g.prunable}
    for gone, left in (("body", "mlp"), ("mlp", "body")):
        policy = {**{name: p for name, p in rest.items() if not name.startswith(gone)}, gone: 1.0}
        slim = fxprune.compress(graph, policy, inputs, verify=True, repair="lstsq", calibration=batches)
        done = fxprune.record(slim)
        assert done.blocks == {gone: "removed"} or gone in done.blocks
        assert any(name.startswith(f"{left}.") for name in done.repaired) and not any(n.startswith(f"{gone}.") for n in done.repaired)


def test_a_search_takes_from_them() -> None:
    model, inputs, _ = made("mixture_numel")
    x = inputs[0]
    wanted = model(x).argmax(-1)
    config = fxprune.SearchConfig(targets="params=0.7", rounds=2, samples=2, seed=1)

    def evaluate(module: nn.Module) -> float:
        return float((module(x).argmax(-1) == wanted).float().mean())

    found = fxprune.search(model, x, evaluate, config=config, calibration=[x])
    done = fxprune.record(fxprune.compress(model, found.policy, x))
    assert abs(done.after.params / done.before.params - 0.7) < 0.02
    assert any(name.startswith("body.experts.") and p for name, p in found.policy.sparsity.items())


def test_macs_count_every_call() -> None:
    model, inputs, _ = made("a_step_until_all_have_halted")
    counted = fxprune.profile(model, inputs[0])
    assert counted.per_layer["body.step.up"]["macs"] > 18 * 8 * 12  # more steps than one, until all rows have halted
    found = fxprune.record(fxprune.compress(model, 0.5, inputs)).before.per_layer
    assert found["body.step.up"]["macs"] == counted.per_layer["body.step.up"]["macs"]


def test_what_is_no_part_says_why() -> None:
    reasons = {}
    for name in ("a_branch_that_is_not_taken", "what_a_part_holds_is_read_inner", "what_a_part_holds_is_read_number"):
        model, inputs, _ = made(name)
        text = str(fxprune.explain(model, inputs))
        reasons[name] = [line for line in text.splitlines() if "inside 'body', which could not be traced" in line]
        assert "parts that were traced by themselves" in text
    never, inner, number = reasons.values()
    assert any("; and it was not called on the example" in line and "body.never" in line for line in never)
    assert any("; and code outside of it calls what is in it" in line for line in inner)
    assert any("; and code outside of it reads its weights or sizes" in line for line in number)
    assert "Operations without a rule" not in text and "body (Reading) could not be traced: " in text
    names = [line for line in text.splitlines() if "of a part traced by itself" in line]
    assert names and len(names) == len(set(names))


class Kinds(nn.Module):
    """Code that knows its modules by what they are, in a way that parts are not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.open = Mlp(8, 12), Mlp(8, 12)

    def forward(self, x: Tensor) -> Any:
        if x.abs().max() > 1e6:
            return x
        y = self.open(x)
        return self.inner(x) + y if type(self.inner) is Mlp else y


def test_parts_that_change_the_result_are_none() -> None:
    torch.manual_seed(0)
    model, x = Around(Kinds()).eval(), torch.randn(3, 6, 5)
    graph = fxprune.analyze(model, x)
    assert not graph.traced.parts and any(g.prunable for g in graph.groups)
    why = next(g.reason for g in graph.groups if g.name == "body.inner.up")
    assert "traced by itself it computes something else" in why
    fxprune.compress(graph, 0.5, x, verify=True)


class Trying(nn.Module):
    """A part that fails is left by an exception, after which code reads what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.open = Mlp(7, 12), Mlp(8, 12)

    def forward(self, x: Tensor) -> Any:
        if x.abs().max() > 1e6:
            return x
        with contextlib.suppress(RuntimeError):
            x = self.inner(x)
        return self.open(self.inner(x[..., :7]).sum(-1, keepdim=True) * self.inner.up.out_features**-0.5 + x)


def test_what_is_read_behind_a_part_that_failed_is_seen() -> None:
    torch.manual_seed(0)
    graph = fxprune.analyze(Around(Trying()).eval(), torch.randn(3, 6, 5))
    assert list(graph.traced.parts) == ["body.open"]


class Guarded(nn.Module):
    """``run(x, inner, other)`` where values say so."""

    def __init__(self, run: Callable[..., Any], inner: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.run, self.inner, self.other = run, inner, other or Mlp(8, 12)
        self.table = {"inner": self.inner}

    def forward(self, x: Tensor) -> Any:
        return self.other(self.run(self, x)) if x.abs().max() < 1e6 else x


def guarded(run: Callable[..., Any], inner: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Around(Guarded(run, inner)).eval(), torch.randn(3, 6, 5)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.width = nn.Linear(8, 12), nn.Linear(12, 8), 12

    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x).view(*x.shape[:-1], 2, self.width // 2).relu().flatten(-2))


class Rank(Mlp):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (2 if x.dim() == 2 else 1)


def test_a_part_that_was_none_is_none_where_a_file_is_loaded(tmp_path: Path) -> None:
    model, x = guarded(lambda body, x: body.inner(x) + body.inner(x[:, 0])[:, None], Rank(8, 12))
    slim: Any = fxprune.compress(model, 0.5, x, verify=True)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    for fresh in (copy.deepcopy(model), copy.deepcopy(model).to("meta")):
        for parameter in fresh.parameters():
            parameter.detach().zero_()  # with which no part computes something else
        assert gap(slim(x), fxprune.load(tmp_path / "slim.safetensors", fresh).eval()(x)) == 0


def _helper(module: Any) -> int:
    return int(module.width)


@pytest.mark.parametrize("read", [lambda body: body.inner.width, lambda body: _helper(body.inner)], ids=["itself", "in a function"])
def test_a_class_is_not_kept_where_untraced_code_reads_a_number_that_changes(read: Callable[[Any], int]) -> None:
    model, x = guarded(lambda body, x: body.inner(x) / read(body), Heads())
    with pytest.raises(UnsupportedError, match="body.inner.width becomes 6 from 12, and code of 'body'"):
        fxprune.compress(model, 0.5, x, keep_class=True)
    slim: Any = fxprune.compress(model, 0.5, x, verify=True)
    plain = slim.detached()
    assert gap(plain(x), copy.deepcopy(plain)(x)) == 0  # which has the number too


def test_a_part_under_a_name_of_the_code_around_is_the_same_part() -> None:
    model, x = guarded(lambda body, x: body.table["inner"](x), Heads())
    slim: Any = fxprune.compress(model, 0.5, x, verify=True, repair="lstsq", calibration=[x, x])
    assert slim.body.table["inner"] is slim.body.inner and isinstance(slim.body.inner, SlimModule)
    assert "body.inner.down" in fxprune.record(slim).repaired
    assert copy.deepcopy(slim).body.table["inner"](torch.randn(2, 4, 8)).shape == (2, 4, 8)


def test_a_part_that_no_calibration_input_reaches_stays_as_sliced() -> None:
    model, x = guarded(lambda body, x: body.inner(x) if x.mean() < 100 else x, Conv1())
    slim = fxprune.compress(model, 0.5, x, repair="lstsq", calibration=[x + 1e4, x + 2e4])
    assert fxprune.record(slim).before.params > fxprune.record(slim).after.params


class Conv1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.cell, self.b = nn.Linear(8, 12), nn.BatchNorm1d(6), nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.cell(self.norm(self.a(x)))[0])


class Flags(Mlp):
    def forward(self, x: Tensor, gain: float = 1.0, way: str = "a", twice: bool = False) -> Any:
        y = super().forward(x) * gain
        return (y + 1 if way == "b" else y) * (2 if twice else 1)


FLAGS: dict[str, Callable[[bool], dict[str, Any]]] = {"text": lambda up: {"way": "ab"[up]}, "flag": lambda up: {"twice": up}}


@pytest.mark.parametrize("kind", FLAGS)
def test_a_flag_that_the_example_does_not_give_is_an_error(kind: str) -> None:
    model, x = guarded(lambda body, x: body.inner(x, x.mean().item(), **FLAGS[kind](bool(x.mean() > 100))), Flags(8, 12))
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert gap(zeroed(model, fxprune.record(slim).kept)(x * 2), slim(x * 2)) < 1e-5  # other numbers are taken
    with pytest.raises(AssertionError, match="the part 'body.inner' was traced with a condition on the value False and takes no other"):
        with torch.no_grad():
            slim.get_parameter("first.bias").fill_(1000.0)
        slim(x)


OTHERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "copied in training": lambda body, x: (
        body.inner(x) * (copy.deepcopy(body.other)(x).mean() * body.inner.up.out_features if body.training else 1)
    ),
    "other parameters": lambda body, x: body.inner(x) + torch.func.functional_call(body.inner, {"up.bias": torch.arange(12.0)}, (x,)),
}


@pytest.mark.parametrize("how", OTHERS)
def test_code_that_copies_modules_or_swaps_their_parameters_is_seen(how: str) -> None:
    model, x = guarded(OTHERS[how], Mlp(8, 12))
    graph = fxprune.analyze(model, x)
    assert "body.inner" not in graph.traced.parts
    slim = fxprune.compress(graph, 0.5, x, verify=True)
    assert gap(zeroed(model, fxprune.record(slim).kept).train()(x), slim.train()(x)) < 1e-5


def test_without_values_nothing_is_seen() -> None:
    torch.manual_seed(0)
    model, x = Around(Exit()).eval(), torch.randn(3, 6, 5)
    assert set(fxprune.analyze(model, x.to("meta")).traced.parts) == {"body.first", "body.second"}  # its inputs are drawn
    graph = fxprune.analyze(model.to("meta"), x.to("meta"))
    assert not graph.traced.parts
    assert all("what is in it is not seen without values" in g.reason for g in graph.groups if g.name.startswith("body."))


class Root(nn.Module):
    """A root that cannot be traced itself."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.more = body, Mlp(8, 12)

    def forward(self, x: Tensor) -> Any:
        return self.more(self.body(x)) if x.abs().max() < 1e6 else x


@pytest.mark.parametrize("what", ["weight", "shape", "number", "data", "inner", "parameters"])
def test_code_of_the_root_that_reads_what_a_part_holds_keeps_it_whole(what: str) -> None:
    torch.manual_seed(0)
    model, x = Reading(what).eval(), torch.randn(3, 6, 8)
    graph = fxprune.analyze(model, x)
    assert list(graph.traced.parts) == ["open"]
    slim = fxprune.compress(graph, 0.5, x, verify=True)
    again = fxprune.compress(slim, 0.5, x, verify=True)
    assert fxprune.record(again).after.params < fxprune.record(slim).after.params


def test_parts_of_a_root_have_parts_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), Mixture("numel"), Mlp(8, 11))
    model, x = Root(body).eval(), torch.randn(3, 6, 8)
    graph = fxprune.analyze(model, x)
    assert graph.traced.in_parts and set(graph.traced.parts) == {"body", "more", *(f"body.1.experts.{i}" for i in range(4))}
    slim = fxprune.compress(graph, 0.5, x, verify=True)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    for original in (copy.deepcopy(model), copy.deepcopy(model).to("meta")):  # the file names the parts: nothing is run
        assert torch.equal(fxprune.load(tmp_path / "slim.safetensors", original).eval()(x), slim(x))
    batches = [torch.randn(6, 6, 8) for _ in range(6)]
    errors = [
        _difference(model, fxprune.compress(graph, 0.5, x, importance="l2", repair=r, calibration=batches)) for r in ("none", "lstsq")
    ]
    assert errors[1] < 0.6 * errors[0]


def _difference(model: nn.Module, slim: nn.Module) -> float:
    x = torch.randn(40, 6, 8)
    with torch.no_grad():
        return float((slim(x) - model(x)).square().mean())


def test_a_part_that_is_called_in_two_forms_stays_whole() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 20), nn.Linear(20, 10)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
            y = self.first(x).relu()
            return self.last(y if scale is None else y * scale)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.alone = Block(), Block()

        def forward(self, x: Tensor) -> Any:
            if x.norm() > 1e5:
                return x
            y = self.shared(x)
            return self.alone(self.shared(y, y.mean()))

    graph = fxprune.analyze(Twice().eval(), torch.randn(3, 10))
    assert [group.name for group in graph.groups if group.prunable] == ["alone.first"]
    assert "'scale'" in graph.traced.no_parts["shared"]
