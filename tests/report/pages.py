"""Results of a search for the tests of the report page: what ``result.json`` and ``history.jsonl`` hold, unpleasant names included."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fxprune.report.formatting import Row

ROWS = [
    Row("original", 0.9889, 1_250_000, 37_030, 0.0029, 152_848),
    Row("uniform", 0.9702, 624_000, 18_580, 0.0023, 81_420),
    Row("slim", 0.9861, 624_470, 17_580, 0.00021, 78_420),
]


def history(steps: int = 1) -> list[dict[str, Any]]:
    candidates = [
        {"reward": 0.7, "accuracy": 0.7, "macs": 0.75, "params": 0.8, "sparsity": 0.2, "on_target": False},
        {"reward": 0.6, "accuracy": 0.6, "macs": 0.5, "params": 0.6, "sparsity": 0.3, "on_target": True},
        {"reward": 0.5, "accuracy": 0.5, "macs": 0.5, "params": 0.65, "sparsity": 0.3, "on_target": True},
    ]
    rounds = [
        {"reward": 0.7, "accuracy": 0.71, "macs": 0.75, "params": 0.8, "sparsity": 0.2, "evaluations": 5},
        {"reward": 0.6, "accuracy": 0.61, "macs": 0.5, "params": 0.6, "sparsity": 0.3, "evaluations": 9},
    ]
    last = {"evaluations": 9, "reward": 0.6, "accuracy": 0.6, "macs": 0.5, "params": 0.6, "sparsity": 0.3}
    return [{"step": step, **last, "rounds": rounds, "candidates": candidates} for step in range(1, steps + 1)]


def mark(layer: str, role: str, kept: int, total: int, joins: str = "") -> dict[str, Any]:
    return {"layer": layer, "role": role, "slices": f"weight[0:{total}]", "kept": kept, "total": total, "joins": joins}


def coupling() -> dict[str, Any]:
    """Two convolutions and a classifier; a name of a module may be any text."""
    middle, state = "<i>mid</i></script>", {"prunable": True, "reason": "", "notes": []}
    locked = {"prunable": False, "reason": "it reaches the network's output", "notes": []}
    first = [mark("stem.0", "writes", 18, 24), mark(middle, "reads", 18, 24)]
    second = [mark(middle, "writes", 8, 8, "add"), mark("head", "reads", 8, 8)]
    return {
        "layers": [{"name": name, "kind": "Conv2d"} for name in ("stem.0", "stem.1", middle, "head")],
        "groups": [
            {"name": "stem.0[0:8]", "size": 24, "kept": 18, **state, "marks": first},
            {"name": middle, "size": 8, "kept": 8, **state, "marks": second},
            {"name": "head", "size": 10, "kept": 10, **locked, "marks": [mark("head", "writes", 10, 10)]},
        ],
    }


def result(*targets: str) -> dict[str, Any]:
    return {
        "model": "my.module:<net>",
        "targets": list(targets or ("macs=0.5",)),
        "summary": "It went <well>.",
        "command": "fxprune-search --model 'my.module:<net>'",
        "load": "import fxprune",
        "rows": [asdict(row) for row in ROWS],
        "groups": [{"name": "stem.0[0:8]", "units": 24, "removed": 6, "uniform": 7}],
        "coupling": coupling(),
        "layers": [{"name": "stem.0", "macs": [4000, 2500], "params": [240, 180]}, {"name": "head", "macs": [80, 80], "params": [90, 90]}],
        "options": {"seed": 0, "reward": "<img src=x onerror=alert(1)>"},
    }
