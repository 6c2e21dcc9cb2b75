"""A command-line search from its options to its files, stage by stage; what a stage made is on disk before the next one begins.

A run can be killed at any moment: resumed from its folder, it redoes at most the stage or the round that was cut.
"""

from __future__ import annotations

import copy
import shutil
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fxprune import driver
from fxprune.api import compress, record
from fxprune.cli import run_folder as outputs
from fxprune.cli.kept_repairs import KeptRepairs
from fxprune.cli.options import Options
from fxprune.cli.run_folder import RunSummary
from fxprune.cli.tensorboard import Scalars, writer_class
from fxprune.costs.profiling import profile
from fxprune.data.datasets import Data, load_data
from fxprune.data.images import Batches
from fxprune.driver import checkpoint
from fxprune.errors import FxPruneError, InputError, SearchError, TargetError, first_line
from fxprune.evaluation.accuracy import evaluate_accuracy, logits_of
from fxprune.evaluation.likeness import Likeness
from fxprune.evaluation.running import call, evaluating, one_thread
from fxprune.evaluation.synthetic import NONE, synthetic_batches, without_labels
from fxprune.exporting.exporter import export
from fxprune.exporting.formats import FORMATS, require
from fxprune.importance.criteria import importance_name
from fxprune.models.loading import load_model
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.planning.cost_model import cost_model
from fxprune.repair.repairer import Repairer
from fxprune.report.explaining import Explanation, explain
from fxprune.report.formatting import Row
from fxprune.searching.candidates import Candidates
from fxprune.searching.norms import LR, recover_norms
from fxprune.searching.problem import graph_for, make_problem, multiple_for
from fxprune.searching.recovery import Recovery, read_weights, write_weights
from fxprune.searching.result import Repairing, SearchResult, repair_result, result_of
from fxprune.timing.runtimes import Runtime, in_turns
from fxprune.training.config import Progress, TrainConfig, resolve_device
from fxprune.training.distillation import DistillConfig, distill
from fxprune.training.fitting import train

FORMAT = "fxprune-session/1"
LARGE = 5 * 10**10  # multiply-accumulates of a scoring beyond which candidates are scored on part of the images first
LATENCY_BATCH = 32
SMALL_STEP = 10**9  # multiply-accumulates of a training batch below which a second thread costs more than it brings


class Watcher(Protocol):
    """Is told how a run stands."""

    def stage(self, text: str) -> None:
        """A stage begins."""

    def searched(self, progress: driver.Progress) -> None:
        """A round of the search is over."""

    def repaired(self, done: int, total: int, layer: str) -> None:
        """A layer of a network is repaired."""

    def trained(self, progress: Progress) -> None:
        """A step of training or distillation is over."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on batches that stay where they are; a class, so that worker processes can have it."""

    batches: list[Any]

    def __call__(self, module: nn.Module) -> float:
        return evaluate_accuracy(module, self.batches)


def begin(options: Options, command: str) -> Session:
    """Start a run: its folder, emptied of an earlier run's checkpoint, gets the whole configuration before any work."""
    for name in options.export:
        require(name)
    if options.tensorboard:
        writer_class()
    described = {"format": FORMAT, "command": command, "options": options.state()}
    outputs.begin(Path(options.out), described)
    return Session(options, command)


def resume(out: str, **changes: Any) -> Session:
    """Take a run up again from its folder; ``changes``: ``jobs``, ``executor`` or ``device``."""
    state = outputs.read_json(Path(out) / "checkpoint" / "session.json", f"{out} holds no run to resume")
    if state.get("format") != FORMAT:
        raise SearchError(f"{out} holds a run of another version of fxprune ({state.get('format')!r}); start it again")
    options = Options.of({**state["options"], "out": out})
    return Session(options.moved(**changes), state["command"])


