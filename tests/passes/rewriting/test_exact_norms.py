"""``norms="exact"``: statistics over channels keep the divisor of the original, so the oracle leaves nothing out."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, UnsupportedError
from tests.passes.helpers import TOLERANCE, gap, prime, zeroed


class Around(nn.Module):
    """Two linear layers around something that shares a statistic over their channels."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], width: int = 12, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, width), nn.Linear(width, 5), function
        for name, part in parts.items():
            self.add_module(name, part)
        self.gain, self.shift = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.function(self, self.a(x)))


class Pooled(nn.Module):
    """Convolutions around something over channels that gives maps."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 3), function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.function(self, self.a(x)))


def hand_written(net: Any, y: Tensor) -> Tensor:
    """RMS norm as language models write it."""
    found: Tensor = net.gain * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))
    return found


def residual(net: Any, y: Tensor) -> Tensor:
    """The feed-forward half of a transformer layer."""
    found: Tensor = net.n(y + net.c(F.gelu(net.d(net.m(y)))))
    return found


def tokens() -> tuple[Tensor]:
    return (torch.randn(2, 7, 6),)


def images() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 8),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor]]]] = {
    "layer_norm": (lambda: Around(lambda n, y: n.n(y), n=nn.LayerNorm(12)), tokens),
    "layer_norm_without_affine": (lambda: Around(lambda n, y: n.n(y), n=nn.LayerNorm(12, elementwise_affine=False)), tokens),
    "layer_norm_without_bias": (lambda: Around(lambda n, y: n.n(y), n=nn.LayerNorm(12, bias=False)), tokens),
    "layer_norm_function": (lambda: Around(lambda n, y: F.layer_norm(y, (12,), n.gain, n.shift, 1e-3)), tokens),
    "layer_norm_over_two_axes": (lambda: Around(lambda n, y: n.n(y), n=nn.LayerNorm((7, 12))), tokens),
    "rms_norm": (lambda: Around(lambda n, y: n.n(y), n=nn.RMSNorm(12, eps=1e-3)), tokens),
    "rms_norm_without_eps": (lambda: Around(lambda n, y: n.n(y), n=nn.RMSNorm(12)), tokens),
    "rms_norm_without_weight": (lambda: Around(lambda n, y: n.n(y), n=nn.RMSNorm(12, elementwise_affine=False)), tokens),
    "rms_norm_function": (lambda: Around(lambda n, y: F.rms_norm(y, (12,), n.gain, 1e-3)), tokens),
    "rms_norm_by_hand": (lambda: Around(hand_written), tokens),
    "group_norm_of_one": (lambda: Pooled(lambda n, y: n.n(y), n=nn.GroupNorm(1, 12)), images),
    "group_norm": (lambda: Pooled(lambda n, y: n.n(y), n=nn.GroupNorm(3, 12)), images),
    "group_norm_of_whole_groups": (lambda: Pooled(lambda n, y: n.n(y), n=nn.GroupNorm(6, 12)), images),
    "group_norm_function": (lambda: Pooled(lambda n, y: F.group_norm(y, 2, eps=1e-3)), images),
    "softmax": (lambda: Around(lambda n, y: y.softmax(-1)), tokens),
    "log_softmax": (lambda: Around(lambda n, y: F.log_softmax(y, dim=2)), tokens),
    "squeeze": (lambda: Pooled(lambda n, y: y * y.mean(1, keepdim=True).sigmoid()), images),
    "largest": (lambda: Pooled(lambda n, y: y * y.amax(1, keepdim=True)), images),
    "spread": (lambda: Pooled(lambda n, y: y / (y.std(1, keepdim=True) + 1)), images),
    "mean_and_variance": (lambda: Around(lambda n, y: (y - torch.var_mean(y, -1, keepdim=True)[1]) * n.gain), tokens),
    "residual": (lambda: Around(residual, n=nn.LayerNorm(12), m=nn.LayerNorm(12), d=nn.Linear(12, 20), c=nn.Linear(20, 12)), tokens),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_slim_network_equals_the_zeroed_original(name: str) -> None:
    torch.manual_seed(0)
    draw = random.Random(name)
    make, inputs = CASES[name]
    model, x = make(), inputs()
    prime(model, x)
    graph = fxprune.analyze(model, x)
    free = [g for g in graph.groups if g.prunable]
    assert free and not any(g.undefined for g in free), [(g.name, g.undefined) for g in free]
    policy = {g.name: draw.choice((0.34, 0.5, 0.6)) for g in free}
    slim = fxprune.compress(model, policy, x, norms="exact", verify=True).eval()
    reference = zeroed(model, fxprune.record(slim).kept)
    for y in (x, (torch.cat([x[0], x[0][:1]]),)):
        with torch.no_grad():
            assert gap(reference(*y), slim(*y)) < TOLERANCE
    plain = fxprune.compress(model, policy, x).eval()
    noted = any(g.notes for g in free)
    with torch.no_grad():
        assert (gap(reference(*x), plain(*x)) > 10 * TOLERANCE) == noted, "plain and exact differ just where a note says so"
    keep = fxprune.compress(model, 0.0, x, norms="exact").eval()
    with torch.no_grad():
        assert torch.equal(keep(*x), model(*x))
    assert fxprune.record(slim).policy.options["norms"] == "exact"


def test_what_is_not_zero_when_it_is_removed_stays_undefined() -> None:
    """A sigmoid of a removed channel is a half: the zeroed original's norm sees that."""
    model, x = Around(lambda n, y: n.n(y.sigmoid()), n=nn.LayerNorm(12)), tokens()
    groups = [g for g in fxprune.analyze(model, x).groups if g.prunable]
    assert groups[0].notes == groups[0].undefined and "statistics over channels" in groups[0].undefined[0]
    fxprune.compress(model, 0.5, x, norms="exact", verify=True)  # the group is left out of the comparison


