"""Options of a training: accumulation, precision, moving average, optimisers and schedules, checkpoints, trackers, BatchNorm."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.api import compress
from fxprune.errors import DependencyError, FileError, InputError
from fxprune.training.checkpoints import NAME, read_checkpoint
from fxprune.training.config import Progress, TrainConfig
from fxprune.training.distillation import DistillConfig, distill
from fxprune.training.fitting import train
from fxprune.training.optimizers import schedule
from fxprune.training.processes import accelerated, batchnorm_as


def samples(count: int = 64) -> TensorDataset:
    torch.manual_seed(5)
    x = torch.randn(count, 4)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())


def network(dropout: float = 0.1, norm: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([t.detach().flatten().float() for t in model.state_dict().values()])


def loader(seed: int = 7) -> DataLoader[Any]:
    return DataLoader(samples(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(seed))


# -- accumulation, precision, BatchNorm --------------------------------------------------------------------------------------


def test_accumulated_batches_make_the_step_of_a_whole_one() -> None:
    def trained(batch: int, accumulate: int) -> Tensor:
        model = network(0.0, norm=False)
        told: list[Progress] = []
        config = TrainConfig(2, clip=0.5, accumulate=accumulate, device="cpu", on_step=told.append)
        train(model, DataLoader(samples(60), batch), config=config)
        assert [p.step for p in told] == [1, 2, 3] * 2 and told[0].steps == 3
        return weights(model)

    # 60 samples: the last group holds 12 of them, one batch of 8 and one of 4.
    torch.testing.assert_close(trained(8, 3), trained(24, 1), rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_it_and_keeps_weights_in_float32() -> None:
    class Spy(nn.Module):
        seen: torch.dtype | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.dtype
            return x

    spy = Spy()
    model = nn.Sequential(nn.Linear(4, 8), spy, nn.Linear(8, 2))
    history = train(model, DataLoader(samples(), 16), config=TrainConfig(4, 0.2, precision="bf16", device="cpu"))
    assert spy.seen == torch.bfloat16 and model[0].weight.dtype == torch.float32
    assert history[-1]["loss"] < history[0]["loss"]
    train(model, DataLoader(samples(), 16), config=TrainConfig(1, device="cpu"))
    assert spy.seen == torch.float32  # the next training is free to choose


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(InputError, match="mixed precision fp16 needs a GPU; use bf16"):
        train(network(), loader(), config=TrainConfig(1, precision="fp16", device="cpu"))


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    model = network()
    before = model[1].running_mean.clone()  # type: ignore[index]
    train(model, loader(), config=TrainConfig(1, batchnorm="frozen", device="cpu"))
    assert torch.equal(model[1].running_mean, before) and model[1].training  # type: ignore[index]
    train(model, loader(), config=TrainConfig(1, device="cpu"))
    assert not torch.equal(model[1].running_mean, before)  # type: ignore[index]


def test_vectors_alone_are_trained() -> None:
    model = network()
    dict(model.named_parameters())["4.bias"].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, loader(), config=TrainConfig(1, lr=0.1, device="cpu", parameters="vectors"))
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {"0.bias", "1.weight", "1.bias"}
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(InputError, match="finds none to train"):
        train(nn.Linear(4, 2, bias=False), loader(), config=TrainConfig(1, device="cpu", parameters="vectors"))


def test_synchronised_batchnorm_gives_way_to_the_models_own() -> None:
    class Two:
        num_processes, device = 2, torch.device("cuda")

    slim = compress(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)), 0.5, torch.randn(1, 3, 8, 8))
    own = slim.get_submodule("1")
    with batchnorm_as(slim, "sync", Two()):
        other = slim.get_submodule("1")
        assert isinstance(other, nn.SyncBatchNorm) and other.weight is own.weight and other.num_features == 4
        other.running_mean.fill_(3)  # type: ignore[union-attr]
    assert slim.get_submodule("1") is own and type(own) is nn.BatchNorm2d and own.running_mean.eq(3).all()  # type: ignore[union-attr]
    Two.device = torch.device("cpu")
    with pytest.raises(InputError, match='batchnorm="sync" needs GPUs'), batchnorm_as(slim, "sync", Two()):
        pass


def test_the_callers_accelerator_stays_and_is_used() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        theirs = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
        with accelerated(torch.device("cpu")) as made:
            assert made.mixed_precision == "bf16"
        train(network(), loader(), config=TrainConfig(1, device="cpu"))
        assert theirs.gradient_accumulation_steps == 4
        assert theirs.device.type == "cpu" and PartialState._shared_state
        with pytest.raises(InputError, match="accelerate cannot train so: AcceleratorState has already been initialized"):
            train(network(), loader(), config=TrainConfig(1, precision="no", device="cpu"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_without_accelerate_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(DependencyError, match=r"pip install 'fxprune\[train\]'"):
        train(network(), loader(), config=TrainConfig(1, device="cpu"))


# -- optimisers, schedules, the moving average -------------------------------------------------------------------------------


def test_an_optimizer_and_a_schedule_by_their_paths() -> None:
    rates: list[float] = []
    config = TrainConfig(
        2,
        0.3,
        weight_decay=0.0,
        optimizer="torch.optim.Adam",
        optimizer_options={"betas": (0.8, 0.9)},
        scheduler="torch.optim.lr_scheduler.LinearLR",
        scheduler_options={"start_factor": 1.0, "end_factor": 0.5, "total_iters": "steps"},
        device="cpu",
        on_step=lambda p: rates.append(p.lr),
    )
    model, other = network(0.0, norm=False), network(0.0, norm=False)
    batches = DataLoader(samples(32), 8)
    train(model, batches, config=config)
    assert rates == pytest.approx([0.3 * (1 - 0.5 * n / 8) for n in range(8)])
    optimizer = torch.optim.Adam(other.parameters(), 0.3, betas=(0.8, 0.9))
    for n, (x, y) in enumerate([*batches, *batches]):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - 0.5 * n / 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(other))


def test_a_schedule_by_the_score() -> None:
    scores = iter([0.5, 0.4, 0.3, 0.2])
    config = TrainConfig(
        3,
        0.1,
        scheduler="torch.optim.lr_scheduler.ReduceLROnPlateau",
        scheduler_options={"mode": "max", "patience": 0, "factor": 0.5},
        validate=lambda m: next(scores),
        device="cpu",
    )
    history = train(network(), loader(), config=config)
    assert [h["lr"] for h in history[1:]] == pytest.approx([0.1, 0.1, 0.05])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "torch.optim.Nothing"}, "optimizer 'torch.optim.Nothing': 'torch.optim' has no 'Nothing'"),
        ({"optimizer": "torch.nn.Linear"}, "optimizer Linear does not take its options"),
        ({"optimizer": "torch.optim.AdamW", "optimizer_options": {"beta": 1}}, "AdamW does not take its options: .*beta"),
        ({"scheduler": "torch.optim.lr_scheduler.StepLR"}, "scheduler StepLR does not take its options: .*step_size"),
        ({"scheduler": "builtins.dict"}, "scheduler dict does not take its options|must make a torch.optim.lr_scheduler"),
        ({"scheduler": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, "goes by the validation score; pass validate="),
        ({"precision": "int4"}, "TrainConfig.precision is int4; it must be one of no, fp16, bf16"),
        ({"ema": 1.0}, "TrainConfig.ema is 1.0"),
        ({"batchnorm": "none"}, "TrainConfig.batchnorm is none; it must be one of local, sync, frozen"),
        ({"parameters": "norms"}, "TrainConfig.parameters is norms; it must be one of all, vectors"),
        ({"accumulate": 0}, "TrainConfig.accumulate is 0"),
        ({"resume": True}, "TrainConfig.resume is True; it must be False where there is no checkpoint_dir"),
        ({"trackers": "tensorboard"}, "TrainConfig.trackers is tensorboard; it must be a list of names"),
        ({"trackers": ["smoke_signals"]}, "accelerate cannot train so: Unsupported logging capability: smoke_signals"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(network(), loader(), config=TrainConfig(1, device="cpu", **options))


def test_the_moving_average_is_kept() -> None:
    seen: list[Tensor] = []
    model = network(0.0, norm=False)
    config = TrainConfig(1, 0.1, ema=0.5, device="cpu", on_step=lambda p: seen.append(weights(model)))
    train(model, DataLoader(samples(32), 8), config=config)
    average = seen[0]
    for one in seen[1:]:
        average = 0.5 * average + 0.5 * one
    torch.testing.assert_close(weights(model), average)
    assert not torch.allclose(average, seen[-1])


def test_the_moving_average_is_what_is_validated() -> None:
    validated: list[Tensor] = []

    def validate(module: nn.Module) -> float:
        validated.append(weights(module))
        return float(len(validated))

    model = network()
    train(model, loader(), config=TrainConfig(2, 0.1, ema=0.9, validate=validate, device="cpu"))
    assert torch.equal(weights(model), validated[-1])


# -- checkpoints -------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(epoch: int, step: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (epoch, step):
            raise Stop

    return stop


@pytest.mark.parametrize("cut", [(1, 2), (2, 1), (2, 6), (3, 8)])
def test_a_training_that_was_cut_goes_on_with_the_same_result(cut: tuple[int, int], tmp_path: Path) -> None:
    teacher = network().eval()

    def run(folder: Path, **options: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        torch.manual_seed(cut[0])  # whatever the caller did before
        scores = iter([0.1, 0.5, 0.6, 0.4])
        offset = 0 if not options.get("resume") else {1: 1, 2: 2, 3: 3}[cut[0]]
        for _ in range(offset):
            next(scores)
        student = network(0.3)
        config = DistillConfig(
            3, 0.1, accumulate=2, ema=0.9, validate=lambda m: 0.45 if m is teacher else next(scores), device="cpu",
            checkpoint_dir=folder, checkpoint_every=1, **options
        )  # fmt: skip
        try:
            history = distill(student, teacher, loader(), config=config)
        except Stop:
            return weights(student), []
        return weights(student), [{k: v for k, v in h.items() if k != "seconds"} for h in history]

    whole, history = run(tmp_path / "whole")
    run(tmp_path / "cut", on_step=stop_at(cut[0], min(cut[1], 4)))
    again, rest = run(tmp_path / "cut", resume=True)
    assert torch.equal(again, whole) and rest == history
    assert [h.get("teacher_replaced", False) for h in history] == [False, True, True, False]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [NAME]
    finished, told = run(tmp_path / "whole", resume=True)  # nothing is left to be done
    assert torch.equal(finished, whole) and told == history


def test_resume_where_there_is_nothing_begins(tmp_path: Path) -> None:
    assert len(train(network(), loader(), config=TrainConfig(1, checkpoint_dir=tmp_path, resume=True, device="cpu"))) == 1


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    config = {"checkpoint_dir": tmp_path, "device": "cpu"}
    train(network(), loader(), config=TrainConfig(1, **config))  # type: ignore[arg-type]
    with pytest.raises(FileError, match=r"training.pt: lr was 0.05 and is 0.1; give the same options, or resume=False"):
        train(network(), loader(), config=TrainConfig(1, 0.1, resume=True, **config))  # type: ignore[arg-type]
    with pytest.raises(FileError, match="cannot go on from .*; give the same model"):
        train(nn.Linear(4, 2), loader(), config=TrainConfig(1, resume=True, **config))  # type: ignore[arg-type]
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="cannot go on from .*; remove it to start again"):
        train(network(), loader(), config=TrainConfig(1, resume=True, **config))  # type: ignore[arg-type]


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


@pytest.mark.parametrize("thing", [{"format": "fxprune-training/1", "options": Bomb()}, [1, 2], {"format": "other"}])
def test_a_strangers_checkpoint_runs_nothing(thing: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(thing, tmp_path / NAME)
    with pytest.raises(FileError, match="cannot go on from .*; remove it to start again"):
        train(network(), loader(), config=TrainConfig(1, checkpoint_dir=tmp_path, resume=True, device="cpu"))
    assert "unpickled" not in capsys.readouterr().out


class Odd(torch.optim.lr_scheduler.LambdaLR):
    """Keeps an object of the user's in its state."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda step: 1.0)
        self.thing = Bomb()


