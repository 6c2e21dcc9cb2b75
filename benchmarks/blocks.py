"""What leaving out blocks costs, and what stands in for them: ``python -m benchmarks.blocks [--parts resnet44,transformer]``.

*resnet44*: weights trained on CIFAR-10 (``--folder``), at a share of the measured time, by the error table: widths alone, and widths and
blocks. The same slim network is repaired towards what is left of the original (so that nothing stands in for blocks) and towards the whole,
by least squares and by "joint"; those by least squares are trained equally in the end, by distillation. Time is processor time against the
original's, in turns.

*transformer*: twelve layers, trained here on the characters of Python's manual (``pydoc_data.topics``); a quarter of the depth goes, those
layers or halves whose absence alone changes the outputs least. Perplexity, then after some steps of the same training.

Each finished row is a line of ``--out``; started again, the command goes on with those that are missing. The tables go to docs/blocks.md
between its marks.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from benchmarks.allocation import NETWORKS, data_of
from benchmarks.cifar10 import Remembering
from benchmarks.language import BATCH, LENGTH, corpus, windows
from benchmarks.latency_targets import exported, runner, share
from fxprune import driver
from fxprune.allocation.leaving_out import block_effects
from fxprune.driver import SearchConfig
from fxprune.evaluation.accuracy import evaluate_accuracy
from fxprune.evaluation.likeness import Likeness
from fxprune.models.loading import load_model
from fxprune.passes.coupling.blocks import Block, finest
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.repair.repairer import Repairer
from fxprune.searching.problem import make_problem, multiple_for
from fxprune.timing.runtimes import Runtime
from fxprune.training.distillation import DistillConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "blocks.md"
BEGIN, END = "<!-- made by benchmarks/blocks.py: begin -->", "<!-- end -->"
Row = dict[str, Any]
REPAIRS = {"bn": "BatchNorm alone", "left": "least squares towards what is left", "lstsq": "least squares", "joint": "joint"}


class Layer(nn.Module):
    """Attention and a feed-forward network, their norms in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width))
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class Decoder(nn.Module):
    """A decoder of characters."""

    def __init__(self, letters: int, layers: int, width: int = 96, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(letters, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(self.norm(x))
        return found


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of every next character."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def learn(model: nn.Module, text: Tensor, steps: int, lr: float, first: int = 0) -> nn.Module:
    """Train ``model`` in place on pieces numbered from ``first`` on."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, windows(text, BATCH, first + step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def perplexity(model: nn.Module, text: Tensor, options: argparse.Namespace) -> float:
    """On pieces that nothing was trained or calibrated on."""
    with torch.no_grad():
        losses = [float(loss_of(model.eval(), windows(text, 64, 10_000 + seed))) for seed in range(options.test_pieces // 64)]
    return float(torch.tensor(losses).mean().exp())


def transformer(options: argparse.Namespace, done: Sequence[Row]) -> Iterator[Row]:
    """Rows of a quarter of the depth: layers, and halves."""
    train, test, letters = corpus()
    torch.manual_seed(0)
    model = Decoder(letters, options.layers)
    kept = options.out.with_suffix(".pt")
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        torch.save(learn(model, train, options.steps, 2e-3).state_dict(), kept)
    calibration = [windows(train, 16, 50_000 + seed) for seed in range(options.calibration)]
    graph = fxprune.analyze(model.eval(), calibration[0], blocks=True)
    quarter = options.layers // 4
    halves = finest(graph.blocks)
    layers = [block for block in graph.blocks if block.name in {f"layers.{i}" for i in range(options.layers)}]
    kinds = {f"{quarter} layers of {len(layers)}": (layers, quarter), f"{2 * quarter} halves of {len(halves)}": (halves, 2 * quarter)}
    whole = {"part": "transformer", "what": "whole", "repair": "none"}
    if not _among(whole, done):
        yield whole | {
            "before": perplexity(model, test, options),
            "after": perplexity(_more(model, train, options), test, options),
            "gone": [],
        }
    for what, (blocks, count) in kinds.items():
        gone = least(graph, blocks, calibration, count)
        for repair in [one for one in ("none", "lstsq", "joint") if one in options.repairs]:
            row = {"part": "transformer", "what": what, "repair": repair}
            if _among(row, done):
                continue
            begun = time.process_time()
            slim = fxprune.compress(graph, dict.fromkeys(gone, 1.0), repair=repair, calibration=calibration, importance="l2")
            seconds, before = time.process_time() - begun, perplexity(slim, test, options)
            after = perplexity(_more(slim, train, options), test, options)
            yield row | {"before": before, "after": after, "gone": gone, "seconds": seconds, "blocks": dict(fxprune.record(slim).blocks)}


def _more(model: nn.Module, text: Tensor, options: argparse.Namespace) -> nn.Module:
    return learn(copy.deepcopy(model), text, options.more, 1e-3, 100_000)


def least(graph: CouplingGraph, blocks: Sequence[Block], calibration: Sequence[Any], count: int) -> list[str]:
    """Names of the ``count`` blocks whose absence alone changes the outputs least."""
    effects = block_effects(graph, blocks, calibration)
    order = sorted(range(len(blocks)), key=lambda i: float((effects[i] ** 2).mean()))
    return [blocks[i].name for i in sorted(order[:count])]


def resnet44(options: argparse.Namespace, done: Sequence[Row]) -> Iterator[Row]:
    """Rows of ResNet-44 at a share of its time."""
    spec = NETWORKS["resnet44"]
    data = data_of(spec["data"], options.folder, spec["mean"], spec["std"])
    model = load_model(spec["model"], num_classes=10, weights=options.folder / spec["weights"]).eval()
    test = list(data.batches("test", 100, limit=options.test_images, seed=1))
    drawn = list(data.batches("train", 64, limit=options.images, seed=0))
    teacher, x = Remembering(model), data.example()[:1]
    graph = fxprune.analyze(model, x)
    score = Likeness.of(model, drawn[:1])
    whole = {"part": "resnet44", "what": "whole", "repair": "none"}
    if not _among(whole, done):
        yield whole | {"before": evaluate_accuracy(model, test), "after": None, "time": 1.0, "macs": 1.0, "params": 1.0, "gone": []}
    for blocks, repairs in ((False, ("bn", "lstsq", "joint")), (True, ("bn", "left", "lstsq", "joint"))):
        rows = [
            {"part": "resnet44", "what": "widths and blocks" if blocks else "widths", "repair": one}
            for one in repairs
            if one in options.repairs
        ]
        if all(_among(row, done) for row in rows):
            continue
        config = SearchConfig(targets=f"latency={options.share}", strategy="table", runtime=options.runtime, blocks=blocks)
        asked: dict[str, Any] = {"repair": "lstsq", "round_to": multiple_for(graph, config), "tabled": "must", "blocks": blocks}
        problem, candidates = make_problem(graph, score, calibration=drawn, runtime=Runtime(options.runtime), **asked)
        found = driver.run(problem, config)
        removed = found.removed
        pair = [runner(one, x, exported(one, x) if options.runtime == "onnx" else None) for one in (model, candidates.slim(removed).eval())]
        profiles = [fxprune.profile(one, x) for one in (model, candidates.slim(removed).eval())]
        shares = {"macs": profiles[1].macs / profiles[0].macs, "params": profiles[1].params / profiles[0].params, "time": share(*pair)}
        gone = [block.name for block in candidates.gone(removed)]
        for row in rows:
            if _among(row, done):
                continue
            slim, slimmer = candidates.made(removed)
            aim, kind = (slimmer.graph, "lstsq") if row["repair"] == "left" else (graph, row["repair"])
            Repairer(aim, drawn, kind)(slim.eval(), slimmer)
            before = evaluate_accuracy(slim.eval(), test)
            after = None
            if options.epochs and row["repair"] in ("left", "lstsq"):
                batches = data.batches("train", 128, training=True, limit=options.train_images, seed=0)
                fxprune.distill(slim, teacher, batches, config=DistillConfig(epochs=options.epochs, seed=0))
                after = evaluate_accuracy(slim.eval(), test)
            yield row | shares | {"before": before, "after": after, "gone": gone}


PARTS: dict[str, Callable[[argparse.Namespace, Sequence[Row]], Iterator[Row]]] = {"resnet44": resnet44, "transformer": transformer}


def _among(row: Row, done: Sequence[Row]) -> bool:
    return any(all(one.get(key) == value for key, value in row.items()) for one in done)


def tables(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """What goes to the page."""
    made = [f"```console\n$ python -m benchmarks.blocks {shlex.join(sys.argv[1:])}".rstrip() + "\n```"]
    mine = [row for row in rows if row["part"] == "resnet44"]
    if mine:
        lines = [f"| ResNet-44 | repair | time | MACs | parameters | before training | after {options.epochs} epochs |", "|" + "---|" * 7]
        for row in mine:
            what = row["what"] + (f" ({len(row['gone'])} blocks)" if row["gone"] else "")
            shares = [f"{row[key]:.0%}" for key in ("time", "macs", "params")]
            top1 = [f"{row['before']:.1%}", "" if row["after"] is None else f"{row['after']:.1%}"]
            lines.append("| " + " | ".join([what, REPAIRS.get(row["repair"], ""), *shares, *top1]) + " |")
        made.append("\n".join(lines))
    mine = [row for row in rows if row["part"] == "transformer"]
    if mine:
        lines = [f"| transformer, without | repair | perplexity | after {options.more} steps of training | CPU seconds |", "|" + "---|" * 5]
        for row in mine:
            figures = [f"{row['before']:.2f}", f"{row['after']:.2f}", f"{row['seconds']:.0f}" if row["gone"] else ""]
            named = row["what"] if row["gone"] else "nothing"
            lines.append("| " + " | ".join([named, REPAIRS.get(row["repair"], "none"), *figures]) + " |")
        made.append("\n".join(lines))
    return "\n\n".join(made)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--repairs", type=lambda text: text.split(","), default="none,bn,left,lstsq,joint")
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="where data and weights lie")
    parser.add_argument("--share", type=float, default=0.33, help="of the time of ResNet-44")
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--images", type=int, default=1024, help="unlabelled training images")
    parser.add_argument("--test-images", type=int, default=None, help="default: all")
    parser.add_argument("--train-images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=500, help="of training the transformer")
    parser.add_argument("--more", type=int, default=50, help="of training afterwards")
    parser.add_argument("--calibration", type=int, default=20, help="batches of 16 pieces")
    parser.add_argument("--test-pieces", type=int, default=512, help="for perplexities, a multiple of 64")
    parser.add_argument("--out", type=Path, default=Path("blocks.jsonl"))
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for part in options.parts.split(","):
        for row in PARTS[part](options, list(rows)):
            rows.append(row)
            print(json.dumps(row), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    head, _, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
    made = tables(rows, options)
    options.page.write_text(f"{head}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