def normed_in_groups(net: Any, y: Tensor) -> Tensor:
    """Group norm as it is written by hand."""
    z = y.view(y.shape[0], 3, -1)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True) + 1e-5).sqrt()
    return z.view(y.shape)


def normed_by_function(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return F.layer_norm(y.view(b, 3, -1), (c // 3 * h * w,)).view(b, c, h, w)


def groups_with_the_batch(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    gain = torch.linspace(0.5, 2, 12)
    return F.group_norm(y.reshape(1, b * c, h, w), b * 3).view(b, c, h, w) * gain.view(1, -1, 1, 1)


FOLDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "group_norm_by_hand": normed_in_groups,
    "layer_norm_of_groups": normed_by_function,
    "group_norm_with_the_batch": groups_with_the_batch,
    "layer_norm_of_the_size": lambda n, y: F.layer_norm(y, y.shape[1:]),
    "rms_norm_of_the_size": lambda n, y: F.rms_norm(y, y.shape[1:]),
    "spread_of_a_sample": lambda n, y: y / (y.flatten(1).std(1)[:, None, None, None] + 1),
    "spread_of_all": lambda n, y: y / (y.var() + 1),
    "mean_of_a_sample": lambda n, y: y - y.flatten(1).mean(1).view(-1, 1, 1, 1),
    "softmax_of_a_sample": lambda n, y: y * y.flatten(1).softmax(1).view(y.shape) * 100,
    "softmax_of_transposed": lambda n, y: y * y.flatten(2).mT.flatten(1).softmax(-1).view(y.shape[0], -1, y.shape[1]).mT.reshape(y.shape),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("space", [8, 3])
def test_zeros_are_counted_where_space_is_folded_in(name: str, space: int) -> None:
    """A statistic over channels and space: larger maps have more zeros."""
    torch.manual_seed(0)
    model, x = Pooled(FOLDED[name]), (torch.randn(2, 3, space, space),)
    prime(model, x)
    graph = fxprune.analyze(model, x)
    assert not any(g.undefined for g in graph.groups if g.prunable)
    slim = fxprune.compress(graph, 0.5, norms="exact", verify=True).eval()
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        for shape in ((2, 3, 8, 8), (1, 3, 6, 6), (3, 3, 5, 12)):
            y = torch.randn(shape)
            assert gap(reference(y), slim(y)) < TOLERANCE, shape
    exported = torch.export.export(slim, x).module()
    assert gap(slim(*x), exported(*x)) < 1e-5


class Beside(nn.Module):
    """The spread of a map beside what is pooled of another one."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.size, self.a, self.c, self.b = size, nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, other = self.a(x), self.c(x)
        if self.size:
            other = F.adaptive_avg_pool2d(other, self.size)
        found: Tensor = self.b(y / (torch.cat([y.flatten(1), other.flatten(1)], 1).std(1).view(-1, 1, 1, 1) + 1))
        return found


def test_where_nobody_knows_how_many_zeros_there_are_it_stays_undefined() -> None:
    """A pooled map has as many positions for every input, the one beside it has not."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    undefined = [g for g in fxprune.analyze(Beside(2).eval(), x).groups if g.prunable and g.undefined]
    assert len(undefined) == 2 and all("a reduction over channels" in g.undefined[0] for g in undefined)
    model = Beside(None).eval()
    slim = fxprune.compress(model, {"a": 0.5, "c": 0.25}, x, norms="exact", verify=True).eval()
    reference = zeroed(model, fxprune.record(slim).kept)
    with torch.no_grad():
        y = torch.randn(3, 3, 6, 9)
        assert gap(reference(y), slim(y)) < TOLERANCE


def test_sizes_that_are_fixed_stay_numbers() -> None:
    for name in ("layer_norm", "layer_norm_over_two_axes", "softmax", "spread", "largest"):
        make, inputs = CASES[name]
        slim = fxprune.compress(make().eval(), 0.5, inputs(), norms="exact")
        pads = [node for node in slim.graph.nodes if node.target is F.pad]
        assert pads and all(type(n) is int for node in pads for n in node.args[1]), name


def test_the_slim_module_saves_copies_exports_and_compresses_again(tmp_path: Path) -> None:
    for name in ("layer_norm", "rms_norm", "group_norm"):
        make, inputs = CASES[name]
        model, x = make().eval(), inputs()
        slim = fxprune.compress(model, 0.5, x, norms="exact").eval()
        fxprune.save(slim, tmp_path / f"{name}.safetensors")
        again = fxprune.load(tmp_path / f"{name}.safetensors", copy.deepcopy(model)).eval()
        exported = torch.export.export(slim, x).module()
        with torch.no_grad():
            for twin in (again, copy.deepcopy(slim), exported):
                assert gap(slim(*x), twin(*x)) < 1e-6
        assert fxprune.compress(slim, 0.5, x)(*x).shape == model(*x).shape


def test_the_class_stays_where_only_weights_change() -> None:
    make, inputs = CASES["rms_norm"]
    model, x = make(), inputs()
    prime(model, x)
    slim = fxprune.compress(model, 0.5, x, norms="exact", keep_class=True)
    assert type(slim).__name__ == "Around"
    assert slim.get_submodule("n").eps == pytest.approx(2e-3)
    with torch.no_grad():
        assert gap(zeroed(model, fxprune.record(slim).kept)(*x), slim.eval()(*x)) < TOLERANCE
    with pytest.raises(UnsupportedError, match=r"norms='exact' puts other operations in place of n \(LayerNorm\)"):
        fxprune.compress(CASES["layer_norm"][0](), 0.5, x, norms="exact", keep_class=True)


def test_a_graph_keeps_what_it_was_analysed_with_and_a_policy_names_it(tmp_path: Path) -> None:
    make, inputs = CASES["layer_norm"]
    model, x = make().eval(), inputs()
    wanted = fxprune.compress(model, 0.5, x, norms="exact")
    graph = fxprune.analyze(model, x, norms="exact")
    policy = fxprune.Policy.uniform(graph, 0.5)
    policy.save(tmp_path / "policy.json")
    late = fxprune.compress(fxprune.analyze(model, x), 0.5, norms="exact")
    for slim in (fxprune.compress(graph, 0.5), fxprune.compress(model, tmp_path / "policy.json"), late):
        assert torch.equal(slim(*x), wanted(*x)) and fxprune.record(slim).policy.options["norms"] == "exact"


def test_a_search_scores_and_returns_networks_with_exact_norms() -> None:
    make, inputs = CASES["layer_norm"]
    model, x = make().eval(), inputs()
    config = fxprune.SearchConfig(targets=("macs=0.5",), tolerance=0.2, strategy="uniform", repair="none", norms="exact", device="cpu")
    found = fxprune.search(model, x, lambda module: -float((module(*x) - model(*x)).square().mean()), config=config)
    assert any(node.target is F.pad for node in found.model.graph.nodes)
    assert torch.equal(fxprune.compress(model, found.policy)(*x), found.model(*x))


def test_another_word_is_an_error() -> None:
    with pytest.raises(InputError, match="it must be 'plain' or 'exact'"):
        fxprune.analyze(CASES["rms_norm"][0](), tokens(), norms="zero")
    with pytest.raises(InputError, match="it must be 'plain' or 'exact'"):
        fxprune.compress(CASES["rms_norm"][0](), 0.5, tokens(), norms="zero")
