"""Channels that are zero already: ``Policy.from_zeros`` removes them exactly, and every importance ranks them lowest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxprune
from fxprune.errors import InputError
from fxprune.importance.criteria import scores
from fxprune.models.small import digits_net
from fxprune.zeros import may_be_dead, zero_units
from tests.passes.helpers import prime
from tests.passes.zoo.networks import ZOO

X = torch.randn(2, 3, 8, 8)


class Residual(nn.Module):
    """A stem with a norm, a residual branch with norms, a head."""

    def __init__(self, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.up, self.bn1 = nn.Conv2d(10, 14, 3, padding=1, bias=False), nn.BatchNorm2d(14)
        self.down, self.bn2 = nn.Conv2d(14, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = x + self.bn2(self.down(self.act(self.bn1(self.up(x)))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def primed(model: nn.Module) -> Any:
    """Random statistics and weights, so that nothing is zero by itself."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
            if tensor.ndim > 1:
                tensor.sub_(0.35)
    return model.eval()


def residual(act: Any = nn.ReLU) -> Any:
    return primed(Residual(act))


def silence(norm: nn.Module, units: list[int]) -> None:
    with torch.no_grad():
        for key in ("weight", "bias"):
            norm.get_parameter(key)[units] = 0


def gone(policy: fxprune.Policy) -> dict[str, str]:
    return dict(policy.options["units"])


def assert_exact(model: nn.Module, policy: fxprune.Policy, x: Tensor = X) -> Any:
    """The slim network computes what the original does."""
    with torch.no_grad():
        want = model(x)
        slim = fxprune.compress(model, policy, x)
        assert torch.allclose(slim(x), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    removed = fxprune.record(slim).removed_units
    assert {name: len(units) for name, units in removed.items()} == {
        name: round(p * fxprune.analyze(model, x).by_name[name].size) for name, p in policy.sparsity.items()
    }
    return slim


def test_scales_and_shifts_at_zero_go() -> None:
    model = residual()
    silence(model.bn1, [0, 3, 4, 5, 13])
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {"up": "0,3-5,13"} and "partly_zero" not in policy.meta
    slim = assert_exact(model, policy)
    assert slim.get_parameter("up.weight").shape[0] == 9


def test_a_stream_goes_where_everything_that_adds_to_it_is_zero_and_the_rest_is_named() -> None:
    model = residual()
    silence(model.bn, [1, 2, 7])
    silence(model.bn2, [2, 7, 9])
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {"stem": "2,7"}
    assert policy.meta["partly_zero"] == {"stem": {"bn": "1", "bn2": "9"}}
    assert_exact(model, policy)


def test_a_scale_at_zero_with_a_shift_is_a_constant_and_stays() -> None:
    model = residual()
    with torch.no_grad():
        model.bn1.weight[[2, 3]] = 0
        model.bn1.bias[3] = 0
    assert gone(fxprune.Policy.from_zeros(fxprune.analyze(model, X))) == {"up": "3"}


def test_what_nothing_reads_goes() -> None:
    model = residual()
    with torch.no_grad():
        model.down.weight[:, [0, 6]] = 0
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {"up": "0,6"}
    assert_exact(model, policy)


def test_zero_rows_before_a_norm_are_zero_only_where_the_norm_keeps_zero() -> None:
    model = residual()
    with torch.no_grad():
        model.up.weight[[1, 2, 3]] = 0
        model.bn1.running_mean[[2, 3]] = 0
        model.bn1.bias[3] = 0
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {"up": "3"} and policy.meta["partly_zero"] == {"up": {"up": "1-2"}}
    assert_exact(model, policy)


def test_behind_a_sigmoid_zero_is_not_zero_and_the_policy_says_so() -> None:
    model = residual(nn.Sigmoid)
    silence(model.bn1, [0, 5])
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {} and "does not turn zero into zero" in policy.meta["kept"]["up"]
    with torch.no_grad():
        model.down.weight[:, 5] = 0
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {"up": "5"}
    assert_exact(model, policy)


def test_a_whole_group_of_zeros_keeps_one_unit() -> None:
    model = residual()
    silence(model.bn1, list(range(14)))
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {"up": "0-12"}
    assert_exact(model, policy)


def test_a_statistic_over_channels_keeps_its_zeros_and_says_why() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.norm(self.a(x)))
            return y

    model, x = primed(Normed()), torch.randn(2, 6)
    with torch.no_grad():
        model.a.weight[[0, 1]] = model.a.bias[[0, 1]] = 0
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, x))
    assert gone(policy) == {} and policy.meta["partly_zero"] == {"a": {"a": "0-1"}} and "statistics over" in policy.meta["kept"]["a"]