class Session:
    """One run. Its stages are the methods that ``run`` goes through, in their order."""

    def __init__(self, options: Options, command: str) -> None:
        self.options, self.command = options, command
        self.folder = Path(options.out) / "checkpoint"
        self.device = resolve_device(options.search.device)

    def run(self, watcher: Watcher) -> RunSummary:
        """Go through all stages, from wherever an earlier try was cut. Raises ``FxPruneError`` for what the user can fix."""
        finished = outputs.finished(self.folder)
        if finished is not None:
            return finished
        watcher.stage(f"reading {self.options.data}")
        model = self.loaded()
        with self._threads(model):
            return self._stages(model, watcher)

    def _stages(self, original: nn.Module, watcher: Watcher) -> RunSummary:
        self.train(original, watcher)
        watcher.stage("searching")
        outcome, candidates, unmet = self.search(original, watcher)
        watcher.stage("repairing what was found")
        reference = self.reference(original, candidates.graph)
        kind = self.options.search.repair
        repairer = KeptRepairs(self.folder, kind, lambda: Repairer(candidates.graph, self.repairing, kind, reference, watcher.repaired))
        found = self.results(outcome, candidates, repairer)
        for note in next((record(result.model).notes for result in found.values()), ()):
            if note.startswith("repair"):
                watcher.stage(note)
        rivals = self.rivals(outcome, found["slim"], candidates, repairer) if self.options.baseline else {}
        slim = {name: result.model for name, result in {**rivals, **found}.items()}
        repaired: dict[nn.Module, nn.Module] = {model: copy.deepcopy(model) for model in slim.values()} if self.trains_slim else {}
        for name, model in slim.items():
            self.distil(name, model, original, watcher)
        models: dict[str, nn.Module] = {"original": original}
        if rivals:
            models["uniform"] = rivals["uniform"].model
            searched = found["slim"]
            if self.trains_slim and not unmet:
                found["slim"] = self.best_trained(outcome, searched, rivals, watcher)
            if found["slim"] is not searched:
                models["searched"] = searched.model
        models |= {name: result.model for name, result in found.items()}
        watcher.stage("measuring on the test part")
        latencies = in_turns(list(models.values()), self.example, self.runtime)
        timed = zip(models.items(), latencies, strict=True)
        rows = [self.measured(name, model, latency, repaired.get(model)) for (name, model), latency in timed]
        exports = self.exported(found, watcher)
        return outputs.write(self.options, self.command, outcome, candidates, found, rows, unmet, self.data.num_classes, exports)

    @property
    def runtime(self) -> Runtime:
        """Where latency is measured, as target and in the last table."""
        config = self.options.search
        return Runtime(config.runtime, config.threads, config.latency_batch or LATENCY_BATCH)

    @cached_property
    def data(self) -> Data:
        o = self.options
        return load_data(o.data, mean=o.mean, std=o.std, image_size=o.image_size, seed=o.search.seed)

    @cached_property
    def validation(self) -> Accuracy:
        """Accuracy on held-out training images; training goes by it, and nothing but the last figures by the test part."""
        limit = self.options.score_images
        return Accuracy(list(self.data.batches("validation", self.options.batch_size, limit=limit, device=self.device)))

    def scored(self, original: nn.Module) -> Likeness:
        """What candidates are scored by: those images, augmented where the network may have been trained on them."""
        o = self.options
        batches = self.data.batches("validation", o.batch_size, augmented=o.augmented, limit=o.score_images, device=self.device)
        return Likeness.of(original, batches)

    @property
    def weights(self) -> Path:
        """The original's weights as the search sees them; kept, so that a resumed run has the same ones."""
        return self.folder / "original.safetensors"

    def loaded(self) -> nn.Module:
        """The network to be pruned, with the weights of an earlier try, those given, or its builder's. Raises ``InputError`` if it does
        not fit the data."""
        return self._built(self.weights if self.weights.exists() else None)

    def _built(self, kept: Path | None) -> nn.Module:
        """The network with the weights that an earlier try kept, or without those with the weights given, or its builder's."""
        o = self.options
        torch.manual_seed(o.search.seed)
        model = load_model(o.model, num_classes=self.data.num_classes, weights=o.weights if kept is None else None)
        if kept is not None:
            read_weights(model, kept)
        model.to(self.device).eval()
        self._check_fit(model)
        return model

    def explained(self) -> Explanation:
        """What of the network can be pruned by these options. The folder may hold a run of another network and is not read."""
        return explain(graph_for(self._built(None), self.example, self.options.search, blocks=self.options.search.blocks))

    def train(self, model: nn.Module, watcher: Watcher) -> None:
        """Ordinary training in place, where it is asked for and an earlier try has not done it."""
        o = self.options
        if self.weights.exists():
            return
        if o.training_epochs:
            watcher.stage(f"training {o.model} for {o.training_epochs} epochs")
            config = TrainConfig(
                epochs=o.training_epochs,
                device=str(self.device),
                seed=o.search.seed,
                validate=self.validation,
                on_step=watcher.trained,
                checkpoint_dir=self.folder / "training",
                resume=True,
            )
            train(model, self.training, config=config)
        write_weights(model, self.weights)
        self._forget("training")

    def search(self, original: nn.Module, watcher: Watcher) -> tuple[driver.SearchOutcome, Candidates, str]:
        """The outcome, what makes its networks, and why the target was not met (then the outcome is the nearest), or an empty text."""
        config = self.options.search
        # Recovery between prune steps trains what is sliced; the original must stay what it is, the teacher.
        working = copy.deepcopy(original) if config.recover_every else original
        graph = graph_for(working, self.example, config, blocks=config.blocks)
        scored = self.scored(original)
        problem, candidates = make_problem(
            graph,
            scored,
            calibration=self.calibration,
            importance=without_labels(config.importance, self.options.calibration, config.repair),
            round_to=multiple_for(graph, config),
            repair=config.repair,
            seed=config.seed,
            reference=self.reference(original, graph),
            rough=scored.first(self.options.rough_images),
            runtime=self.runtime,
            blocks=config.blocks,
            tabled=config.table,
            rungs=self.rungs(scored, graph),
            most=config.most,
            loss=config.loss,
            own_costs=config.costs,
            folder=self.folder,
        )
        if config.recover_every:
            problem = Recovery(candidates, working, lambda slim: self.recover(original, slim, watcher)).attached(problem)
        folder = self.folder / "search"
        resumed = checkpoint.exists(folder)
        scalars = Scalars(Path(self.options.out) / "tensorboard") if self.options.tensorboard else None

        def told(progress: driver.Progress) -> None:
            if scalars is not None:
                scalars(progress)
            watcher.searched(progress)

        try:
            return driver.run(problem, config, checkpoint_dir=folder, on_event=told, resume=resumed), candidates, ""
        except TargetError as error:
            return error.nearest, candidates, str(error)
        finally:
            if scalars is not None:
                scalars.close()

    def rungs(self, scored: Likeness, graph: CouplingGraph) -> list[Likeness]:
        """Where scoring is expensive: the same on a quarter and on half of the images."""
        images = self.options.score_images
        if cost_model(graph).macs() * images < LARGE:
            return []
        return [scored.first(-(-images // 4)), scored.first(-(-images // 2))]

    def reference(self, original: nn.Module, graph: CouplingGraph) -> CouplingGraph | None:
        """The original, analysed, where training between prune steps changes the weights that ``graph`` slices."""
        if graph.model is original:
            return None
        return graph_for(original, self.example, self.options.search, blocks=False)

    def results(self, outcome: driver.SearchOutcome, candidates: Candidates, repairer: Repairing) -> dict[str, SearchResult]:
        """The slim network of every point of the targets by its file's stem; the last, or only, one is plain ``slim``."""
        points = outcome.pareto or (outcome,)
        stems = [f"slim-{'-'.join(point.targets)}" for point in points[:-1]] + ["slim"]
        return {stem: result_of(point, candidates, self.options.search, repairer) for stem, point in zip(stems, points, strict=True)}

    def rivals(
        self, outcome: driver.SearchOutcome, found: SearchResult, candidates: Candidates, repairer: Repairing
    ) -> dict[str, SearchResult]:
        """What a search has to be better than: the uniform allocation and, where networks are trained after their repair, the one halfway
        to it. On the same budget, from the same weights, with the same repair. A score before training says little of allocations that
        leave some layers next to nothing, and training makes them alike or worse."""
        even, halfway = outcome.baselines["uniform"].removed, outcome.halfway
        made = {"uniform": self.beside(found, "uniform", even, "l2", candidates, repairer)}
        if halfway is not None and self.trains_slim:
            importance = importance_name(self.options.search.importance)
            made["halfway"] = self.beside(found, "halfway", halfway, importance, candidates, repairer)
        return made

    def beside(
        self, found: SearchResult, name: str, removed: Any, importance: str, candidates: Candidates, repairer: Repairing
    ) -> SearchResult:
        """Another allocation on the budget of ``found``, repaired."""
        meta = {key: value for key, value in found.policy.meta.items() if key not in ("reward", "metrics")}
        policy = candidates.policy(removed, {**meta, "allocation": name}, importance)
        model = repair_result(compress(candidates.graph, policy), removed, candidates, repairer)
        return replace(found, policy=policy, model=model)

    def best_trained(
        self, outcome: driver.SearchOutcome, found: SearchResult, rivals: dict[str, SearchResult], watcher: Watcher
    ) -> SearchResult:
        """The best on the held-out images of what the search found and of its rivals that meet the target, all of them trained alike; of
        equals the first. A latency is known of what the search measured alone."""
        even = outcome.baselines["uniform"]
        known = even.met and not self.options.search.timed and not np.array_equal(even.removed, outcome.removed)
        trained = {"search": found, **{name: one for name, one in rivals.items() if name != "uniform" or known}}
        if len(trained) == 1:
            return found
        scores = {name: self.validation(one.model) for name, one in trained.items()}
        best = max(scores, key=lambda name: scores[name])
        said = ", ".join(f"{name} {100 * score:.2f} %" for name, score in scores.items())
        watcher.stage(f"after training, on held-out images: {said}; kept: {best}")
        return trained[best]

    def distil(self, name: str, model: nn.Module, teacher: nn.Module, watcher: Watcher) -> None:
        """Distil a slim network in place, or take the weights that an earlier try came to."""
        kept = self.folder / f"distilled-{name}.safetensors"
        if kept.exists():
            read_weights(model, kept)
        else:
            self.recover_norms(name, model, teacher, watcher)
            if self.options.distillation_epochs:
                watcher.stage(f"distilling {name} for {self.options.distillation_epochs} epochs")
                self.train_by(teacher, model, watcher, f"distilling-{name}")
            write_weights(model, kept)
        self._forget(f"distilling-{name}")
        model.eval()

    @property
    def trains_slim(self) -> bool:
        """Whether the networks are trained after their repair."""
        config = self.options.search
        return bool(self.options.distillation_epochs or (config.recover == "norms" and config.recover_epochs))

    def recover_norms(self, name: str, model: nn.Module, teacher: nn.Module, watcher: Watcher) -> None:
        """Train the norms of a repaired network in place, where that is asked for, or take the weights that an earlier try came to."""
        config = self.options.search
        if config.recover != "norms" or not config.recover_epochs:
            return
        kept, stage = self.folder / f"recovered-{name}.safetensors", f"recovering-{name}"
        if kept.exists():
            read_weights(model, kept)
        else:
            watcher.stage(f"training the norms of {name} for {config.recover_epochs} epochs")
            training = DistillConfig(
                epochs=config.recover_epochs,
                lr=LR,
                device=str(self.device),
                seed=config.seed,
                validate=self.validation,
                on_step=watcher.trained,
                checkpoint_dir=self.folder / stage,
                resume=True,
            )
            recover_norms(model, teacher, self.training, training)
            write_weights(model, kept)
        self._forget(stage)

    def recover(self, teacher: nn.Module, student: nn.Module, watcher: Watcher) -> None:
        """Distil between prune steps. A search that was cut redoes its last round and so comes to the recovery that was cut with it,
        unless a latency that this round measured again leads it to another network: what was begun belongs to one of these shapes only."""
        shapes = [tuple(parameter.shape) for parameter in student.parameters()]
        stage = f"recovering-{zlib.crc32(repr(shapes).encode()):08x}"
        self.train_by(teacher, student, watcher, stage)
        self._forget(stage)

    def _forget(self, stage: str) -> None:
        """Remove the checkpoint of a training whose weights are kept elsewhere."""
        shutil.rmtree(self.folder / stage, ignore_errors=True)

    def train_by(self, teacher: nn.Module, student: nn.Module, watcher: Watcher, stage: str) -> None:
        """Distillation of the original's responses, best weights kept by the held-out images; its checkpoint lies in ``stage``."""
        o = self.options
        config = DistillConfig(
            epochs=o.distillation_epochs,
            lr=DistillConfig.lr if o.distill_lr is None else o.distill_lr,
            device=str(self.device),
            seed=o.search.seed,
            validate=self.validation,
            on_step=watcher.trained,
            checkpoint_dir=self.folder / stage,
            resume=True,
        )
        distill(student, teacher, self.training, config=config)

    def measured(self, name: str, model: nn.Module, latency: float, repaired: nn.Module | None) -> Row:
        """A network's figures, with those of what it was before training; the only place where the test part is used."""
        test = self.data.batches("test", self.options.batch_size, device=self.device)
        accuracy = evaluate_accuracy(model, test)
        untrained = None if repaired is None else evaluate_accuracy(repaired, test)
        counts = profile(model, self.example)
        return Row(name, accuracy, counts.macs, counts.params, latency, outputs.size_on_disk(model, self.folder), untrained)

    def exported(self, found: dict[str, SearchResult], watcher: Watcher) -> list[dict[str, Any]]:
        """The networks in the formats asked for. A format that fails is told of and costs neither the others nor the result."""
        told: list[dict[str, Any]] = []
        for left in Path(self.options.out).glob(".export-*"):  # by an export that was killed
            shutil.rmtree(left, ignore_errors=True)
        for stem, name in ((stem, name) for stem in found for name in self.options.export):
            watcher.stage(f"exporting {stem} to {name}")
            path = Path(self.options.out) / f"{stem}{FORMATS[name].suffix}"
            batches = self.calibration if FORMATS[name].quantized else None
            try:
                done = export(found[stem].model, path, name, calibration=batches)
                told.append({"file": path.name, "format": name, "difference": done.difference, "bytes": done.bytes})
            except FxPruneError as error:
                told.append({"file": path.name, "format": name, "error": str(error)})
        return told

    @property
    def training(self) -> Batches:
        """Shuffled, augmented batches of the training part, from the first epoch on."""
        o = self.options
        return self.data.batches("train", o.batch_size, training=True, seed=o.search.seed, device=self.device)

    def _threads(self, model: nn.Module) -> AbstractContextManager[None]:
        """One thread for a network whose training steps are small, else as many as torch takes."""
        small = profile(model, self.example).macs * self.options.batch_size < SMALL_STEP
        return one_thread() if small else nullcontext()

    @cached_property
    def example(self) -> torch.Tensor:
        """One image, as the network takes it."""
        return self.data.example().to(self.device)

    @cached_property
    def calibration(self) -> list[Any]:
        """Training images, or what stands in for them, for importance and for the repair of candidates."""
        if self.options.calibration == NONE:
            return synthetic_batches(self.loaded(), self.example, self.options.calibration_images, seed=self.options.search.seed)
        return list(self._training_images(self.options.calibration_images))

    @property
    def repairing(self) -> Iterable[Any]:
        """Training images, or what stands in for them, for the repair of what was found."""
        return self.calibration if self.options.calibration == NONE else self._training_images(self.options.repair_images)

    def _training_images(self, limit: int) -> Batches:
        """Augmented where the score's are: what a repair learns from them has to hold for unseen ones."""
        o = self.options
        seed, device = o.search.seed, self.device
        return self.data.batches("train", o.batch_size, augmented=o.augmented, limit=limit, seed=seed, device=device)

    def _check_fit(self, model: nn.Module) -> None:
        """Raise ``InputError`` where the network does not take the data's images, or has other classes."""
        what, shape = self.options.model, "x".join(str(n) for n in self.example.shape[1:])
        try:
            with evaluating(model):
                logits = logits_of(call(model, self.example))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"model {what!r} does not run on {shape} images of {self.options.data!r}: {first_line(error)}") from error
        if logits.ndim < 2 or logits.shape[1] < self.data.num_classes:
            raise InputError(
                f"model {what!r} gives scores of shape {tuple(logits.shape)}; {self.options.data!r} has {self.data.num_classes} classes"
            )
