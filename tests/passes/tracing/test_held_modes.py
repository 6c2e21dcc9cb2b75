"""Modules that the user's code holds in training or evaluation, whatever the rest is in: by its own ``train()``, or within ``forward``."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.passes.helpers import gap, prime


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        self.norm, self.drop = nn.Sequential(nn.BatchNorm2d(16)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.norm(self.first(x)).relu())
        assert isinstance(made, Tensor)
        return made


class OwnTrain(Base):
    def train(self, mode: bool = True) -> OwnTrain:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = OwnTrain(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.head(self.body(x))
        assert isinstance(made, Tensor)
        return made


class EvalInForward(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return super().forward(x)


class WhereItTrains(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.norm[0].train(False)
        return super().forward(x)


class AlwaysDrops(Base):
    """Monte-Carlo dropout: it draws in evaluation as well."""

    def forward(self, x: Tensor) -> Tensor:
        self.drop.train()
        return super().forward(self.drop(x))


class Partly(nn.Module):
    """Its root follows values, so that its parts are pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.body = EvalInForward()

    def forward(self, x: Tensor) -> Tensor:
        made = self.body(x)
        assert isinstance(made, Tensor)
        return made if bool((made.mean() < 1e9).item()) else -made


@pytest.mark.parametrize("make", [OwnTrain, Around, EvalInForward, WhereItTrains, AlwaysDrops, Partly])
def test_modes_are_those_of_the_original(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = prime(make(), (x,))
    slim = fxprune.compress(model, 0.0, x)
    pruned = fxprune.compress(model, 0.5, x)
    assert sum(p.numel() for p in pruned.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert not [note for note in fxprune.record(slim).notes if "train()" in note or "evaluation mode" in note]
    copies = [copy.deepcopy(slim), *([] if make is Partly else [fxprune.compress(slim, 0.0, x), pickle.loads(pickle.dumps(slim))])]
    for one in (slim, *copies):
        twin = copy.deepcopy(model)
        for mode in (True, False, True):
            twin.train(mode)
            one.train(mode)
            torch.manual_seed(1)
            wanted = twin(x)
            torch.manual_seed(1)
            assert gap(wanted, one(x)) < 1e-6, f"training={mode}"
    assert model.training is False and all(not m.training for m in model.modules() if not isinstance(m, nn.Dropout))


class Both(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        y = self.norm(self.first(x))
        self.norm.train(self.training)
        made = self.last(self.norm(y))
        assert isinstance(made, Tensor)
        return made


def test_a_module_called_in_both_modes_is_named() -> None:
    x = torch.randn(4, 3, 6, 6)
    slim = fxprune.compress(Both().eval(), 0.5, x)
    assert any("'norm.0' in training and in evaluation mode" in note for note in fxprune.record(slim).notes)


class Dropping(nn.Module):
    """Its own code asks for its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.asks = nn.Conv2d(16, 16, 1), True

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.training and x.requires_grad:  # which makes no difference
            x = x.contiguous()
        return F.dropout(x.relu(), 0.5, self.training)


class Plain(Dropping):
    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x).relu()
        assert isinstance(made, Tensor)
        return made


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), nn.Dropout(0.5)
        self.body, self.plain = nn.Sequential(Dropping()), Plain()

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.drop(self.plain(self.body(self.first(x)))))
        assert isinstance(made, Tensor)
        return made


class InParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Frozen()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return y * 2 if y.sum() > 1e6 else y  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Frozen, InParts])
def test_a_module_set_to_another_mode_is_named_where_its_own_code_asks_for_it(make: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 4, 4)
    slim = fxprune.compress(make().eval(), 0.5, x)
    copies = [slim, copy.deepcopy(slim), *([] if make is InParts else [fxprune.compress(slim, 0.0, x), pickle.loads(pickle.dumps(slim))])]
    for one in copies:
        part = one.get_submodule("part") if make is InParts else one
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for mode in (True, False):
                one.train(mode)
                one(x)
            one.train()
            part.get_submodule("drop").eval()
            part.get_submodule("plain").eval()
            one(x)
        for mode in (True, False):
            one.train(mode)
            part.get_submodule("body").train(not mode)
            with pytest.warns(RuntimeWarning, match=r"'body\.0' is in .* mode and the network in"):
                one(x)


class OfALayer(nn.Module):
    """``body`` reads the mode of a layer of torch, or runs one past its ``__call__``."""

    def __init__(self, body: Callable[[OfALayer, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.first, self.last = body, nn.Linear(10, 16), nn.Linear(16, 4)
        self.bn, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.body(self, self.first(x)).relu())
        assert isinstance(made, Tensor)
        return made


def by_its_flag(net: OfALayer, y: Tensor) -> Tensor:
    bn = net.bn
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.1, bn.eps)


@pytest.mark.parametrize(
    "body",
    [
        by_its_flag,
        lambda net, y: net.bn.forward(y),
        lambda net, y: nn.BatchNorm1d.forward(net.bn, y),
        lambda net, y: next(iter(map(net.bn.forward, [y]))),
        lambda net, y: net.bn._call_impl(y),
        lambda net, y: net.drop.forward(y),
        lambda net, y: F.dropout(y, net.drop.p, net.drop.training),
        lambda net, y: F.dropout(y, 0.5, next(net.children()).training),
        lambda net, y: y * 2 if net.bn.training else net.bn(y),
    ],
)
def test_the_mode_of_a_layer_read_by_code_around_it(body: Callable[[OfALayer, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 10) + 3
    model = OfALayer(body).eval()
    slim = fxprune.compress(model, 0.0, x, verify=True)
    assert gap(model.eval()(x), slim.eval()(x)) < 1e-5
    model.train(), slim.train()
    for _ in range(2):
        torch.manual_seed(1)
        wanted = model(x)
        torch.manual_seed(1)
        assert gap(wanted, slim(x)) < 1e-5
    torch.testing.assert_close(dict(slim.named_buffers()), dict(model.named_buffers()))


def test_a_layer_that_is_called_asks_for_no_second_graph() -> None:
    slim = fxprune.compress(OfALayer(lambda net, y: net.drop(net.bn(y))), 0.5, torch.randn(8, 10))
    assert set(fxprune.analyze(OfALayer(lambda net, y: net.drop(net.bn(y))), torch.randn(8, 10)).traced.graphs) == {"eval"}
    slim.train()(torch.randn(8, 10)).sum().backward()
