"""Repair without training: layers as matrix products, the closed form, and what it does to pruned networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.importance.criteria import scores
from fxprune.passes.planning.plan import keep_counts
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.verify import difference
from fxprune.repair import fitting, repeated
from fxprune.repair import repairer as repairs
from fxprune.repair.distance import distances, unlikeness
from fxprune.repair.least_squares import Moments, fitted
from fxprune.repair.matrices import choose, form_of, grouped, input_rows, matrices, output_rows, set_matrices
from fxprune.repair.moments import collect
from fxprune.repair.recurrent import Sequences, fit_recurrent
from fxprune.repair.repairer import Repairer
from fxprune.repair.splitting import FIT, JUDGE, TUNE, pieces

LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(5, 7), (3, 5)),
    (lambda: nn.Linear(5, 7), (3, 4, 5)),
    (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 7)),
    (lambda: nn.Conv2d(6, 8, (3, 2), dilation=2, padding=(2, 1), groups=2), (2, 6, 9, 7)),
    (lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6, padding_mode="reflect"), (2, 6, 9, 7)),
    (lambda: nn.Conv1d(4, 6, 5, padding="same", padding_mode="circular"), (2, 4, 11)),
    (lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 5, 3)),
    (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
    (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 4)),
    (lambda: nn.ConvTranspose2d(6, 4, (4, 3), stride=(2, 3), padding=(1, 0), dilation=(1, 2), groups=2), (2, 6, 5, 4)),
    (lambda: nn.ConvTranspose1d(6, 6, 4, stride=2, groups=6), (2, 6, 5)),
]


@pytest.mark.parametrize("limit", [5, 10_000])
@pytest.mark.parametrize("case", range(len(LAYERS)))
def test_a_layer_is_a_product_of_its_rows_with_its_matrices(case: int, limit: int) -> None:
    make, shape = LAYERS[case]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    output = layer(x)
    form, weight = form_of(layer), _weight(layer)
    assert form is not None
    places = choose(form, weight, x, limit, seed=1)
    product = input_rows(form, weight, x, places) @ matrices(form, weight).transpose(1, 2)
    wanted = grouped(form, output_rows(form, output - _bias(layer, output), places))
    torch.testing.assert_close(product, wanted, atol=1e-5, rtol=1e-5)
    before = weight.clone()
    set_matrices(form, weight, matrices(form, weight) * 2)
    assert torch.equal(_weight(layer), before * 2)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _bias(layer: nn.Module, output: Tensor) -> Tensor:
    bias = layer.bias
    assert isinstance(bias, Tensor)
    return bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (_weight(layer).ndim - 2))


def test_the_fit_finds_the_change_and_the_constant_that_make_the_responses() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4000, 6) + 3
    start, true, constant = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(2, 3)
    moments = Moments()
    for part in x.split(500, dim=1):
        p, y = part @ start.transpose(1, 2), part @ true.transpose(1, 2) + constant[:, None]
        moments.add(part, p, y - p)
    change = moments.changes([1e-6], centred=True)[0]
    torch.testing.assert_close(start + change.float(), true, atol=1e-3, rtol=1e-3)
    shift = moments.shift(change)
    torch.testing.assert_close(shift.float(), constant, atol=5e-3, rtol=5e-3)
    assert float(moments.errors(change, shift).max()) < 1e-3 < float(moments.errors(None, 0.0).min())
    got, wanted = moments.variances(change)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [20, 2000])
def test_the_ridge_is_as_strong_as_the_rows_need(rows: int) -> None:
    torch.manual_seed(0)
    true = torch.randn(1, 4, 40) * 0.3

    def moments(count: int) -> Moments:
        x, found = torch.randn(1, count, 40), Moments()
        found.add(x, torch.zeros(1, count, 4), x @ true.transpose(1, 2) + torch.randn(1, count, 4))
        return found

    fit = fitted([moments(rows), moments(rows), moments(rows)], 1.0, takes_shift=True, refit=True)
    assert fit.after <= fit.before
    if rows == 20:
        assert fit.ridge is None or fit.ridge >= 1.0
    else:
        assert fit.ridge is not None and fit.ridge <= 0.1


@pytest.mark.parametrize("features", [1, 64, 150, 600])
def test_the_moments_of_many_features_are_those_of_all_pairs(features: int) -> None:
    x = torch.randn(2, 700, features, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for part in x.split(300, dim=1):
        moments.add(part, part[..., :1], part[..., :1])
    wanted = torch.stack([torch.atleast_2d(torch.cov(rows.T.double(), correction=0)) for rows in x])
    torch.testing.assert_close(moments.covariance(), wanted, atol=1e-5, rtol=1e-5)


class Doubled(nn.Module):
    """Every hidden channel comes twice, once with half the importance: nothing needs to be lost."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.second = nn.Conv2d(16, 6, 3, padding=1)
        with torch.no_grad():
            self.first.weight[8:] = 0.5 * self.first.weight[:8]
            if self.first.bias is not None:
                self.first.bias[8:] = 0.5 * self.first.bias[:8]
            self.second.weight[:, 8:] *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.norm(self.first(x)))).mean((2, 3))
        return y


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
CALIBRATION = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def _error(model: nn.Module, repair: str, policy: float = 0.5) -> float:
    slim = fxprune.compress(model, policy, X, importance="l2", repair=repair, calibration=CALIBRATION, verify=True)
    assert fxprune.record(slim).repair == repair
    with torch.no_grad():
        return difference(model.eval()(X), slim.eval()(X))