@pytest.mark.parametrize("remove", [False, True])
def test_masks_of_torch_become_physical(remove: bool) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4))
    model = primed(nn.Sequential(*layers))
    with torch.no_grad():
        model[0].bias.zero_()
        model[3].running_mean.zero_()
        model[3].bias.zero_()
        model[2].bias.zero_()
    for layer, amount in ((model[0], 0.5), (model[2], 0.25)):
        prune.ln_structured(layer, "weight", amount, n=2, dim=0)
    masked = [(layer.weight_mask.flatten(1).sum(1) == 0).nonzero().flatten().tolist() for layer in (model[0], model[2])]
    if remove:
        prune.remove(model[0], "weight")
        prune.remove(model[2], "weight")
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    slim = assert_exact(model, policy)
    assert [fxprune.record(slim).removed_units[name].tolist() for name in ("0", "2")] == masked
    assert model[0].weight_mask.shape[0] == 8 if not remove else model[0].weight.shape[0] == 8


def test_masks_over_single_weights_go_where_they_cover_a_channel() -> None:
    model = primed(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    mask = torch.ones(8, 6)
    mask[2], mask[5, :3] = 0, 0
    prune.custom_from_mask(model[0], "weight", mask)
    with torch.no_grad():
        model[0].bias[2] = 0
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, torch.randn(2, 6)))
    assert gone(policy) == {"0": "2"}
    assert_exact(model, policy, torch.randn(2, 6))