def test_a_state_that_only_unpickling_could_read_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot keep a checkpoint: the state of the optimizer, the scheduler or the loss"):
        train(network(), loader(), config=TrainConfig(1, scheduler=Odd, checkpoint_dir=tmp_path, device="cpu"))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_noticed_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot keep checkpoints in .*file"):
        train(network(), loader(), config=TrainConfig(1, checkpoint_dir=tmp_path / "file", device="cpu", validate=lambda m: pytest.fail()))


def test_an_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.save

    def torn(state: Any, path: Path) -> None:
        real(state, path)
        if state["at"] == [3, 0]:
            path.write_bytes(path.read_bytes()[:50])
            raise OSError("no space left")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(FileError, match="cannot write the checkpoint .*no space left"):
        train(network(), loader(), config=TrainConfig(2, checkpoint_dir=tmp_path, device="cpu"))
    kept = read_checkpoint(tmp_path)
    assert kept is not None and kept["at"] == [2, 0] and [path.name for path in tmp_path.iterdir()] == [NAME]


# -- trackers ----------------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_history(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(2, trackers=["tensorboard"], log_dir=tmp_path, validate=lambda m: 0.5, device="cpu")
    history = train(network(), loader(), config=config)
    events = EventAccumulator(str(tmp_path / "fxprune")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([h["loss"] for h in history[1:]])
    assert [e.step for e in events.Scalars("validation")] == [8, 16]


def test_a_tracker_object_gets_records_and_is_finished() -> None:
    from accelerate.tracking import GeneralTracker, on_main_process

    class Notes(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory = "notes", False
        logged: list[tuple[int | None, dict[str, Any]]] = []
        finished = 0

        @property
        def tracker(self) -> Any:
            return None

        @on_main_process  # type: ignore[untyped-decorator]
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.options = values

        @on_main_process  # type: ignore[untyped-decorator]
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            self.logged.append((step, values))

        def finish(self) -> None:
            self.finished += 1

    notes = Notes()
    train(network(), loader(), config=TrainConfig(2, 0.07, trackers=[notes], device="cpu"))
    assert [step for step, _ in notes.logged] == [8, 16] and set(notes.logged[0][1]) == {"epoch", "loss", "accuracy", "lr", "seconds"}
    assert notes.finished == 1 and notes.options["lr"] == 0.07


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.warns(UserWarning), pytest.raises(DependencyError, match="tracker 'wandb' is not installed; run: pip install wandb"):
        train(network(), loader(), config=TrainConfig(1, trackers=["wandb"], device="cpu"))


# -- losses and batches of the user's own ------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two inputs; a dict of two outputs, and no class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"boxes": self.linear(x), "scale": y * 2}


def test_a_loss_of_the_users_own() -> None:
    torch.manual_seed(0)
    student, teacher = Two(), Two()
    batches = [{"left": torch.randn(6, 4), "right": torch.randn(6, 1), "id": torch.arange(6)}]
    seen: list[Any] = []

    def loss(student_out: Any, teacher_out: Any, batch: Any) -> Tensor:
        seen.append(batch)
        assert not teacher_out["boxes"].requires_grad
        return nn.functional.mse_loss(student_out["boxes"], teacher_out["boxes"])

    config = DistillConfig(40, 0.3, loss=loss, inputs=lambda b: {"x": b["left"], "y": b["right"]}, device="cpu", weight_decay=0.0)
    history = distill(student, teacher, batches, config=config)
    assert history[-1]["loss"] < 0.05 * history[0]["loss"] and "accuracy" not in history[0]
    assert set(seen[0]) == {"left", "right", "id"}
    with pytest.raises(InputError, match="or pass inputs= and loss= to say what of it goes where"):
        distill(student, teacher, batches, config=DistillConfig(1, device="cpu"))
    with pytest.raises(InputError, match="the loss gave no scalar tensor"):
        distill(student, teacher, batches, config=DistillConfig(1, loss=lambda s, t, b: s["boxes"], inputs=config.inputs, device="cpu"))


def test_labels_of_a_mapping_and_positions_without_one() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.conv(x), "aux": x}

    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[:, :2] = 255
    batch = {"pixels": torch.randn(2, 1, 4, 4), "labels": labels}
    config = DistillConfig(2, inputs=lambda b: b["pixels"], ignore_index=255, device="cpu")
    history = distill(Segmenter(), Segmenter(), [batch], config=config)
    assert 0 <= history[0]["accuracy"] <= 1 and round(history[0]["accuracy"] * 16, 6) % 1 == 0  # of the 16 that have a label


def test_the_teacher_is_asked_once_where_it_may_be() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    torch.manual_seed(0)
    teacher, students = Counting(4, 2), [nn.Linear(4, 2) for _ in range(2)]
    students[1].load_state_dict(copy.deepcopy(students[0].state_dict()))
    batches = DataLoader(samples(), 16)
    distill(students[0], teacher, batches, config=DistillConfig(3, device="cpu", cache_teacher=True))
    assert teacher.calls == 4
    distill(students[1], teacher, batches, config=DistillConfig(3, device="cpu"))
    assert teacher.calls == 16 and torch.equal(students[0].weight, students[1].weight)
    with pytest.raises(InputError, match="batch 1 is not what it was in an earlier epoch, .*set cache_teacher=False"):
        distill(students[0], teacher, loader(), config=DistillConfig(3, device="cpu", cache_teacher=True))
    x, y = next(iter(batches))

    class Mirrored:
        flip = False

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Any:
            self.flip = not self.flip
            yield (x.flip(1) if self.flip else x), y

    with pytest.raises(InputError, match="batch 1 is not what it was"):
        distill(students[0], teacher, Mirrored(), config=DistillConfig(2, device="cpu", cache_teacher=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_the_gpu(precision: str, tmp_path: Path) -> None:
    student, teacher = network(), network()
    train(teacher, loader(), config=TrainConfig(4, 0.2, device="cuda", precision=precision))
    with torch.no_grad():
        student[4].weight.zero_()  # type: ignore[index]
    config = DistillConfig(6, 0.2, device="cuda", precision=precision, ema=0.5, clip=1.0, accumulate=2, checkpoint_dir=tmp_path)
    history = distill(student, teacher, loader(), config=config)
    assert history[-1]["loss"] < history[0]["loss"] and {p.device.type for p in student.parameters()} == {"cpu"}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_the_usual_schedule_is_the_function_it_says() -> None:
    rates: list[float] = []
    train(network(), loader(), config=TrainConfig(2, 0.3, warmup=0.2, device="cpu", on_step=lambda p: rates.append(p.lr)))
    assert rates == [0.3 * schedule(step, 16, 0.2) for step in range(16)]
