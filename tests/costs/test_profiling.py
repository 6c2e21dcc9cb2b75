"""Costs against torchvision's published figures and numbers worked out by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision import models

from fxprune.api import compress, record
from fxprune.costs.profiling import profile
from fxprune.errors import FxPruneError, InputError
from fxprune.models.small import digits_net, resnet20


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.get_model(name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_large", "vit_b_16", "swin_t", "convnext_tiny"])
def test_macs_and_parameters_are_the_published_ones(name: str) -> None:
    published = models.get_model_weights(name).DEFAULT.meta
    found = profile(on_meta(name), torch.empty(1, 3, 224, 224, device="meta"))
    # "_ops" is in GMACs, rounded to three places: https://pytorch.org/vision/stable/models.html
    assert found.macs / 1e9 == pytest.approx(published["_ops"], rel=0.01, abs=0.0006)
    assert found.params == published["num_params"] and found.param_bytes == 4 * found.params


def test_resnet50_has_4_09_giga_macs() -> None:
    assert profile(on_meta("resnet50"), torch.empty(1, 3, 224, 224)).macs == pytest.approx(4.09e9, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_a_graph_module_costs_the_same_layer_by_layer(name: str) -> None:
    model = on_meta(name).eval()
    x = torch.empty(1, 3, 224, 224, device="meta")
    eager, graph = profile(model, x), profile(fx.symbolic_trace(model), x)
    assert graph.macs == eager.macs and graph.per_layer == eager.per_layer


def test_batch_and_resolution_scale_the_macs() -> None:
    one, four = (profile(resnet20(), torch.zeros(n, 3, 32, 32)).macs for n in (1, 4))
    assert four == 4 * one


class Functional(nn.Module):
    """Products spelt in every way; the comment beside each is its multiply-accumulates for a batch of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.linear = nn.Linear(6, 5)
        self.vector = nn.Parameter(torch.randn(5))
        self.inner = Product()

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, padding=1, groups=2)  # 2 * 6 * 8*8 * 2 * 3*3 = 13824
        x = F.linear(x.mean((2, 3)), self.linear.weight)  # 2 * 6 * 5 = 60
        x = self.inner(x)  # 2 * 5 * 2 = 20
        return x @ torch.ones(2, 5, device=x.device) @ self.vector  # 2 * 2 * 5 + 2 * 5 = 30


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.T


def test_functions_count_for_the_module_that_owns_the_weight_or_runs() -> None:
    found = profile(Functional(), torch.randn(2, 4, 8, 8))
    assert {name: layer["macs"] for name, layer in found.per_layer.items()} == {"conv": 13824, "linear": 60, "inner": 20, "": 30}
    assert found.macs == 13824 + 60 + 20 + 30


@pytest.mark.parametrize(
    ("layer", "x", "macs"),
    [
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 8, 8), 4 * 6 * 4 * 64),
        (nn.Conv1d(4, 8, 3), (1, 4, 10), 4 * 8 * 3 * 8),
        (nn.LSTM(4, 8, 2, bidirectional=True), (5, 2, 4), 5 * 2 * 2 * 32 * (4 + 8 + 16 + 8)),
        (nn.GRU(4, 8), (5, 2, 4), 5 * 2 * 24 * (4 + 8)),
        (nn.Bilinear(3, 4, 5), None, 2 * 2 * 3 * 4 * 5),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8), 2 * 5 * (4 * 64 + 2 * 128) + 2 * 2 * 25 * 8),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_kinds_of_layers(layer: nn.Module, x: tuple[int, ...] | None, macs: int) -> None:
    inputs: Any = (torch.randn(2, 3), torch.randn(2, 4)) if x is None else torch.randn(*x)
    assert profile(layer, inputs).macs == macs


def test_tied_weights_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    found = profile(model, torch.randn(1, 4))
    assert found.params == 16 and found.macs == 32
    assert found.per_layer == {"0": {"macs": 16, "params": 16}, "2": {"macs": 16, "params": 0}}


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = x + 1  # 400 bytes
            b = a.view(10, 10).t()  # a view
            c = torch.cat([b, b])  # 800 more
            del a, b
            d = c.relu_()  # in place
            return d[:1].clone()  # 40 more, a freed

    assert profile(Net(), torch.zeros(100)).peak_activation_bytes == 1200