def test_parametrised_weights_count_as_what_they_compute() -> None:
    class Shift(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w + 1

    model = primed(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    with torch.no_grad():
        model[0].weight[[1, 2]], model[0].bias[[1, 2]] = 0, 0
        model[0].weight[2] = -1
    nn.utils.parametrize.register_parametrization(model[0], "weight", Shift())
    dead = zero_units(fxprune.analyze(model, torch.randn(2, 6))).dead
    assert dead.nonzero()[0].tolist() == [2]  # -1 + 1; unit 1, whose parameter is zero, computes with ones
    norms = primed(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    nn.utils.parametrizations.weight_norm(norms[0])
    with torch.no_grad():
        norms[0].parametrizations.weight.original0[4] = 0
        norms[0].bias[4] = 0
    graph = fxprune.analyze(norms, torch.randn(2, 6))
    assert zero_units(graph).dead.nonzero()[0].tolist() == [4]
    kept = fxprune.Policy.from_zeros(graph).meta["kept"]  # not proved: with both factors at zero the norm divides zero by zero
    assert list(kept) == ["0.parametrizations.weight"] and "zero by zero" in kept["0.parametrizations.weight"]


class LowRank(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        return (left[:, :4] * sizes[:4]).contiguous(), right[:4].contiguous()


def test_a_weight_that_is_a_product_of_two() -> None:
    torch.manual_seed(0)
    model = primed(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))).eval()
    nn.utils.parametrize.register_parametrization(model[2], "weight", LowRank())
    slim = fxprune.compress(model, 0.5, torch.randn(2, 6), verify=True)
    sizes = [tuple(slim.get_parameter(f"2.parametrizations.weight.original{i}").shape) for i in (0, 1)]
    assert sizes == [(5, 2), (2, 4)]


def test_dense_blocks_read_through_their_own_norms() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn1, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
            self.bn2, self.c = nn.BatchNorm2d(14), nn.Conv2d(14, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = torch.cat([x, self.b(self.bn1(x).relu())], 1)
            y: Tensor = self.c(self.bn2(x).relu()).mean((2, 3))
            return y

    model = primed(Dense())
    silence(model.bn1, [0, 1, 2])
    silence(model.bn2, [1, 2, 7, 9])
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert gone(policy) == {"a": "1-2", "b": "1"}
    assert policy.meta["partly_zero"] == {"a": {"bn1": "0", "bn2": "7"}}
    assert_exact(model, policy)


def test_the_policy_travels_through_a_file_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = residual()
    silence(model.bn1, [0, 3])
    silence(model.bn, [1])
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    policy = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    policy.save(tmp_path / "zeros.json")
    slim = fxprune.compress(model, tmp_path / "zeros.json")
    assert fxprune.record(slim).removed_units["up"].tolist() == [0, 3] and set(fxprune.record(slim).removed_units) == {"up"}


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Residual()
    with pytest.raises(InputError, match="on the meta device"):
        fxprune.Policy.from_zeros(fxprune.analyze(model, torch.empty(2, 3, 8, 8, device="meta")))


# -- ranking ------------------------------------------------------------------------------------------------------------------

BATCHES = [(torch.randn(4, 3, 8, 8), torch.randint(0, 4, (4,)))]


@pytest.mark.parametrize("importance", ["l2", "l1", "variance", "taylor", "random", "reconstruction", lambda g, m: -torch.ones(g.size)])
def test_dead_channels_go_first_under_every_importance(importance: Any) -> None:
    model = residual()
    silence(model.bn1, [3, 9, 11])
    slim = fxprune.compress(model, {"up": 3 / 14}, X, importance=importance, calibration=BATCHES)
    assert fxprune.record(slim).removed_units["up"].tolist() == [3, 9, 11]


def test_masked_channels_go_first_though_their_weights_are_large() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[[2, 6]], model[0].bias[[2, 6]] = 50.0, 0.0
    prune.custom_from_mask(model[0], "weight", (model[0].weight.abs() < 40).float())
    slim = fxprune.compress(model.eval(), 0.25, torch.randn(2, 6))
    assert fxprune.record(slim).removed_units["0"].tolist() == [2, 6]


def test_without_zeros_the_ranking_is_what_it_was() -> None:
    graph = fxprune.analyze(residual(), X)
    assert not zero_units(graph).dead.any() and min(float(s.min()) for s in scores(graph, "l2").values()) > 0


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_quick_look_misses_no_dead_unit(name: str) -> None:
    torch.manual_seed(0)
    network = ZOO[name]
    inputs = network.inputs()
    model = prime(network.make(), inputs)
    graph = fxprune.analyze(model, inputs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in [one for one in graph.groups if one.prunable][:3]:
        before = {key: tensors[key].clone() for key, _, _ in group.members if key in tensors}
        for produced in (True, False):  # zero where it is made, or where it is read
            with torch.no_grad():
                for (key, dim, indices), units in zip(group.members, group.units, strict=True):
                    tensor = tensors.get(key)
                    if tensor is None or not tensor.is_floating_point():
                        continue
                    if tensor.ndim < 2 or graph.is_output((key, dim)) == produced:
                        tensor.index_fill_(dim, indices[units == group.size - 1], 0)
            assert may_be_dead(graph) or not zero_units(graph).dead.any()
            with torch.no_grad():
                for key, values in before.items():
                    tensors[key].copy_(values)


def test_the_quick_look_tells_that_an_ordinary_network_has_none() -> None:
    torch.manual_seed(0)
    assert not may_be_dead(fxprune.analyze(digits_net(), torch.randn(2, 1, 8, 8)))


class Ones(nn.Module):
    """Channels of ones beside those that a norm gives: no layer makes them, and what reads them has weights for them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(nn.functional.pad(self.norm(self.stem(x)), (0, 0, 0, 0, 2, 2), value=1.0))


def test_channels_beside_a_norms_are_not_what_it_scales_to_zero() -> None:
    torch.manual_seed(0)
    assert not zero_units(fxprune.analyze(Ones(), torch.randn(1, 3, 8, 8))).dead.any()


def test_weights_of_zero_beside_a_bias_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    found = fxprune.Policy.from_zeros(fxprune.analyze(model, X))
    assert not found.sparsity and list(found.meta["partly_zero"]["0"]) == ["0.weight"], "its channels are constants and not zero"


def test_zeros_are_looked_for_in_a_graph() -> None:
    with pytest.raises(InputError, match="graph is a Linear; pass what fxprune.analyze"):
        fxprune.Policy.from_zeros(nn.Linear(3, 3))
