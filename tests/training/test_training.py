"""Training: the schedule, the best weights, determinism, interruption, and what is told of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import EvaluationError, InputError
from fxprune.training.config import Progress, TrainConfig, resolve_device
from fxprune.training.fitting import train
from fxprune.training.optimizers import schedule


def separable(samples: int = 64) -> TensorDataset:
    torch.manual_seed(5)
    x = torch.randn(samples, 4)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(separable(), batch_size=16, shuffle=shuffle)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_learns_and_its_history_tells() -> None:
    model = network()
    history = train(model, loader(), config=TrainConfig(epochs=6, lr=0.2))
    assert [h["epoch"] for h in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < history[0]["loss"] / 2 and history[-1]["accuracy"] > 0.9
    assert set(history[0]) == {"epoch", "loss", "accuracy", "lr", "seconds"}


def test_the_schedule_warms_up_then_falls_as_a_cosine() -> None:
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert shares[10] == 1 and shares[55] == pytest.approx(0.5) and 0 < shares[99] < 0.001
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))
    assert schedule(0, 100, 0.0) == 1
    assert schedule(0, 3, 0.1) == 1  # a warm-up shorter than a step


def test_the_same_seed_gives_the_same_weights_and_spares_the_global_generator() -> None:
    def run(seed: int) -> Tensor:
        model, batches = network(), loader()
        torch.manual_seed(seed + 100)  # whatever the user did before
        state = torch.get_rng_state()
        train(model, batches, config=TrainConfig(epochs=2, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return weights(model)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_the_best_weights_are_kept_by_validation() -> None:
    scores = iter([0.1, 0.9, 0.3, 0.2])
    seen: list[Tensor] = []

    def validate(model: nn.Module) -> float:
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        return next(scores)

    model = network()
    history = train(model, loader(), config=TrainConfig(epochs=3, validate=validate))
    assert torch.equal(weights(model), seen[1]) and not torch.equal(seen[1], seen[3])
    assert [(h["epoch"], h["validation"], h["best"]) for h in history] == [(0, 0.1, True), (1, 0.9, True), (2, 0.3, False), (3, 0.2, False)]


def test_a_training_that_never_helps_leaves_the_weights_it_found() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    scores = iter([0.5, 0.4, 0.5])
    train(model, loader(), config=TrainConfig(epochs=2, validate=lambda _: next(scores)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_without_validation_the_last_weights_stay() -> None:
    model = network()
    before = weights(model)
    train(model, loader(), config=TrainConfig(epochs=1))
    assert not torch.equal(weights(model), before)


def test_an_interruption_leaves_the_best_weights_and_the_modes() -> None:
    scores = iter([0.1, 0.8])
    best: list[Tensor] = []

    def validate(model: nn.Module) -> float:
        best.append(weights(model))
        return next(scores)

    def stop(progress: Progress) -> None:
        if progress.epoch == 2 and progress.step == 3:
            raise KeyboardInterrupt

    model = network()
    model[3].eval()  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        train(model, loader(), config=TrainConfig(epochs=5, validate=validate, on_step=stop))
    assert torch.equal(weights(model), best[1])
    assert model.training and not model[3].training  # type: ignore[index]


def test_every_step_is_told() -> None:
    told: list[Progress] = []
    train(network(), loader(), config=TrainConfig(epochs=2, on_step=told.append))
    assert [(p.epoch, p.step) for p in told] == [(e, s) for e in (1, 2) for s in (1, 2, 3, 4)]
    assert all(p.epochs == 2 and p.steps == 4 and p.loss > 0 and p.accuracy is not None and 0 <= p.accuracy <= 1 and p.lr > 0 for p in told)
    assert told[0].seconds_left > 0 and told[-1].seconds_left == 0


def test_a_loss_that_is_no_number_names_epoch_and_step() -> None:
    def poison(progress: Progress) -> None:
        if progress.epoch == 2 and progress.step == 2:
            nn.init.constant_(model[0].weight, float("nan"))  # type: ignore[index]

    model = network()
    with pytest.raises(EvaluationError, match=r"the training loss is nan at epoch 2, step 3; lower the learning rate"):
        train(model, loader(), config=TrainConfig(epochs=3, on_step=poison, validate=lambda _: 1.0))
    assert weights(model).isfinite().all()  # the best so far


def test_a_validation_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="the validation score is nan after epoch 0"):
        train(network(), loader(), config=TrainConfig(epochs=1, validate=lambda _: float("nan")))


class Epochs:
    """A loader that has to be told the epoch, and has no length."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __iter__(self) -> Any:
        yield torch.randn(8, 4), torch.arange(8) % 2


def test_loaders_are_told_the_epoch_and_need_no_length() -> None:
    epochs = Epochs()
    told: list[Progress] = []
    train(network(), epochs, config=TrainConfig(epochs=3, on_step=told.append))
    assert epochs.told == [0, 1, 2] and told[0].steps == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (list, "hold no batch"),
        (lambda: iter([(torch.randn(8, 4), torch.arange(8) % 2)]), "no batch in epoch 1; pass something that can be iterated again"),
        (lambda: [torch.randn(8, 4)], "a batch is a Tensor; it must be a pair"),
    ],
)
def test_training_data_that_cannot_be_used(batches: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(network(), batches(), config=TrainConfig(epochs=2))


def test_a_frozen_model_cannot_be_trained() -> None:
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        train(network().requires_grad_(False), loader())


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].requires_grad_(False)  # type: ignore[index]
    first, last = model[0].weight.clone(), model[4].weight.clone()  # type: ignore[index]
    train(model, loader(), config=TrainConfig(epochs=1))
    assert torch.equal(model[0].weight, first) and not torch.equal(model[4].weight, last)  # type: ignore[index]


def test_clipping_bounds_the_step() -> None:
    def moved(clip: float | None) -> float:
        model = network()
        before = weights(model)
        train(model, [(torch.randn(8, 4) * 100, torch.arange(8) % 2)], config=TrainConfig(1, 0.1, 0.0, 0.0, 0.0, clip=clip))
        return float((weights(model) - before).norm())

    assert moved(1e-3) <= 0.1 * 1e-3 * 1.01 < moved(None)


def test_no_epochs_do_nothing() -> None:
    model = network()
    before = weights(model)
    assert train(model, loader(), config=TrainConfig(epochs=0)) == [] and torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", -1), ("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("weight_decay", -1.0), ("warmup", 1.0), ("clip", 0.0)],
)
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"TrainConfig.{field} is .*; it must be"):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device 'cuda' is not there"):
        resolve_device("cuda")
    with pytest.raises(InputError, match="device 'tpus' is unknown"):
        resolve_device("tpus")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_the_gpu_brings_the_model_back() -> None:
    model = network()
    history = train(model, loader(), config=TrainConfig(epochs=4, lr=0.2, device="cuda"))
    assert {p.device.type for p in model.parameters()} == {"cpu"} and history[-1]["accuracy"] > 0.8
