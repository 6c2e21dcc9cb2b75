"""``fxprune-search`` from its arguments to its files and exit status, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import fxprune
from fxprune.allocation import tables
from fxprune.cli import command as cli
from fxprune.cli import session
from fxprune.cli.arguments import read
from fxprune.cli.options import Options
from fxprune.data.datasets import load_data
from fxprune.driver.config import PRESETS, SearchConfig
from fxprune.driver.outcome import Allocation
from fxprune.errors import SearchError
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.evaluation.likeness import Likeness
from fxprune.exporting.formats import FORMATS
from fxprune.models.small import digits_net
from fxprune.searching import norms, problem
from fxprune.timing.layers import LayerTable
from fxprune.timing.runtimes import RUNTIMES, Runtime

pytest.importorskip("sklearn", reason="the search extra is not installed")

ROOT = Path(__file__).parents[2]
QUICK = [
    "--train-epochs",
    "3",
    "--distill-epochs",
    "1",
    "--rounds",
    "3",
    "--samples",
    "3",
    "--score-images",
    "100",
    "--calibration-images",
    "64",
]
PARTS: tuple[Literal["validation", "train"], ...] = ("validation", "train")
QUICKEST = ["--train-epochs", "1", "--distill-epochs", "0", "--strategy", "uniform", "--no-baseline", "--score-images", "50"]


@dataclass
class Ran:
    status: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def one(*arguments: object) -> Ran:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    yield one
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(["--out", str(out), *QUICK]) == 0
    return out


class NotANumber(nn.Module):
    """Its outputs are NaN from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.net = digits_net()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.fill_(float("nan"))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


class Failing:
    """Images on a disk that fails."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        if number:
            raise OSError("disk")
        return torch.zeros(1, 8, 8), number


def failing() -> tuple[Failing, Failing]:
    return Failing(), Failing()


class Narrow(nn.Module):
    """Two units a layer: too coarse for most targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


def test_finalists_are_judged_on_more_images(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(self: Likeness, module: nn.Module) -> dict[str, float]:
        asked.append(sum(len(labels) for _, labels in self.batches))
        return {"accuracy": 0.5, "likeness": 0.5 + 1e-3 * len(asked)}

    monkeypatch.setattr(Likeness, "__call__", counted)
    quick = [*QUICK, "--batch-size", "20", "--no-baseline", "--distill-epochs", "0", "--rough-images", "40", "--finalists", "2"]
    assert run("--out", tmp_path, *quick, "--no-augment").status == 0
    assert set(asked[:-4]) == {40}
    assert asked[-4:] == [100] * 4


def test_writes_what_it_promises(whole: Path) -> None:
    made = {path.name for path in whole.iterdir()}
    assert made == {"policy.json", "slim.safetensors", "history.jsonl", "report.html", "checkpoint"}
    history = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    assert history[-1]["macs"] == pytest.approx(0.5, rel=0.01)
    slim = fxprune.load(whole / "slim.safetensors", digits_net())
    model = digits_net()
    kept = fxprune.record(fxprune.compress(model, whole / "policy.json")).kept
    assert {name: {d: i.tolist() for d, i in dims.items()} for name, dims in kept.items()} == {
        name: {d: i.tolist() for d, i in dims.items()} for name, dims in fxprune.record(slim).kept.items()
    }
    macs = fxprune.profile(slim, torch.randn(1, 1, 8, 8)).macs / fxprune.profile(model, torch.randn(1, 1, 8, 8)).macs
    assert macs == pytest.approx(0.5, rel=0.01)
    assert "digits_net" in (whole / "report.html").read_text()


def test_shows_before_and_after_and_how_to_load(run: Run, whole: Path) -> None:
    ended = run("--resume", whole)  # finished: shown again, nothing done
    assert ended.status == 0
    for expected in ("original", "uniform", "slim", "test accuracy", "MACs", "parameters", "latency", "size on disk"):
        assert expected in ended.out
    code = ended.out[ended.out.index("import fxprune") :]
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["slim"], torch.fx.GraphModule)


