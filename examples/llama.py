"""A small Llama, pruned in its own class, and a folder that transformers loads without fxprune: ``python examples/llama.py [folder]``.

It learns the characters of a text that comes with Python, loses a quarter of its feed-forward width, half of its heads (queries and the
keys and values they read go together) and a quarter of its hidden size, trains on, and is written with ``export(format="transformers")``.
Another process loads the folder and generates the same. Nothing is downloaded. Install ``fxprune[transformers]``.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxprune

SMALL = os.environ.get("FXPRUNE_EXAMPLE_BUDGET") == "small"
STEPS, LENGTH = (20, 32) if SMALL else (200, 64)


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    starts = torch.randint(len(text) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([text[s : s + LENGTH] for s in starts.tolist()])


def train(model: Any, text: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for step in range(steps):
        ids = windows(text, 16, step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def perplexity(model: Any, text: Tensor) -> float:
    ids = windows(text, 32, -1)
    with torch.no_grad():
        return math.exp(float(model(input_ids=ids, labels=ids).loss))


def main(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    letters = sorted(set(source))
    text = torch.tensor([letters.index(c) for c in source])
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train(model, text, STEPS)

    inputs = {"input_ids": windows(text, 2, 0), "use_cache": False}
    graph = fxprune.analyze(model, inputs, attention="heads")
    policy = {}
    for group in graph.groups:
        if group.prunable:
            policy[group.name] = 0.5 if "self_attn" in group.name else 0.25
    slim: Any = fxprune.compress(graph, policy, importance="l2", keep_class=True)
    print(f"{type(slim).__name__}: {model.num_parameters()} parameters -> {slim.num_parameters()}")
    print(f"perplexity {perplexity(model, text):.2f}, pruned {perplexity(slim, text):.2f}", end="")
    train(slim, text, STEPS // 2)
    print(f", trained on {perplexity(slim, text):.2f}")

    done = fxprune.export(slim, folder / "slim", format="transformers")
    start = text[:16].unsqueeze(0)
    mine = slim.generate(input_ids=start, max_new_tokens=32, do_sample=False, pad_token_id=0)[0].tolist()
    script = (
        "import sys; sys.modules['fxprune'] = None\n"
        "import torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(done.path)!r})\n"
        f"print(model.generate(input_ids=torch.tensor({start.tolist()}), max_new_tokens=32, do_sample=False, pad_token_id=0)[0].tolist())\n"
    )
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.strip().splitlines()[-1] == str(mine)
    print(f"{done.bytes} bytes in {done.path.name}; elsewhere it generates the same: {''.join(letters[i] for i in mine)[16:]!r}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
