"""A small language model, pruned: perplexity against width. ``python -m benchmarks.language [--steps N] [--more N] [--seeds N]``.

A Llama of 0.43 million parameters learns the characters of Python's own manual (``pydoc_data.topics``, which comes with Python); then
its feed-forward width, and its hidden size, lose a quarter and a half, chosen at random, by magnitude and by Taylor scores, with and
without least squares, and with norms plain and exact; what lost of its hidden size is then trained further. The tables go to
docs/studies/language.md between its marks. Needs ``fxprune[transformers]``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune

PAGE = Path(__file__).resolve().parents[1] / "docs" / "studies" / "language.md"
BEGIN, END = "<!-- made by benchmarks/language.py: begin -->", "<!-- end -->"
LENGTH, BATCH = 64, 32
KEPT = (0.75, 0.5)
WAYS = ("random", "l2", "taylor")


def corpus() -> tuple[Tensor, Tensor, int]:
    """The manual as numbers of characters: what is trained on, the tenth that is not, and how many characters there are."""
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "".join(topics[name] for name in sorted(topics))
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    numbers = torch.tensor([number[letter] for letter in text])
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(letters)


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    """``count`` pieces of the text, (count, LENGTH)."""
    starts = torch.randint(len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def loss_of(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of every next character."""
    return F.cross_entropy(output["logits"][:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def trained(text: Tensor, letters: int, steps: int) -> Any:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=letters, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
            max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, use_cache=False,
        )
    )  # fmt: skip
    train(model, text, steps, 4e-3)
    return model


def train(model: nn.Module, text: Tensor, steps: int, lr: float, first: int = 0) -> None:
    """Train in place on ``steps`` batches of the text from the ``first`` on; left in evaluation mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(first, first + steps):
        batch = {"input_ids": windows(text, BATCH, step)}
        loss_of(model(**batch), batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def perplexity(model: nn.Module, text: Tensor) -> float:
    """On 128 pieces that nothing was trained or calibrated on."""
    losses = []
    with torch.no_grad():
        for seed in range(2):
            batch = {"input_ids": windows(text, 64, 10_000 + seed)}
            losses.append(float(loss_of(model(**batch), batch)))
    return math.exp(sum(losses) / len(losses))


class Study:
    """One trained model, its analysis and its calibration data."""

    def __init__(self, steps: int, more: int, seeds: int) -> None:
        self.text, self.test, letters = corpus()
        self.steps, self.more, self.seeds = steps, more, seeds
        self.model = trained(self.text, letters, steps)
        self.calibration = [{"input_ids": windows(self.text, 16, 50_000 + seed)} for seed in range(10)]
        self.graph = fxprune.analyze(self.model, self.calibration[0], attention="heads")
        self.whole = perplexity(self.model, self.test)
        free = [group.name for group in self.graph.groups if group.prunable]
        self.parts = {
            "feed-forward": [name for name in free if ".mlp." in name],
            "hidden size": [name for name in free if "embed" in name],
        }

    def cell(self, part: str, kept: float, way: str, repair: str, norms: str = "plain") -> list[float]:
        """Perplexities, one for each seed where the choice is random."""
        found = []
        for seed in range(self.seeds if way == "random" else 1):
            chance = torch.Generator().manual_seed(seed)
            ranked: Any = (lambda group, _, chance=chance: torch.rand(group.size, generator=chance)) if way == "random" else way
            found.append(perplexity(self.slim(part, kept, ranked, repair, norms), self.test))
        return found

    def slim(self, part: str, kept: float, importance: Any, repair: str, norms: str) -> nn.Module:
        batches = self.calibration if importance == "taylor" or repair != "none" else None
        return fxprune.compress(
            self.graph, dict.fromkeys(self.parts[part], 1 - kept), self.calibration[0], importance=importance, repair=repair, norms=norms,
            calibration=batches, loss=loss_of,
        )  # fmt: skip

    def retrained(self, kept: float, repair: str, norms: str) -> float:
        """Perplexity of what lost of its hidden size by Taylor scores, trained further at a quarter of the first learning rate."""
        slim = self.slim("hidden size", kept, "taylor", repair, norms)
        train(slim, self.text, self.more, 1e-3, self.steps)
        return perplexity(slim, self.test)

    def after_training(self) -> str:
        whole = copy.deepcopy(self.model)
        train(whole, self.text, self.more, 1e-3, self.steps)
        lines = [f"| hidden size kept, {self.more} steps more | " + " | ".join(f"{k:.1%}" for k in KEPT) + " |"]
        lines += ["| --- |" + " ---: |" * len(KEPT)]
        for repair in ("none", "lstsq"):
            for norms in ("plain", "exact"):
                cells = [f"{self.retrained(kept, repair, norms):.2f}" for kept in KEPT]
                lines.append(f"| taylor{', least squares' if repair != 'none' else ''}, norms {norms} | " + " | ".join(cells) + " |")
                print(lines[-1], flush=True)
        return "\n".join([f"Unpruned, after {self.more} steps more: {perplexity(whole, self.test):.2f}.", "", *lines])

    def tables(self) -> Iterator[str]:
        yield f"Unpruned: {self.whole:.2f}, of {sum(p.numel() for p in self.model.parameters())} parameters."
        for part, forms in (("feed-forward", ("plain",)), ("hidden size", ("plain", "exact"))):
            lines = [f"| {part} kept | " + " | ".join(f"{k:.1%}" for k in KEPT) + " |", "| --- |" + " ---: |" * len(KEPT)]
            for way in WAYS:
                for repair in ("none", "lstsq"):
                    for norms in forms:
                        cells = [self.cell(part, kept, way, repair, norms) for kept in KEPT]
                        name = way + (", least squares" if repair != "none" else "") + (f", norms {norms}" if len(forms) > 1 else "")
                        lines.append(f"| {name} | " + " | ".join(map(_shown, cells)) + " |")
                        print(lines[-1], flush=True)
            yield "\n".join(lines)
        yield self.after_training()


def _shown(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--more", type=int, default=100, help="steps of training after pruning, in the last table")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = "\n\n".join(Study(given.steps, given.more, given.seeds).tables())
    head, _, rest = given.page.read_text(encoding="utf-8").partition(BEGIN)
    given.page.write_text(f"{head}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
