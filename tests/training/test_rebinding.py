"""An optimiser goes on with the slim parameters: its next step is the original's, sliced."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fxprune
from fxprune.attached import attach
from fxprune.errors import InputError, UnsupportedError

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10), nn.Linear(10, 4)
    ).double()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(X.double()).square().mean().backward()
    optimizer.step()


def first_ones(group: Any, module: nn.Module) -> Tensor:
    return torch.arange(group.size, 0, -1).float()


def silence(model: nn.Module) -> None:
    """What half of every group feeds is cut off, so that without it the others compute and learn the same."""
    with torch.no_grad():
        model[3].weight[:, 4:] = 0  # type: ignore[index]
        model[6].weight[:, 12:] = 0  # type: ignore[index]
        model[7].weight[:, 5:] = 0  # type: ignore[index]


def kept_of(slim: nn.Module, name: str, tensor: Tensor) -> Tensor:
    for dim, indices in fxprune.record(slim).kept.get(name, {}).items():
        tensor = tensor.index_select(dim, indices)
    return tensor


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "one by one": lambda p: torch.optim.Adam(p, 0.01, foreach=False, maximize=True),
    "together": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True, amsgrad=True),
    "rate in a tensor": lambda p: torch.optim.Adam(p, torch.tensor(0.01, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_next_step_is_the_originals_sliced(name: str) -> None:
    model = network()
    optimizer = MAKERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    silence(model)
    slim = fxprune.compress(model, 0.5, X[:1].double(), importance=first_ones)
    state = copy.deepcopy(optimizer.state_dict())
    rebound = fxprune.rebind(optimizer, slim)
    assert type(rebound) is type(optimizer)
    before = {n: p.detach().clone() for n, p in slim.named_parameters()}
    step(model, optimizer)
    step(slim, rebound)
    for name, parameter in slim.named_parameters():
        if name != "0.bias":  # a BatchNorm follows: its gradient is rounding noise, which some classes divide by itself
            assert not torch.equal(parameter, before[name])
            torch.testing.assert_close(parameter, kept_of(slim, name, model.get_parameter(name)), rtol=1e-9, atol=1e-9)
    own = optimizer.state_dict()["state"]
    assert own.keys() == state["state"].keys()  # the original's optimiser goes on too, with its own state


def test_groups_keep_their_settings_and_others_parameters() -> None:
    model, scale = network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": plain, "lr": 0.5, "name": "plain"}, {"params": [*decayed, scale], "weight_decay": 0.3}], 0.01)
    optimizer.state[scale] = {"step": torch.tensor(4.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    slim = fxprune.compress(model, 0.5, X[:1].double())
    rebound = fxprune.rebind(optimizer, slim)
    names = {id(p): n for n, p in slim.named_parameters()}
    assert [names[id(p)] for p in rebound.param_groups[0]["params"]] == [n for n, p in model.named_parameters() if p.ndim == 1]
    assert rebound.param_groups[0]["lr"] == 0.5 and rebound.param_groups[0]["name"] == "plain"
    assert rebound.param_groups[1]["weight_decay"] == 0.3 and rebound.param_groups[1]["lr"] == 0.01
    assert rebound.param_groups[1]["params"][-1] is scale and rebound.state[scale]["step"] == 4
    rebound.state[scale]["exp_avg"].zero_()
    assert optimizer.state[scale]["exp_avg"].sum() == 2


def sequential(optimizer: Optimizer) -> Any:
    rates = torch.optim.lr_scheduler
    return rates.SequentialLR(optimizer, [rates.LinearLR(optimizer, 0.1, total_iters=3), rates.StepLR(optimizer, 2, 0.5)], [4])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=10),  # it moves the momentum too
    "one after the other": sequential,
    "both": lambda o: torch.optim.lr_scheduler.ChainedScheduler([torch.optim.lr_scheduler.StepLR(o, s, 0.5) for s in (2, 3)], optimizer=o),
    "average": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("before", [0, 3])
def test_schedulers_follow(name: str, before: int) -> None:
    def rates(prune: bool) -> list[tuple[float, float]]:
        model = network()
        optimizer: Optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
        scheduler, found = SCHEDULERS[name](optimizer), []
        for number in range(8):
            if prune and number == before:
                model = fxprune.compress(model, 0.5, X[:1].double())
                optimizer = fxprune.rebind(optimizer, model, schedulers=[scheduler])
            step(model, optimizer)
            scheduler.step()
            found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        return found

    assert rates(True) == rates(False) and len(set(rates(False))) > 2


def test_schedulers_of_another_optimiser() -> None:
    model = network()
    optimizer, other = (torch.optim.SGD(model.parameters(), 1.0) for _ in range(2))
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 2) for one in (optimizer, other)]
    with pytest.raises(InputError, match="StepLR is no scheduler of this optimizer"):
        fxprune.rebind(optimizer, fxprune.compress(model, 0.5, X[:1].double()), schedulers=schedulers)
    assert schedulers[0].optimizer is optimizer


def test_pruned_twice_with_and_without_the_step_between() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    once = fxprune.compress(model, 0.25, X[:1].double())
    between = fxprune.rebind(optimizer, once)
    twice = fxprune.compress(once, 0.4, X[:1].double())
    for rebound in (fxprune.rebind(between, twice), fxprune.rebind(optimizer, twice), fxprune.rebind(between, twice, model=once)):
        for name, parameter in twice.named_parameters():
            wanted = kept_of(twice, name, optimizer.state[model.get_parameter(name)]["momentum_buffer"])
            assert torch.equal(rebound.state[parameter]["momentum_buffer"], wanted)


def test_through_a_pickle_the_model_is_named() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    slim = fxprune.compress(model, 0.5, X[:1].double())
    again = pickle.loads(pickle.dumps(slim))
    with pytest.raises(InputError, match="pass model="):
        fxprune.rebind(optimizer, again)
    for rebound in (fxprune.rebind(optimizer, again, model=model), fxprune.rebind(optimizer, copy.deepcopy(slim))):
        step(again, rebound)


OTHERWISE = {"Muon", "SparseAdam", "Adafactor", "LBFGS"}  # each has a test of its own below


def test_every_optimiser_of_torch_is_tested() -> None:
    known = {type(make([nn.Parameter(torch.ones(2, 2))])).__name__ for make in MAKERS.values()} | OTHERWISE
    there = {name for name, one in vars(torch.optim).items() if isinstance(one, type) and issubclass(one, Optimizer)}
    assert there - {"Optimizer"} <= known


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("adjusted", ["original", "match_rms_adamw"])
def test_muon_goes_on_from_the_sliced_momentum(adjusted: str) -> None:
    """Its step mixes all rows of a matrix, so it is not the original's sliced; it is that of a Muon with the sliced momentum."""
    model = network()
    muon, rest = torch.optim.Muon, [p for p in model.parameters() if p.ndim != 2]
    optimizers = [muon([model[6].weight, model[7].weight], 0.1, adjust_lr_fn=adjusted), torch.optim.AdamW(rest, 0.01)]  # type: ignore[index]
    for optimizer in optimizers:
        step(model, optimizer)
    slim = fxprune.compress(model, 0.5, X[:1].double())
    rebound = [fxprune.rebind(optimizer, slim) for optimizer in optimizers]
    named = {name: slim.get_parameter(name) for name in ("6.weight", "7.weight")}
    assert [p for group in rebound[0].param_groups for p in group["params"]] == list(named.values())
    other = copy.deepcopy(slim)
    fresh = muon([other.get_parameter(name) for name in named], 0.1, adjust_lr_fn=adjusted)
    for name, parameter in named.items():
        momentum = optimizers[0].state[model.get_parameter(name)]["momentum_buffer"]
        assert torch.equal(rebound[0].state[parameter]["momentum_buffer"], kept_of(slim, name, momentum))
        fresh.state[other.get_parameter(name)]["momentum_buffer"] = kept_of(slim, name, momentum).clone()
    step(slim, rebound[0])
    step(other, fresh)
    assert all(torch.equal(parameter, other.get_parameter(name)) for name, parameter in named.items())


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 3))
    optimizer = torch.optim.SparseAdam([model.get_parameter("0.weight")], 0.1)

    def sparse_step(module: nn.Module, stepped: Optimizer) -> None:
        stepped.zero_grad()
        output: Tensor = module(torch.tensor([1, 4, 4]))
        output.square().mean().backward()
        stepped.step()

    sparse_step(model, optimizer)
    with torch.no_grad():
        model.get_parameter("1.weight")[:, 4:] = 0
    slim = fxprune.compress(model, 0.5, torch.tensor([1, 2]), importance=first_ones)
    rebound = fxprune.rebind(optimizer, slim)
    sparse_step(model, optimizer)
    sparse_step(slim, rebound)
    assert slim.get_parameter("0.weight").shape == (9, 4)
    torch.testing.assert_close(slim.get_parameter("0.weight"), kept_of(slim, "0.weight", model.get_parameter("0.weight")))