def test_least_squares_uses_what_is_left_for_what_went() -> None:
    model = Doubled(norm=False).eval()
    errors = {repair: _error(model, repair) for repair in ("none", "bias", "lstsq")}
    assert errors["lstsq"] < 0.02 < 0.1 < errors["none"]
    assert errors["lstsq"] < errors["bias"] < errors["none"]


def test_channels_that_never_change_go_into_the_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight[8:], model[0].bias[8:] = 0.0, 2.0  # type: ignore[operator]
    x = torch.randn(64, 6)
    errors = []
    for repair in ("none", "bias"):
        slim = fxprune.compress(model, {"0": 0.5}, x, importance=_first_eight, repair=repair, calibration=[x])
        with torch.no_grad():
            errors.append(difference(model(x), slim(x)))
    assert errors[1] < 1e-5 < 0.1 < errors[0]


def _first_eight(group: fxprune.Group, module: nn.Module) -> Tensor:
    return (torch.arange(group.size) < 8).float()


class Blocks(nn.Module):
    """Residual, depthwise and grouped layers without biases: the constants go into running means."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Dropout(0.1))
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.b(self.depthwise(self.a(x))))
        y: Tensor = self.head(F.relu(self.grouped(x)).mean((2, 3)))
        return y


def settled(model: nn.Module) -> nn.Module:
    """With running statistics of its own, rather than those of a fresh network."""
    with torch.no_grad():
        for _ in range(20):
            for batch in CALIBRATION:
                model.train()(batch)
    return model.eval()


def test_least_squares_mends_residual_depthwise_and_grouped_layers() -> None:
    model = settled(Blocks())
    errors = {repair: _error(model, repair) for repair in ("none", "bn", "bias", "lstsq")}
    assert errors["lstsq"] < errors["bias"] < 0.5 * min(errors["none"], errors["bn"])


@pytest.mark.parametrize("make", [lambda: settled(Blocks()), lambda: Doubled(norm=False).eval()])
def test_layers_of_many_features_are_fitted_along_their_main_directions(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    narrow = _error(model, "lstsq")
    monkeypatch.setattr(fitting, "WIDE", 4)
    for rank, most in ((1024, 1.2 * narrow + 1e-3), (12, _error(model, "bias"))):
        monkeypatch.setattr(fitting, "RANK", rank)
        assert _error(model, "lstsq") < most


def test_only_the_bounds_on_memory_differ_between_kept_and_streamed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(Blocks())

    def weights() -> dict[str, Tensor]:
        return fxprune.compress(model, 0.4, X, importance="l2", repair="lstsq", calibration=CALIBRATION).state_dict()

    kept = weights()
    monkeypatch.setattr(repairs, "ROOM", 0)
    streamed = weights()
    assert all(torch.equal(kept[name], streamed[name]) for name in kept)


def test_the_model_and_what_is_not_reached_stay_as_they_are() -> None:
    model = settled(Blocks())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    slim = fxprune.compress(model, {"grouped": 0.5}, X, importance="l2", repair="lstsq", calibration=calibration)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(slim.state_dict()["stem.0.weight"], before["stem.0.weight"])
    assert slim.state_dict()["head.weight"].shape == (5, 8)
    assert not torch.equal(slim.state_dict()["head.weight"], before["head.weight"][:, fxprune.record(slim).kept["head.weight"][1]])


class Counted:
    """Samples that linear layers run on, by how many features they read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples: Counter[int] = Counter()
        forward = nn.Linear.forward

        def counted(layer: nn.Linear, x: Tensor) -> Tensor:
            self.samples[layer.in_features] += len(x)
            return forward(layer, x)

        monkeypatch.setattr(nn.Linear, "forward", counted)


