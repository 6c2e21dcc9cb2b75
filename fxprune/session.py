"""A command-line search from its options to its files, stage by stage; what a stage made is on disk before the next one begins.

A run can be killed at any moment: taken up again from its folder, it redoes at most the stage or the round that was cut.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx, nn

from fxprune import __version__, driver
from fxprune.api import analyze
from fxprune.data import Data, load_data
from fxprune.distillation import DistillConfig, distill
from fxprune.driver.checkpoint import replace_text
from fxprune.errors import SearchError, TargetError
from fxprune.evaluation import evaluate_accuracy, recalibrate_batchnorm
from fxprune.files import save
from fxprune.options import Options
from fxprune.policies import Policy
from fxprune.profiling import profile
from fxprune.recovery import Recovery, read_weights, write_weights
from fxprune.results import Row
from fxprune.searching import Candidates, make_problem, result_of
from fxprune.sources import load_model
from fxprune.training import Progress, TrainConfig, resolve_device, train
from fxprune.webpage import page

FORMAT = "fxprune-session/1"
LATENCY_BATCH, LATENCY_RUNS = 32, 30


class Watcher(Protocol):
    """Is told how a run stands."""

    def stage(self, text: str) -> None:
        """A stage begins."""

    def searched(self, progress: driver.Progress) -> None:
        """A round of the search is over."""

    def trained(self, what: str, progress: Progress) -> None:
        """A step of training or distillation is over."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on batches that stay where they are; a class, so that worker processes can have it."""

    batches: list[Any]

    def __call__(self, module: nn.Module) -> float:
        return evaluate_accuracy(module, self.batches)


@dataclass(frozen=True)
class Finished:
    """How a run ended. ``unmet``: why the target was not met, or empty; the files then hold the nearest result."""

    rows: tuple[Row, ...]
    unmet: str
    load: str
    summary: str