def test_a_history_of_all_parameters_is_refused_or_begun_anew() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)

    def loss(module: nn.Module, stepped: Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            stepped.zero_grad()
            value: Tensor = module(X.double()).square().mean()
            value.backward()
            return value

        return closure

    optimizer.step(loss(model, optimizer))
    slim = fxprune.compress(model, {"6": 0.5}, X[:1].double())  # the first parameter, which the history is filed under, stays whole
    with pytest.raises(UnsupportedError, match="LBFGS keeps one history of all parameters for '0.weight'.*pass reset=True"):
        fxprune.rebind(optimizer, slim)
    with pytest.warns(UserWarning, match="LBFGS begins again"):
        rebound = fxprune.rebind(optimizer, slim, reset=True)
    assert not rebound.state
    before = loss(slim, rebound)().item()
    rebound.step(loss(slim, rebound))  # type: ignore[arg-type]
    assert loss(slim, rebound)().item() < before
    whole = fxprune.rebind(optimizer, fxprune.compress(model, 0.0, X[:1].double()))
    assert len(whole.state) == 1


def test_groups_of_named_parameters() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1, momentum=0.9)
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch keeps no names in groups")
    step(model, optimizer)
    slim = fxprune.compress(model, 0.5, X[:1].double())
    rebound = fxprune.rebind(optimizer, slim)
    assert rebound.param_groups[0]["param_names"] == [name for name, _ in slim.named_parameters()]
    step(slim, rebound)