def test_the_record_says_what_was_done_to_each_layer(tmp_path: Path) -> None:
    model = settled(Blocks())
    slim = fxprune.compress(model, 0.4, X, importance="l2", repair="lstsq", calibration=CALIBRATION)
    made = fxprune.record(slim)
    layers = {"a.0", "depthwise.0", "b.0", "grouped", "head"}
    assert set(made.repaired) == layers
    fitted = [one for one in made.repaired.values() if one.done == "fitted"]
    assert fitted and all(one.after < one.before and one.ridge is not None for one in fitted)
    assert any(f"reached 5 layers: {len(fitted)} fitted" in note for note in made.notes)
    fxprune.save(slim, tmp_path / "slim.safetensors")
    assert fxprune.record(fxprune.load(tmp_path / "slim.safetensors", Blocks())).repaired == made.repaired


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.b(F.relu(self.norm(self.a(x))))
        return y


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.layers, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Residual(), Residual()), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(F.relu(self.stem(x))).mean((2, 3)))
        return y


@pytest.mark.parametrize("repair", ["bn", "bias", "lstsq"])
@pytest.mark.parametrize("left_out", [0, 1])
def test_a_kept_class_is_repaired_as_the_graph_is(repair: str, left_out: int) -> None:
    model = settled(Stack()).train()
    graph = fxprune.analyze(model, X, blocks=True)
    policy = {g.name: 0.4 for g in graph.groups if g.prunable} | {b.name: 1.0 for b in graph.blocks[:left_out]}
    if left_out:
        policy.pop("layers.0.a")
    made: list[Any] = [
        fxprune.compress(graph, policy, X, importance="l2", repair=repair, calibration=CALIBRATION, keep_class=keep)
        for keep in (False, True)
    ]
    plain, own = made
    assert type(own) is Stack and fxprune.record(own).repaired == fxprune.record(plain).repaired
    sliced, held = fxprune.compress(graph, policy, X, importance="l2").state_dict(), own.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in plain.state_dict().items())
    assert any(not torch.equal(tensor, held[name]) for name, tensor in sliced.items())
    assert all(one.requires_grad for one in own.parameters()) and own.training
    assert torch.equal(own.eval()(X), plain.eval()(X))


def test_the_moments_of_what_layers_read_are_collected_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = settled(Blocks())
    graph = fxprune.analyze(model, X)
    counted = Counted(monkeypatch)
    found = collect(graph, CALIBRATION)
    assert counted.samples[16] == 8  # the last layer itself is not run, but for four samples, whole and in halves, tried first
    assert set(found) == {"a.0.weight", "b.0.weight", "grouped.weight", "head.weight"}
    one, inputs = found["head.weight"], []
    model.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in CALIBRATION:
            model(batch)
    x = torch.cat(inputs).double()
    torch.testing.assert_close(one.second[0], x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.covariance[0], torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-6)
    assert one.rows == len(x) and one.width == 1 and one.axis == 1 and found["grouped.weight"].width == 9
    split = collect(graph, CALIBRATION, memory=1)
    assert all(torch.equal(split[name].second, found[name].second) for name in found)