def test_a_kept_residual_adds_to_the_peak() -> None:
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            return x + (x + 1).relu()

    # x, x + 1 and its relu; then x + 1 is gone and the sum is there
    assert profile(Residual(), torch.zeros(100)).peak_activation_bytes == 3 * 400


def test_the_model_is_not_touched() -> None:
    model = models.googlenet(init_weights=False).train()
    model.eval()
    model.aux1.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    modes = [m.training for m in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    profile(model, torch.randn(1, 3, 64, 64)).latency(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert modes == [m.training for m in model.modules()] and True in modes
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_of_one_is_enough_for_batchnorm_in_training_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)).train()
    assert profile(model, torch.randn(1, 3, 8, 8)).macs == 3 * 4 * 64


class LooksAtData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if bool(x.sum() > 0):
            x = self.linear(x)
        y: Tensor = self.linear(x)
        return y


def test_data_dependent_control_flow_is_run_on_a_real_copy() -> None:
    model = LooksAtData()
    assert profile(model, torch.ones(1, 4)).macs == 32
    assert profile(model, -torch.ones(1, 4)).macs == 16
    assert model.calls == 0
    with pytest.raises(InputError, match="does not run on the example inputs without its weights"):
        profile(copy.deepcopy(model).to("meta"), torch.ones(1, 4))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_count_the_same_when_really_run(kind: type[nn.Module]) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(4, 8, 2, bidirectional=True)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) if bool((x == x).all()) else x

    x = torch.randn(5, 2, 4)
    assert profile(Branching(), x).macs == profile(kind(4, 8, 2, bidirectional=True), x).macs > 0


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="does not run on the example inputs: .*; check their shapes and types"):
        profile(nn.Linear(4, 4), torch.randn(1, 3))
    with pytest.raises(InputError, match="pass a tensor, a tuple of positional inputs or a dict"):
        profile(nn.Linear(4, 4), 3)


def test_keyword_inputs() -> None:
    assert profile(nn.Bilinear(3, 4, 5), {"input1": torch.randn(2, 3), "input2": torch.randn(2, 4)}).macs == 240
    graph = fx.symbolic_trace(nn.Bilinear(3, 4, 5))
    assert profile(graph, {"input2": torch.randn(2, 4), "input1": torch.randn(2, 3)}).macs == 240


def test_latency_is_measured_on_the_real_model() -> None:
    model = digits_net().train()
    found = profile(model, torch.randn(1, 1, 8, 8))
    assert 0 < found.latency(runs=3) < 1
    assert model.training and int(model.get_buffer("stem.1.num_batches_tracked")) == 0
    with pytest.raises(InputError, match="over 0 runs"):
        found.latency(0)


def test_there_is_no_latency_without_weights() -> None:
    found = profile(on_meta("resnet18"), torch.empty(1, 3, 64, 64, device="meta"))
    with pytest.raises(FxPruneError, match="lies on the meta device and cannot be timed"):
        found.latency()


def test_a_pickled_profile_has_its_figures_but_no_model() -> None:
    found = profile(digits_net(), torch.randn(1, 1, 8, 8))
    back = pickle.loads(pickle.dumps(found))
    assert back == found
    with pytest.raises(FxPruneError, match="has no model to time"):
        back.latency()


def test_a_slim_module_costs_what_its_record_says() -> None:
    slim = compress(resnet20(), 0.5, torch.zeros(1, 3, 32, 32))
    found = profile(slim, torch.zeros(1, 3, 32, 32))
    after = record(slim).after
    assert (found.macs, found.params, found.param_bytes) == (after.macs, after.params, after.param_bytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_latency_on_the_gpu() -> None:
    assert profile(resnet20().cuda(), torch.zeros(1, 3, 32, 32)).latency(3) > 0