def test_rows_and_columns_are_sliced() -> None:
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters(), 0.01)
    step(model, optimizer)
    slim = fxprune.compress(model, 0.5, X[:1].double())
    rebound = fxprune.rebind(optimizer, slim)
    old, new = optimizer.state[model[6].weight], rebound.state[slim.get_parameter("6.weight")]  # type: ignore[index]
    kept = fxprune.record(slim).kept["6.weight"]
    assert torch.equal(new["row_var"], old["row_var"][kept[0]]) and torch.equal(new["col_var"], old["col_var"][:, kept[1]])
    step(slim, rebound)


class Whitening(torch.optim.SGD):
    """Keeps a square matrix for each parameter, as Shampoo does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("factor", torch.eye(len(p)))
        return super().step(closure)


def test_a_state_that_cannot_be_sliced_is_refused_or_begins_anew() -> None:
    model = network()
    optimizer = Whitening(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    slim = fxprune.compress(model, {"0": 0.5}, X[:1].double())
    with pytest.raises(UnsupportedError, match=r"keeps 'factor' of shape \[8, 8\] for '0.weight', which cannot be sliced; pass reset=True"):
        fxprune.rebind(optimizer, slim)
    with pytest.warns(UserWarning, match=r"begins again with what cannot be sliced: '0.weight' \('factor' of shape"):
        rebound = fxprune.rebind(optimizer, slim, reset=True)
    assert slim.get_parameter("0.weight") not in rebound.state
    assert "factor" in rebound.state[slim.get_parameter("7.weight")]  # unchanged, and so copied whole
    step(slim, rebound)


class Counted(torch.optim.SGD):
    def __init__(self, params: Any, lr: float, owner: str) -> None:
        super().__init__(params, lr)
        self.owner = owner


def test_what_does_not_belong_together() -> None:
    model = network()
    slim = fxprune.compress(model, 0.5, X[:1].double())
    with pytest.raises(InputError, match="no parameter of the optimizer is known"):
        fxprune.rebind(torch.optim.SGD(network().parameters(), 0.1), slim)
    with pytest.raises(InputError, match="carries no pruning record"):
        fxprune.rebind(torch.optim.SGD(model.parameters(), 0.1), model)
    with pytest.raises(UnsupportedError, match=r"Counted cannot be made again .*owner.*; build it on slim.parameters\(\)"):
        fxprune.rebind(Counted(model.parameters(), 0.1, "me"), slim)
    with pytest.raises(InputError, match=r"does not fit the optimizer: '0.weight' should be \[4, 3, 3, 3\] after pruning"):
        other = fxprune.compress(model, 0.25, X[:1].double())
        attach(other, fxprune.record(slim))
        fxprune.rebind(torch.optim.SGD(model.parameters(), 0.1), other)