def test_a_constant_that_has_no_place_is_said() -> None:
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(32, 6) for _ in range(2)]
    slim = fxprune.compress(model, {"0": 0.5}, batches[0], importance="l2", repair="lstsq", calibration=batches)
    assert any("no constant to 2:" in note for note in fxprune.record(slim).notes)


def test_a_layer_that_is_read_otherwise_as_well_is_left_and_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(F.relu(self.again(F.relu(self.first(x))))) + self.again.weight.sum()
            return y

    x = torch.randn(16, 6)
    slim = fxprune.compress(Tied().eval(), 0.5, x, importance="l2", repair="lstsq", calibration=[x])
    assert any("left again as sliced" in note for note in fxprune.record(slim).notes)


class Siamese(nn.Module):
    """An encoder with BatchNorm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat([self.encoder(one).mean((2, 3)) for one in (x, x.flip(3) * 0.5)], 1))
        return found


class Pyramid(nn.Module):
    """A head that two levels share."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 6, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.fine(x))
        return self.head(fine), self.head(F.relu(self.coarse(fine)))


class Looped(nn.Module):
    """A perceptron that runs three times, on a weight of its own that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.out = nn.Linear(8 * 8, 24), nn.Linear(48, 24), nn.Linear(24, 4)
        self.up = nn.Parameter(torch.randn(48, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, 0].flatten(1))
        for _ in range(3):
            x = x + self.down(F.gelu(F.linear(x, self.up)))
        found: Tensor = self.out(x)
        return found


@pytest.mark.parametrize(
    ("make", "layers"),
    [(Siamese, {"encoder.3"}), (Pyramid, {"head.0", "head.2"}), (Looped, {"up", "down"})],
    ids=["siamese", "pyramid", "looped"],
)
def test_layers_that_are_called_several_times_are_fitted_to_all_their_calls(make: Callable[[], nn.Module], layers: set[str]) -> None:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for i in range(10):
            model.train()(_smooth((3, 8, 8), 32, 1000 + i))
    model.eval()
    calibration, unseen = list(_smooth((3, 8, 8), 320, 1).split(32)), _smooth((3, 8, 8), 64, 2)
    errors = {}
    for repair in ("none", "bn", "bias", "lstsq"):
        slim = fxprune.compress(model, 0.4, unseen[:2], importance="l2", repair=repair, calibration=calibration)
        with torch.no_grad():
            errors[repair] = unlikeness([slim(unseen)], [model(unseen)])
    made = fxprune.record(slim)
    assert all(made.repaired[name].done == "fitted" for name in layers)
    assert not any("as sliced: no layer" in note for note in made.notes)
    assert errors["lstsq"] < 0.7 * min(errors["none"], errors["bn"], errors["bias"])


def test_a_layer_called_several_times_is_fitted_as_its_calls_side_by_side_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all calls together are the rows of one call on all of their inputs; in portions they are the same."""

    class Both(nn.Module):
        def __init__(self, together: bool) -> None:
            super().__init__()
            self.together, self.stem, self.again = together, nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.stem(x))
            found: Tensor = self.again(y) if self.together else torch.cat([self.again(y[: len(y) // 2]), self.again(y[len(y) // 2 :])])
            return found

    calibration = [torch.randn(20, 6, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    torch.manual_seed(0)
    one, two = Both(True).eval(), Both(False).eval()
    two.load_state_dict(one.state_dict())
    weights = []
    for model, memory in ((one, 2**30), (two, 2**30), (two, 1)):
        monkeypatch.setattr(repeated, "MEMORY", memory)
        slim = fxprune.compress(model, {"stem": 0.4}, calibration[0], importance="l2", repair="lstsq", calibration=calibration)
        assert fxprune.record(slim).repaired["again"].done == "fitted"
        weights.append(slim.get_parameter("again.weight"))
    torch.testing.assert_close(weights[1], weights[2])
    torch.testing.assert_close(weights[1], weights[0], atol=1e-3, rtol=1e-2)


def test_the_parts_of_a_network_whose_root_cannot_be_traced_are_repaired() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Blocks(), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return self.head(y) if y.sum().item() > -1e9 else y

    model = settled(Untraceable())
    assert _error(model, "lstsq") < 0.7 * _error(model, "none")


def test_what_a_repair_needs_is_said() -> None:
    model = Doubled().eval()
    with pytest.raises(InputError, match="choose one of none, bn, bias, lstsq"):
        fxprune.compress(model, 0.5, X, repair="magic")
    for repair in ("bn", "bias", "lstsq"):
        with pytest.raises(InputError, match="needs calibration data"):
            fxprune.compress(model, 0.5, X, repair=repair)


class Copies(nn.Module):
    """Four equal channels of large weights and four of small ones that differ: only copies can go without loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight[:4] = 3 * self.first.weight[:1]
            self.first.bias[:4] = 3 * self.first.bias[:1]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(x)))
        return y


def test_reconstruction_removes_what_the_others_can_stand_in_for() -> None:
    model, x = Copies().eval(), torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    errors = {}
    for importance in ("l2", "reconstruction"):
        slim = fxprune.compress(model, 3 / 8, x, importance=importance, repair="lstsq", calibration=[x])
        with torch.no_grad():
            errors[importance] = difference(model(x), slim(x))
        if importance == "reconstruction":
            removed = fxprune.record(slim).removed_units["first"]
            assert set(removed.tolist()) < {0, 1, 2, 3}
    assert errors["reconstruction"] < 0.02 < 0.1 < errors["l2"]


def test_reconstruction_ranks_every_group_and_needs_data() -> None:
    model = settled(Blocks())
    graph = fxprune.analyze(model, X)
    found = scores(graph, "reconstruction", CALIBRATION)
    for group in graph.groups:
        if group.prunable:
            assert len(set(found[group.name].tolist())) == group.size  # told apart, so that no order of equals decides
    assert found["stem.0"].tolist() == scores(graph, "reconstruction", CALIBRATION)["stem.0"].tolist()
    with pytest.raises(InputError, match='"reconstruction" needs calibration data'):
        fxprune.compress(model, 0.5, X, importance="reconstruction")


class Padded(nn.Conv2d):
    """Pads in ``forward``, as the layers of many published networks do: it is traced as a call of a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _depthwise() -> nn.Module:
    layers = [Padded(3, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU6(), Padded(24, 24, 3, groups=24, bias=False), nn.BatchNorm2d(24)]
    return nn.Sequential(*layers, nn.ReLU6(), nn.Conv2d(24, 12, 1), nn.Flatten(), nn.Linear(12 * 64, 6))


class Functional(nn.Module):
    """Weights that are parameters, read by functions: ``addmm``, ``@`` of a transpose with the bias added apart, ``linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(20, 24) * 0.3)
        self.a_bias = nn.Parameter(torch.randn(24))
        self.b, self.b_bias = nn.Parameter(torch.randn(16, 24) * 0.3), nn.Parameter(torch.randn(16))
        self.c = nn.Parameter(torch.randn(5, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.addmm(self.a_bias, x, self.a))
        x = F.relu(x @ self.b.t() + self.b_bias)
        return F.linear(x, self.c)


class Sequence(nn.Module):
    """Recurrent layers that read each other."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(6, 24)
        self.cell = kind(24, 16, batch_first=True, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cell(torch.tanh(self.first(x)))[0])
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y: Tensor = self.head(x + self.attention(x, x, x, need_weights=False)[0])
        return y


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # network, form of a sample, samples
    "depthwise, padded in forward": (_depthwise, (3, 8, 8), 64),
    "functions of parameters": (Functional, (20,), 256),
    "a classifier with fewer rows than features": (
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 40)),
        (3, 8, 8),
        48,
    ),
    "no BatchNorm": (lambda: Doubled(norm=False), (3, 8, 8), 64),
    "residual": (Blocks, (3, 8, 8), 64),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 3, 1)),
        (3, 8, 8),
        32,
    ),
    "LSTM": (lambda: Sequence(nn.LSTM, bidirectional=True), (9, 6), 128),
    "GRU": (lambda: Sequence(nn.GRU, num_layers=2), (9, 6), 128),
    "RNN": (lambda: Sequence(nn.RNN), (9, 6), 128),
    "attention": (Attention, (9, 6), 128),
    "BatchNorm behind a concatenation": (lambda: Dense(), (3, 8, 8), 64),
}


class Dense(nn.Module):
    """Channels meet in a concatenation before they are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.norm(torch.cat([x, self.b(x)], 1)))
        y: Tensor = self.head(x).mean((2, 3))
        return y


def _smooth(shape: tuple[int, ...], samples: int, seed: int) -> Tensor:
    """Inputs of a few directions, as natural ones have: what is left can stand in for what went."""
    drawn = torch.Generator().manual_seed(0)
    directions = torch.randn(6, int(torch.tensor(shape).prod()), generator=drawn)
    mixed = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed)) @ directions
    noise = torch.randn(samples, directions.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    return (mixed + 0.3 * noise).reshape(samples, *shape)


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_nowhere_worse_than_batchnorm_alone_on_inputs_that_were_not_fitted(kind: str) -> None:
    make, shape, count = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for i in range(10):
            model.train()(_smooth(shape, 32, 1000 + i))
    model.eval()
    calibration, unseen = list(_smooth(shape, count, 1).split(16)), _smooth(shape, 128, 2)
    errors = {}
    for repair in ("bn", "lstsq", "joint"):
        slim = fxprune.compress(model, 0.4, unseen[:2], importance="l2", repair=repair, calibration=calibration)
        with torch.no_grad():
            errors[repair] = float((slim(unseen) - model(unseen)).square().mean() / model(unseen).var())
    assert errors["joint"] <= errors["lstsq"] < errors["bn"]
    made = fxprune.record(slim)
    assert made.repaired and not any("as sliced: no layer" in note for note in made.notes)


@pytest.mark.parametrize(("errors", "kept"), [((2.0, 1.0, 3.0), "bn"), ((2.0, 1.5, 1.0), "none"), ((1.0, 1.5, 0.5), "lstsq")])
def test_what_is_worse_on_inputs_that_were_not_fitted_is_taken_back(
    errors: tuple[float, ...], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told that the outputs are off by so much after least squares, after ``bn`` and with no repair, the best is what is left."""
    model = settled(Blocks())
    wanted = fxprune.compress(model, 0.4, X, importance="l2", repair=kept, calibration=CALIBRATION).state_dict()
    given = iter(errors)
    monkeypatch.setattr(repairs, "unlikeness", lambda found, wanted: next(given))
    slim = fxprune.compress(model, 0.4, X, importance="l2", repair="lstsq", calibration=CALIBRATION)
    assert all(torch.equal(wanted[name], value) for name, value in slim.state_dict().items())
    said = [note for note in fxprune.record(slim).notes if note.startswith("repair fell back")]
    assert len(said) == (kept != "lstsq") and all(f"by {min(errors):.3g} without" in note for note in said)


def test_distances_are_by_sample_and_their_mean_is_what_judges() -> None:
    drawn = torch.Generator().manual_seed(0)
    wanted = [torch.randn(6, 5, generator=drawn), torch.randn(3, 5, generator=drawn)]
    found = [wanted[0].clone(), wanted[1] + 1.0 * (torch.arange(5) == 2)]
    each = distances(found, wanted)
    assert each.shape == (9,) and (each[:6] == 0).all() and (each[6:] > 0).all()
    assert unlikeness(found, wanted) == pytest.approx(float(each.mean()))
    maps = [torch.randn(4, 3, 2, 2, generator=drawn)]
    assert unlikeness([1.5 * maps[0]], maps) == pytest.approx(0.25)
    assert distances([(maps[0], wanted[0])], [(maps[0], wanted[0])]).shape == (1,)


def test_an_embedding_reads_nothing_that_could_have_gone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(16 * 5, 4)).eval()
    batches = [torch.randint(0, 20, (32, 5), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    slim = fxprune.compress(model, 0.5, batches[0], importance="l2", repair="lstsq", calibration=batches)
    assert not any("as sliced: no layer" in note for note in fxprune.record(slim).notes)


@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_every_set_of_batches_has_inputs_that_are_not_fitted(count: int) -> None:
    made = pieces([torch.randn(10, 4) for _ in range(count)], lambda x: x * 2)
    assert sum(one.samples for one in made) == count * 10
    shares = [sum(one.samples for one in made if one.role == role) / (count * 10) for role in (FIT, TUNE, JUDGE)]
    assert shares[0] >= 0.6 and min(shares) >= 0.1
    mixed = pieces([torch.randn(10, 4) for _ in range(2)], lambda x: x - x.mean(0))  # samples that see each other stay together
    assert [one.samples for one in mixed] == [10, 10] and [one.role for one in mixed] == [FIT, JUDGE]


def test_a_recurrent_layer_is_fitted_by_its_gates() -> None:
    """Of doubled units half can go without loss, once the weights that read them are fitted, states included."""
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(6, 8), kind(8, 12, batch_first=True))
        cell = model[1]
        with torch.no_grad():
            rows = cell.weight_hh_l0.view(gates, 12, 12)
            rows[:, 6:] = rows[:, :6]
            cell.weight_ih_l0.view(gates, 12, 8)[:, 6:] = cell.weight_ih_l0.view(gates, 12, 8)[:, :6]
            for bias in (cell.bias_ih_l0, cell.bias_hh_l0):
                bias.view(gates, 12)[:, 6:] = bias.view(gates, 12)[:, :6]
        slim: Any = kind(8, 6, batch_first=True)
        first = torch.cat([torch.arange(6) + 12 * gate for gate in range(gates)])
        kept = {"weight_hh_l0": {0: first, 1: torch.arange(6)}}
        with torch.no_grad():
            for name, weight in slim.named_parameters():
                weight.copy_(getattr(cell, name)[first][:, :6] if "hh" in name and "weight" in name else getattr(cell, name)[first])
        x = [torch.randn(16, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)]
        roles = [FIT, FIT, TUNE, FIT, JUDGE]
        made = fit_recurrent(slim, cell, kept, [Sequences(role, one, one) for role, one in zip(roles, x, strict=True)])
        assert made.done == "fitted" and made.after < 1e-3 < 0.02 < made.before


def test_both_networks_run_once_over_the_calibration_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are, and although nothing fits into memory: the original once, the slim one once, and once for "bn"."""
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(12)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    graph = fxprune.analyze(model, X)
    calibration = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    monkeypatch.setattr(repairs, "ROOM", 0)
    samples = 0
    forward = nn.BatchNorm2d.forward

    def counted(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        nonlocal samples
        samples += len(x)
        return forward(layer, x)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", counted)
    seen = []
    slimmer = Slimmer(graph, keep_counts(graph, {g.name: 4 for g in graph.groups if g.prunable}, scores(graph, "l2", None)))
    Repairer(graph, calibration, "lstsq", progress=lambda done, of, name: seen.append((done, of)))(slimmer.run(), slimmer)
    assert samples <= 3 * 80 * 12
    assert seen == [(i + 1, 13) for i in range(13)]


class ByHand(nn.Module):
    """Attention written out, with the factor on the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q * 8**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        y: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return y


class Fused(nn.Module):
    """Queries, keys and values from one layer, as ``scaled_dot_product_attention`` takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


@pytest.mark.parametrize("make", [ByHand, Fused, Module])
def test_queries_make_up_for_the_dimensions_that_their_products_lack(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "weight" in name:
                weight.mul_(1.5)
    calibration = [_smooth((9, 16), 32, i) for i in range(8)]
    unseen = _smooth((9, 16), 64, 100)
    graph = fxprune.analyze(model, unseen[:2], attention="head_dim")
    first = next(group for group in graph.groups if group.prunable)  # of the queries and keys; values stay whole
    errors = []
    for without in (True, False):
        with monkeypatch.context() as patched:
            if without:
                patched.setattr(repairs, "contractions", lambda graph: [])
            slim = fxprune.compress(graph, {first.name: 0.5}, importance="l2", repair="lstsq", calibration=calibration)
        with torch.no_grad():
            errors.append(float((model(unseen) - slim(unseen)).square().mean()))
        made = {name: one for name, one in fxprune.record(slim).repaired.items() if name.endswith(":products")}
        assert len(made) == (0 if without else 1)
    assert all(one.done == "fitted" and one.after < one.before for one in made.values())
    assert errors[1] < errors[0]