def begin(options: Options, command: str) -> Session:
    """Start a run: its folder, emptied of an earlier run's checkpoint, gets the whole configuration before any work."""
    folder = Path(options.out) / "checkpoint"
    described = options.state()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The configuration goes first and comes back last: without it a folder is no run, rather than a mixture of two.
        for name in ("session.json", "search/search.json", *_MADE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise SearchError(f"cannot write to --out {options.out}: {error.strerror}; choose a folder that can be written") from error
    replace_text(folder / "session.json", json.dumps({"format": FORMAT, "command": command, "options": described}, indent=2) + "\n")
    return Session(options, command)


_MADE = ("original.safetensors", "uniform.safetensors", "slim.safetensors", "result.json")


def resume(out: str, **changes: Any) -> Session:
    """Take a run up again from its folder; ``changes``: ``jobs``, ``executor`` or ``device``."""
    state = _read_json(Path(out) / "checkpoint" / "session.json", f"{out} holds no run to resume")
    if state.get("format") != FORMAT:
        raise SearchError(f"{out} holds a run of another version of fxprune ({state.get('format')!r}); start it anew")
    options = Options.of({**state["options"], "out": out})
    return Session(options.moved(**changes), state["command"])


def report(out: str) -> Path:
    """Write the report page of a finished run again; returns its path."""
    folder = Path(out)
    result = _read_json(folder / "checkpoint" / "result.json", f"{out} holds no finished run")
    lines = _read_text(folder / "history.jsonl", f"{out} holds no finished run").splitlines()
    replace_text(folder / "report.html", page(result, [json.loads(line) for line in lines]))
    return folder / "report.html"


class Session:
    """One run. Its stages are properties and methods in the order in which ``run`` goes through them."""

    def __init__(self, options: Options, command: str) -> None:
        self.options, self.command = options, command
        self.out = Path(options.out)
        self.folder = self.out / "checkpoint"
        self.device = resolve_device(options.search.device)

    def run(self, watcher: Watcher) -> Finished:
        """Go through all stages, from wherever an earlier try was cut. Raises ``FxPruneError`` for what the user can mend."""
        done = self.folder / "result.json"
        if done.exists() and (self.out / "slim.safetensors").exists():
            return self._finished(_read_json(done, "unreadable result"))
        watcher.stage(f"reading {self.options.data}")
        data = self.data
        original = self.original(watcher)
        watcher.stage("searching")
        outcome, candidates, unmet = self.search(original, watcher)
        found = result_of(outcome, candidates, self.options.search)
        models = {"slim": found.model}
        if self.options.baseline:
            models = {"uniform": self._uniform(outcome, candidates), **models}
        for name, model in models.items():
            self.distil(name, model, original, watcher)
        watcher.stage("measuring on the test part")
        save(found.model, self.folder / "slim.safetensors")
        rows = [self.measured(name, model, data) for name, model in {"original": original, **models}.items()]
        return self.write(found.policy, found.model, outcome, rows, unmet)

    @cached_property
    def data(self) -> Data:
        o = self.options
        return load_data(o.data, mean=o.mean, std=o.std, image_size=o.image_size, seed=o.search.seed)

    @cached_property
    def validation(self) -> Accuracy:
        """The score: accuracy on held-out training images, never on the test part."""
        limit = self.options.score_images
        return Accuracy(list(self.data.batches("validation", self.options.batch_size, limit=limit, device=self.device)))

    def original(self, watcher: Watcher) -> nn.Module:
        """The network to be pruned, trained first where that is asked for; its weights are kept, so a resumed run has the same."""
        o, kept = self.options, self.folder / "original.safetensors"
        torch.manual_seed(o.search.seed)
        model = load_model(o.model, num_classes=self.data.num_classes, weights=None if kept.exists() else o.weights)
        if kept.exists():
            read_weights(model, kept)
        model.to(self.device)
        self._check_shapes(model)
        if kept.exists():
            return model.eval()
        if o.training_epochs:
            watcher.stage(f"training {o.model} for {o.training_epochs} epochs")
            config = TrainConfig(
                epochs=o.training_epochs,
                device=str(self.device),
                seed=o.search.seed,
                validate=self.validation,
                on_step=lambda progress: watcher.trained("training", progress),
            )
            train(model, self.data.batches("train", o.batch_size, training=True, seed=o.search.seed, device=self.device), config=config)
        write_weights(model, kept)
        return model.eval()

    def search(self, original: nn.Module, watcher: Watcher) -> tuple[driver.SearchOutcome, Candidates, str]:
        """The outcome, what makes its networks, and why the target was not met (then the outcome is the nearest), or an empty text."""
        config = self.options.search
        calibration = list(self.data.batches("train", self.options.batch_size, limit=self.options.calibration_images, device=self.device))
        # Recovery between prune steps trains what is sliced; the original must stay what it is, the teacher.
        working = copy.deepcopy(original) if config.recover_every else original
        graph = analyze(working, self._example(), ignore=config.ignore, attention=config.attention)
        problem, candidates = make_problem(
            graph,
            self.validation,
            calibration=calibration,
            importance=config.importance,
            round_to=config.round_to,
            repair=config.repair,
            seed=config.seed,
        )
        if config.recover_every:
            problem = Recovery(candidates, working, lambda slim: self._distilled(slim, original, watcher)).attached(problem)
        folder = self.folder / "search"
        try:
            resumed = (folder / driver.CHECKPOINT).exists()
            return driver.run(problem, config, checkpoint_dir=folder, on_event=watcher.searched, resume=resumed), candidates, ""
        except TargetError as error:
            return error.nearest, candidates, str(error)

    def distil(self, name: str, model: fx.GraphModule, teacher: nn.Module, watcher: Watcher) -> None:
        """Distil a slim network in place, or take the weights of an earlier try."""
        kept = self.folder / f"{name}.safetensors"
        if kept.exists():
            read_weights(model, kept)
            return
        if self.options.search.repair == "bn":
            recalibrate_batchnorm(model, self.data.batches("train", limit=self.options.calibration_images, device=self.device))
        watcher.stage(f"distilling {'the uniform baseline' if name == 'uniform' else 'the slim network'}")
        self._distilled(model, teacher, watcher)
        model.eval()
        write_weights(model, kept)

    def measured(self, name: str, model: nn.Module, data: Data) -> Row:
        """A network's figures; the only place where the test part is used."""
        accuracy = evaluate_accuracy(model, data.batches("test", self.options.batch_size, device=self.device))
        counts = profile(model, self._example())
        batch = torch.cat([self._example()] * LATENCY_BATCH)
        size = (self.folder / f"{name}.safetensors").stat().st_size
        return Row(name, accuracy, counts.macs, counts.params, profile(model, batch).latency(LATENCY_RUNS), size)

    def write(
        self, policy: Policy, slim: fx.GraphModule, outcome: driver.SearchOutcome, rows: list[Row], unmet: str
    ) -> Finished:
        """Write the files of a finished run, each whole or not at all, the result last."""
        o = self.options
        uniform = outcome.baselines["uniform"].removed
        units = {name: n for name, n in zip(self._names, self._units, strict=True)}
        result = {
            "model": o.model,
            "targets": list(outcome.targets),
            "unmet": unmet,
            "command": self.command,
            "load": self._snippet(),
            "summary": _summary(rows, outcome, unmet),
            "rows": [asdict(row) for row in rows],
            "groups": [
                {"name": name, "units": n, "removed": int(outcome.removed[i]), "uniform": int(uniform[i])}
                for i, (name, n) in enumerate(units.items())
            ],
            "options": {**{k: v for k, v in o.state().items() if k != "search"}, **o.search.described()},
        }
        policy.save(self.out / "policy.json")
        save(slim, self.out / "slim.safetensors")
        replace_text(self.out / "history.jsonl", "".join(json.dumps(record) + "\n" for record in outcome.history))
        replace_text(self.out / "report.html", page(result, outcome.history))
        replace_text(self.folder / "result.json", json.dumps(result, indent=2) + "\n")
        return self._finished(result)