@pytest.mark.parametrize(
    ("moment", "count"), [("stage:training", 1), ("trained", 15), ("searched", 3), ("trained", 35), ("stage:distilling slim", 1)]
)
def test_interrupted_and_resumed_is_uninterrupted(
    run: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, count: int
) -> None:
    method, _, text = moment.partition(":")
    real, calls = getattr(cli.Display, method), 0

    def interrupting(display: cli.Display, what: object) -> None:
        nonlocal calls
        real(display, what)
        calls += not text or str(what).startswith(text)
        if calls == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cli.Display, method, interrupting)
        cut = run("--out", tmp_path, *QUICK)
    assert cut.status == 130
    assert cut.err.splitlines() == [f"fxprune-search: interrupted; go on with: fxprune-search --resume {tmp_path}"]
    assert not (tmp_path / "policy.json").exists()
    assert run("--resume", tmp_path).status == 0
    for name in ("policy.json", "slim.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_training_goes_on_after_its_last_whole_epoch(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, epochs = cli.Display.trained, []

    def interrupting(display: cli.Display, progress: Any) -> None:
        real(display, progress)
        epochs.append(progress.epoch)
        if len(epochs) == 15:  # in the second epoch of ten steps each
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.Display, "trained", interrupting)
    assert run("--out", tmp_path, *QUICKEST, "--train-epochs", "3").status == 130
    epochs.clear()
    epochs.extend([0] * 15)
    assert run("--resume", tmp_path).status == 0
    assert epochs[15] == 2
    assert not (tmp_path / "checkpoint" / "training").exists()


def test_killed_at_any_moment_goes_on(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxprune"]
    started = subprocess.Popen([*command, "--out", str(tmp_path), *QUICK], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("searching"):
            break
    time.sleep(0.3)
    started.kill()
    started.wait()
    started.stdout.close()
    again = subprocess.Popen([*command, "--resume", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert again.stdout is not None
    again.stdout.readline()
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 130
    assert f"--resume {tmp_path}" in err
    assert "Traceback" not in err
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}  # neither they nor the workers choose the policy
    resume = [*command, "--resume", str(tmp_path), "--jobs", "2"]
    done = subprocess.run(resume, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "policy.json").read_bytes() == (whole / "policy.json").read_bytes()


def test_an_interrupt_within_code_from_a_string_exits_as_any_other(tmp_path: Path) -> None:
    """Imports run such code; the interpreter would die of the signal for it, whatever status it is told to exit with."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom fxprune import cli\nfrom fxprune.cli import session\n"
        "session.begin = lambda *_: exec('raise KeyboardInterrupt')\n"
        "sys.exit(cli.main(['--out', 'nowhere']))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "fxprune-search: interrupted; nothing had been started\n")


def unharmed(out: Path) -> None:
    """Every file of a run can be read to its end; what was being written when it was killed goes by another name."""
    for path in out.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".pt":
            assert torch.load(path, weights_only=True)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")


@pytest.mark.long
def test_killed_twenty_times(tmp_path: Path) -> None:
    """With SIGKILL, at moments drawn over the length of a whole run; runs that end before their moment are followed by new ones."""
    drawn = random.Random(4)
    command, env = [sys.executable, "-m", "fxprune"], {**os.environ, "PYTHONHASHSEED": "3"}
    begun = time.monotonic()
    subprocess.run([*command, "--out", str(tmp_path / "whole"), *QUICK], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    length = time.monotonic() - begun
    kills = run_number = 0
    arguments: list[str] = []
    while kills < 20 or arguments[:1] == ["--resume"]:
        out = tmp_path / f"run{run_number}"
        arguments = ["--resume", str(out)] if (out / "checkpoint" / "session.json").exists() else ["--out", str(out), *QUICK]
        started = subprocess.Popen([*command, *arguments], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, err = started.communicate(timeout=drawn.uniform(0, length) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()
            kills += 1
            arguments = ["--resume"]
            if out.exists():
                unharmed(out)
            continue
        assert started.returncode == 0, err
        unharmed(out)
        for name in ("policy.json", "slim.safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        left = [path.name for path in out.rglob("*") if path.is_file() and (path.suffix == ".part" or path.name.startswith("."))]
        assert not left
        run_number, arguments = run_number + 1, []
    assert run_number >= 1


def test_recovery_between_steps_and_resume(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*QUICK, "--no-baseline", "--steps", "3", "--recover-every", "1", "--rounds", "1"]
    assert run("--out", tmp_path / "whole", *options).status == 0
    real, calls = cli.Display.searched, 0

    def interrupting(display: cli.Display, what: object) -> None:
        nonlocal calls
        real(display, what)  # type: ignore[arg-type]
        calls += 1
        if calls == 6:  # in the third step, after two recoveries
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cli.Display, "searched", interrupting)
        assert run("--out", tmp_path / "cut", *options).status == 130
    assert len(list((tmp_path / "cut" / "checkpoint" / "search").glob("weights-*"))) == 1
    assert run("--resume", tmp_path / "cut").status == 0
    assert (tmp_path / "cut" / "policy.json").read_bytes() == (tmp_path / "whole" / "policy.json").read_bytes()
    made = [fxprune.load(tmp_path / name / "slim.safetensors", digits_net()).state_dict() for name in ("cut", "whole")]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_norms_are_recovered_between_repair_and_distillation_and_a_resumed_run_repairs_nothing_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*QUICK, "--no-baseline", "--strategy", "uniform", "--repair-images", "128", "--recover", "norms", "--recover-epochs", "3"]
    train_norms: Any = norms.recover_norms

    def to_the_end(*args: Any) -> None:
        """What the last epoch gives, better on the held-out images or not: that may differ from machine to machine."""
        train_norms(*args[:-1], dataclasses.replace(args[-1], validate=None))

    monkeypatch.setattr(session, "recover_norms", to_the_end)
    with monkeypatch.context() as patched:
        patched.setattr(session.Session, "measured", interrupted)
        assert run("--out", tmp_path, *options).status == 130
    folder = tmp_path / "checkpoint"
    repaired, recovered, distilled = (next(folder.glob(f"{name}-*.safetensors")) for name in ("repaired", "recovered", "distilled"))
    weights = [load_file(path) for path in (repaired, recovered, distilled)]
    moved = {name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])}
    assert moved and all(weights[0][name].ndim == 1 for name in moved)
    assert any(weights[1][name].ndim > 1 and not torch.equal(value, weights[2][name]) for name, value in weights[1].items())
    distilled.unlink()  # as if the run had been cut before it was written

    def again(*_: Any) -> None:
        raise AssertionError("repaired or recovered again")

    with monkeypatch.context() as patched:
        patched.setattr(session, "Repairer", again)
        patched.setattr(session, "recover_norms", again)
        assert run("--resume", tmp_path).status == 0
    slim = fxprune.load(tmp_path / "slim.safetensors", digits_net())
    assert fxprune.record(slim).repaired
    slim.load_state_dict(weights[0])
    original, found = json.loads((folder / "result.json").read_text())["rows"]
    assert original["untrained"] is None
    assert found["untrained"] == pytest.approx(evaluate_accuracy(slim.eval(), load_data("digits").batches("test", 100)))


@pytest.mark.parametrize("best", ["halfway", "uniform", "search"])
def test_what_is_best_after_training_is_kept(best: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(module: nn.Module) -> float:
        pruned = isinstance(module, fx.GraphModule)  # the original is none
        return float(pruned and fxprune.record(module).policy.meta.get("allocation", "search") == best)

    monkeypatch.setattr(session.Session, "validation", property(lambda _: judged))
    ended = run("--out", tmp_path, *QUICK, "--target", "macs=0.4")
    assert ended.status == 0 and f"kept: {best}" in ended.out
    rows = {row["name"]: row for row in json.loads((tmp_path / "checkpoint" / "result.json").read_text())["rows"]}
    policy = fxprune.Policy.load(tmp_path / "policy.json")
    slim = fxprune.load(tmp_path / "slim.safetensors", digits_net())
    removed = {name: len(units) for name, units in fxprune.record(slim).removed_units.items()}
    sizes = {group.name: group.size for group in fxprune.analyze(digits_net(), torch.randn(1, 1, 8, 8)).groups}
    assert all(removed.get(name, 0) == round(sparsity * sizes[name]) for name, sparsity in policy.sparsity.items())
    assert rows["slim"]["macs"] / rows["original"]["macs"] == pytest.approx(0.4, rel=0.011)
    if best == "search":
        assert list(rows) == ["original", "uniform", "slim"] and "allocation" not in policy.meta
        return
    assert list(rows) == ["original", "uniform", "searched", "slim"] and policy.meta["allocation"] == best
    assert "was not the best on held-out images" in (tmp_path / "report.html").read_text()
    assert ({**rows["slim"], "name": "", "latency": 0} == {**rows["uniform"], "name": "", "latency": 0}) is (best == "uniform")


@pytest.mark.parametrize(
    ("target", "met", "removed"),
    [("latency=0.5", True, [3, 5]), ("macs=0.5", False, [3, 5]), ("macs=0.5", True, [4, 4])],
    ids=["measured for the search alone", "off the target", "the same"],
)
def test_a_uniform_allocation_that_is_no_rival_is_not_judged(
    target: str, met: bool, removed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.Session, "validation", property(lambda _: pytest.fail("it is judged")))
    run = session.Session(Options(out=str(tmp_path), search=SearchConfig(targets=target)), "")
    outcome: Any = SimpleNamespace(removed=np.array(removed), baselines={"uniform": Allocation(np.array([4, 4]), 0.0, {}, met)})
    found: Any = object()
    rival: Any = object()
    watcher: Any = None
    assert run.best_trained(outcome, found, {"uniform": rival}, watcher) is found


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def tabled(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was cut once it had its error table."""
    out = tmp_path / "tabled"
    with monkeypatch.context() as patched:
        patched.setattr(session.Session, "results", interrupted)
        assert run("--out", out, *QUICKEST, "--strategy", "table", "--calibration-images", "64", "--repair", "bn").status == 130
    assert (out / "checkpoint" / "table.safetensors").exists()
    return out


def test_a_resumed_run_reads_its_error_table(run: Run, tabled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    shutil.copytree(tabled, other)
    (other / "checkpoint" / "search" / "search.json").unlink()  # so that the table is what the allocation comes from
    made: list[int] = []
    compute = tables.error_table

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return compute(*args, **kwargs)

    monkeypatch.setattr(problem, "error_table", counted)
    assert run("--resume", other).status == 0
    assert not made
    policies = []
    for name in ("tabled", "whole"):
        folder = tmp_path / name
        arguments = ["--resume", folder] if name == "tabled" else ["--out", folder, *QUICKEST]
        more = [] if name == "tabled" else ["--strategy", "table", "--calibration-images", "64", "--repair", "bn"]
        assert run(*arguments, *more).status == 0
        policies.append(json.loads((folder / "policy.json").read_text())["options"]["units"])
    assert made == [1] and policies[0] == policies[1]
    assert json.loads((other / "policy.json").read_text())["options"]["units"] == policies[0]


@pytest.mark.parametrize("what", ["other images", "cut", "shape", "dtype", "too large", "not rising", "not finite", "a group less"])
def test_an_error_table_is_believed_only_where_it_is_the_runs_own(run: Run, tabled: Path, what: str) -> None:
    path = tabled / "checkpoint" / "table.safetensors"
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    whole = path.read_bytes()
    if what == "other images":
        described = json.loads(metadata["fxprune"])
        metadata["fxprune"] = json.dumps({**described, "of": "0" * 64})
    elif what == "shape":
        tensors["0.ranking"] = tensors["0.ranking"][:-1].clone()
    elif what == "dtype":
        tensors["0.effects"] = tensors["0.effects"].float()
    elif what == "too large":
        tensors["0.effects"] = torch.zeros(10**4, 10**3, dtype=torch.float64)
    elif what == "not rising":
        tensors["0.widths"][-1] = tensors["0.widths"][-2]
    elif what == "not finite":
        tensors["0.effects"][0, 0] = float("nan")
    elif what == "a group less":
        tensors.pop("0.ranking")
    save_file(tensors, path, metadata)
    if what == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    done = run("--resume", tabled)
    if what == "other images":
        assert done.status == 0 and path.read_bytes() == whole  # computed again
    else:
        assert done.status == 2 and f"cannot go on from {path}" in done.err and len(done.err.splitlines()) == 1


def test_first_checkpoint_comes_before_any_work(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("search/weights-0-1.part", "original.safetensors.part"):  # by an earlier run, killed while it wrote there
        (tmp_path / "checkpoint" / name).mkdir(parents=True)

    def interrupting(display: cli.Display, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Display, "stage", interrupting)
    assert run("--out", tmp_path, *QUICK, "--seed", "7").status == 130
    state = json.loads((tmp_path / "checkpoint" / "session.json").read_text())
    assert state["options"]["search"]["seed"] == 7
    assert not list((tmp_path / "checkpoint").rglob("*.part"))


def test_unreachable_target_keeps_the_nearest(run: Run, tmp_path: Path) -> None:
    ended = run("--out", tmp_path, *QUICKEST, "--target", "macs=0.0001")
    assert ended.status == 3
    assert len(ended.err.splitlines()) == 1
    assert "target macs=0.0001 cannot be met" in ended.err
    assert "macs=0.00" in ended.err
    assert str(tmp_path) in ended.err
    assert (tmp_path / "slim.safetensors").exists()
    assert run("--resume", tmp_path).status == 3


def test_a_pareto_point_that_cannot_be_met_leaves_the_others(run: Run, tmp_path: Path) -> None:
    ended = run("--out", tmp_path, *QUICKEST, "--target", "macs=0.7,0.0001")
    assert ended.status == 3
    params = [sum(t.numel() for t in load_file(tmp_path / name).values()) for name in ("slim-macs=0.7.safetensors", "slim.safetensors")]
    assert params[1] < params[0] / 10


def test_a_target_for_the_latency_is_measured_as_the_table_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: set[tuple[str, int, int | None]] = set()

    def stopwatch(model: nn.Module, inputs: Tensor, runtime: Runtime) -> Callable[[], None]:
        """As many parameters, as many seconds."""
        timed.add((runtime.name, runtime.threads, len(inputs)))
        params = sum(p.numel() for p in model.parameters())
        return lambda: clock.__setitem__(0, clock[0] + params)

    clock = [0.0]
    monkeypatch.setitem(RUNTIMES, "eager", stopwatch)
    monkeypatch.setattr(Runtime, "clock", lambda *_: lambda: clock[0])
    monkeypatch.setattr(LayerTable, "_measured", lambda self, layer: float(layer.inputs * layer.outputs))
    ended = run("--out", tmp_path, *QUICKEST, "--target", "latency=0.5", "--threads", 2, "--latency-batch", 16, "--round-to", 1)
    assert ended.status == 0
    assert timed == {("eager", 2, 16)}
    original, slim = json.loads((tmp_path / "checkpoint" / "result.json").read_text())["rows"]
    assert slim["latency"] / original["latency"] == pytest.approx(0.5, rel=0.05)
    assert "latency in eager, 2 threads, batch 16 on cpu" in ended.out


def test_units_too_coarse_for_the_target(run: Run, tmp_path: Path) -> None:
    ended = run("--out", tmp_path, *QUICKEST, "--model", "tests.cli.test_cli:Narrow", "--target", "macs=0.35")
    assert ended.status == 3
    assert "units are too coarse" in ended.err


def test_pareto_run_keeps_every_point(run: Run, tmp_path: Path) -> None:
    assert run("--out", tmp_path, *QUICKEST, "--target", "macs=0.7,0.4").status == 0
    sizes = {}
    for name in ("slim-macs=0.7", "slim"):
        slim = fxprune.load(tmp_path / f"{name}.safetensors", digits_net())
        sizes[name] = fxprune.profile(slim, torch.randn(1, 1, 8, 8)).macs / fxprune.profile(digits_net(), torch.randn(1, 1, 8, 8)).macs
    assert sizes == {"slim-macs=0.7": pytest.approx(0.7, rel=0.01), "slim": pytest.approx(0.4, rel=0.01)}
    assert (tmp_path / "policy-macs=0.7.json").exists()
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2


@pytest.mark.export
def test_exports_the_result_and_tells_of_a_format_that_fails(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no such operator")

    monkeypatch.setitem(FORMATS, "torch-int8", replace(FORMATS["torch-int8"], write=refuse, writes=()))
    done = run("--out", tmp_path, *QUICKEST, "--export", "torch,torch-int8")
    assert done.status == 2 and "slim.int8.pt2: cannot export to torch-int8: no such operator" in done.err
    assert "slim.pt2, 0." in done.out and "of PyTorch's outputs" in done.out
    assert {"slim.pt2", "slim.safetensors", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    program: Any = torch.export.load(tmp_path / "slim.pt2")
    slim = fxprune.load(tmp_path / "slim.safetensors", digits_net()).eval()
    x = torch.randn(5, 1, 8, 8)
    assert torch.allclose(program.module()(x), slim(x), atol=1e-5)


def test_weights_from_a_file_and_options_from_yaml(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(digits_net().state_dict(), tmp_path / "net.safetensors")
    config = tmp_path / "search.yaml"
    config.write_text(
        f"weights: {tmp_path / 'net.safetensors'}\ntarget: [params=0.6, sparsity=0.1]\nstrategy: random\nrounds: 2\nsamples: 2\n"
    )
    out = tmp_path / "out"
    assert run("--config", config, "--out", out, "--distill-epochs", 0, "--no-baseline", "--samples", "3").status == 0
    (record, _) = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(record["candidates"]) == 3  # the command line has the last word
    assert record["params"] == pytest.approx(0.6, rel=0.01)
    original = torch.equal(digits_net_of(out / "checkpoint" / "original.safetensors"), digits_net_of(tmp_path / "net.safetensors"))
    assert original  # weights are given, so nothing is trained


@pytest.mark.parametrize(
    ("arguments", "augmented"),
    [
        ([], False),
        (["--train-epochs", "2"], False),
        (["--augment"], True),
        (["--train-epochs", "0", "--model", "tests.cli.test_cli:Narrow"], True),
        (["--weights", "net.pt"], True),
        (["--weights", "net.pt", "--train-epochs", "2"], True),
        (["--weights", "net.pt", "--no-augment"], False),
        (["--config", "{tmp}/unsaid.yaml"], False),
        (["--config", "{tmp}/said.yaml"], True),
    ],
)
def test_images_are_augmented_unless_the_run_trains_the_network(tmp_path: Path, arguments: list[str], augmented: bool) -> None:
    (tmp_path / "unsaid.yaml").write_text("augment: null")
    (tmp_path / "said.yaml").write_text("augment: true")
    options = read([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]).options
    assert options is not None
    begun = session.Session(replace(options, score_images=20, calibration_images=20, repair_images=20), "")
    held_out, training = (next(iter(begun.data.batches(part, 20, limit=20)))[0] for part in PARTS)
    assert torch.equal(begun.scored(digits_net().eval()).batches[0][0], held_out) != augmented
    assert torch.equal(begun.calibration[0][0], training) != augmented
    assert torch.equal(next(iter(begun.repairing))[0], training) != augmented


def test_calibration_without_data(tmp_path: Path) -> None:
    options = read(["--calibration", "none", "--calibration-images", "12", "--out", str(tmp_path)]).options
    assert options is not None and options.calibration == "none"
    begun = session.Session(options, "")
    assert [tuple(batch.shape) for batch in begun.calibration] == [(12, *begun.example.shape[1:])]
    assert begun.repairing is begun.calibration
    with pytest.raises(SearchError, match='calibration is "?.?some'):
        replace(options, calibration="some")


def digits_net_of(path: Path) -> Tensor:
    return load_file(path)["classifier.weight"]


def test_report_is_written_again(run: Run, whole: Path) -> None:
    before = (whole / "report.html").read_text()
    (whole / "report.html").unlink()
    for arguments in (("report", whole), ("--report", whole)):
        assert run(*arguments).status == 0
        assert (whole / "report.html").read_text() == before


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, expected in (("--version", f"fxprune {fxprune.__version__}"), ("--help", "--target METRIC=SHARE")):
        with pytest.raises(SystemExit) as ended:
            cli.main([argument])
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out


BAD = [
    (["--model", "torchvision:resnet19"], "resnet19"),
    (["--model", "nonsense"], "nonsense"),
    (["--model", "torchvision:resnet18", "--data", "imagefolder:{tmp}/empty"], "--weights FILE, or --train-epochs"),
    (["--model", "torchvision:resnet18", "--train-epochs", "1"], "does not run on 1x8x8 images"),
    (["--model", "no.such:net"], "no.such"),
    (["--model", "tests.cli.test_cli:NotANumber", "--train-epochs", "1"], "nan"),
    (["--weights", "{tmp}/none.safetensors"], "none.safetensors"),
    (["--weights", "{tmp}/other.safetensors"], "do not fit"),
    (["--data", "imagefolder:{tmp}/empty"], "empty"),
    (["--data", "parquet:{tmp}/nowhere"], "nowhere"),
    (["--data", "mnist"], "mnist"),
    (["--mean", "0.5,x"], "--mean"),
    (["--target", "macs=1.5"], "out of range"),
    (["--target", "flops=0.5"], "unknown target"),
    (["--target", "half"], "METRIC=SHARE"),
    (["--most", "x=1", "--train-epochs", "0", "--model", "tests.cli.test_cli:Narrow"], "the key 'x' of most names no group"),
    (
        ["--data", "tests.cli.test_cli:failing"],
        "data 'tests.cli.test_cli:failing', train: reading sample 1 raised OSError: disk (test_cli.py:",
    ),
    (["--reward", "speed"], "unknown reward"),
    (["--strategy", "rl"], "unknown strategy"),
    (["--repair", "magic"], "repair"),
    (["--importance", "magic"], "importance"),
    (["--preset", "fast"], "preset"),
    (["--device", "tpu9"], "tpu9"),
    (["--executor", "slurm"], "unknown executor"),
    (["--export", "tflite"], "unknown export format 'tflite'; there are torch"),
    (["--jobs", "0"], "jobs is 0"),
    (["--steps", "many"], "--steps"),
    (["--samples"], "--samples"),
    (["--distill-epochs", "-1"], "distill-epochs"),
    (["--no-such-option"], "--no-such-option"),
    (["surplus"], "surplus"),
    (["--out", "{tmp}/file"], "cannot write"),
    (["--config", "{tmp}/none.yaml"], "none.yaml"),
    (["--config", "{tmp}/broken.yaml"], "is not YAML"),
    (["--config", "{tmp}/list.yaml"], "mapping"),
    (["--config", "{tmp}/unknown.yaml"], "unknown option 'colour'"),
    (["--config", "{tmp}/wrong.yaml"], "rounds is 'ten'"),
    (["--resume", "{tmp}/empty"], "no run to resume"),
    (["--resume", "{tmp}/empty", "--seed", "3"], "--seed cannot be changed"),
    (["report", "{tmp}/empty"], "no finished run"),
    (["report", "{tmp}/empty", "--seed", "3"], "stands alone"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_leaves_older_results(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    for name, text in (("broken", "a: [1"), ("list", "- 1"), ("unknown", "colour: red"), ("wrong", "rounds: ten")):
        (tmp_path / f"{name}.yaml").write_text(text)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    (out / "policy.json").write_text("older")
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    standing_alone = {"--out", "--resume", "report", "surplus"} & set(given)
    ended = run(*given, *([] if standing_alone else ["--out", out, *_quick_for(given)]))
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("fxprune-search: error: ")
    assert message in ended.err
    assert (out / "policy.json").read_text() == "older"


def _quick_for(given: list[str]) -> list[str]:
    """Little training, unless the case says how much."""
    return [] if "--train-epochs" in given or "--weights" in given or "--model" in given else ["--train-epochs", "1"]


def test_presets_and_knobs_reach_the_search() -> None:
    request = read(
        ["--preset", "paper", "--epsilon", "0.3", "--clip", "none", "--target", "macs=0.5", "--target", "params=0.6", "--no-keep-best"]
    )
    assert request.options is not None
    search = request.options.search
    assert (search.samples, search.epsilon, search.clip, search.keep_best) == (PRESETS["paper"]["samples"], 0.3, None, False)
    assert [str(target) for target in search.points[0]] == ["macs=0.5", "params=0.6"]
    assert request.options.distill_lr == 1e-3
    assert request.options.distillation_epochs == 20


def test_resume_takes_other_workers_but_no_other_search() -> None:
    assert read(["--resume", "out", "--jobs", "2"]).changes == {"jobs": 2}
    with pytest.raises(SearchError, match="--target cannot be changed|--targets cannot be changed"):
        read(["--resume", "out", "--target", "macs=0.4"])


def test_on_a_terminal_progress_is_rewritten_in_place(whole: Path, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        console = Console(file=screen, force_terminal=True, width=80)
        with cli.Display(console) as display:
            run_again = session.begin(read(["--out", str(tmp_path / "out"), *QUICKEST]).options or pytest.fail("no options"), "x")
            assert not run_again.run(display).unmet
    text = (tmp_path / "screen").read_text()
    assert "\x1b[?25l" in text  # the cursor is hidden while a line is rewritten
    assert "scored" in text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_prints_completion(run: Run, shell: str) -> None:
    pytest.importorskip("shtab", reason="the completion extra is not installed")
    ended = run("--print-completion", shell)
    assert ended.status == 0 and "--score-images" in ended.out and "fxprune-search" in ended.out


def test_completion_without_shtab_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    ended = run("--print-completion", "bash")
    assert ended.status == 2 and "pip install 'fxprune[completion]'" in ended.err
