"""docs/trained.md from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.trained.measuring import EVALUATIONS, JOINT, METHODS, SEARCH, SHARES, TABLE
from benchmarks.trained.network import Network
from benchmarks.trained.peers import PEERS

MARK = "<!-- What follows is written by hand. -->"
ENOUGH = 0.95  # of the dense network's score
Results = Mapping[str, Mapping[str, Any]]
HEAD = """# Trained networks from their wheels

Random weights prove that a rewrite is right; trained ones show what pruning is worth. Each network below comes with its weights inside a
package of the Python index. `python -m benchmarks.trained` takes it from the installed wheel, scores it, prunes it to 75 and to 50 % of its
multiply-accumulates, repairs it by least squares on some hundred unlabelled inputs, without training, and scores it again. Where a
column says *joint*, gradient steps follow: they move all weights at once towards the dense network's outputs on the same unlabelled inputs,
without labels ([`repair="joint"`](repair.md#all-layers-together)). Every one runs with the same options. Some of them showed faults of
fxprune, fixed since (crepe-tiny, easyocr, the ONNX networks):

```console
$ pip install fxprune[onnx] && pip install --no-deps -r benchmarks/requirements-trained.txt
$ python -m benchmarks.trained
```

The command goes on where it stopped; `--only NAME` runs single networks.

"""


def share(value: float) -> str:
    return f"{100 * value:.1f}"


def page(networks: Mapping[str, Network], results: Results, below: str) -> str:
    """The page of all networks that have results; ``below``: what stands under the mark."""
    shown = {name: results[name] for name in networks if "dense" in results.get(name, {}).get("cells", {})}
    parts = [HEAD, summary(shown), "\n\n", "## Scores\n\n", scores(networks, shown), "\n\n", "## What they are\n\n", about(networks, shown)]
    short = shortcomings(shown)
    if short:
        parts += ["\n\n## Where it falls short\n\n", short]
    return "".join([*parts, f"\n\n{MARK}\n\n", below or ""])


def score_of(cells: Mapping[str, Any], name: str) -> float | None:
    found = cells.get(name, {}).get("score")
    return None if found is None else float(found)


def kept(cells: Mapping[str, Any], name: str) -> float | None:
    """The share of the dense score that is left."""
    found, dense = score_of(cells, name), score_of(cells, "dense")
    return found / dense if found is not None and dense else None


def summary(shown: Results) -> str:
    cells = {name: one["cells"] for name, one in shown.items()}
    both = [name for name in cells if score_of(cells[name], JOINT) is not None and score_of(cells[name], TABLE) is not None]
    tabled = [name for name in cells if TABLE in cells[name]]
    text = "At half the MACs, by the error table and least squares alone, "
    text += f"{_good(cells, tabled, TABLE)} of {len(tabled)} networks keep 95 % of their score"
    if both:
        text += f"; with all weights moved together afterwards (*joint*), {_good(cells, both, JOINT)} of {len(both)}"
        text += "" if len(both) == len(tabled) else f" measured so far, of which least squares alone holds {_good(cells, both, TABLE)}"
    text += "."
    changes = {name: cells[name][JOINT]["score"] - cells[name][TABLE]["score"] for name in both}
    for what, said in (("higher", [n for n in both if changes[n] > 0]), ("lower", [n for n in both if changes[n] < 0])):
        if said:
            text += f" Joint scores {what} than least squares alone on {', '.join(f'{n} ({100 * changes[n]:+.1f})' for n in said)}."
    still = [name for name in both if not cells[name][JOINT].get("moved", True)]
    if still:
        text += f" On {', '.join(still)} inputs that were not fitted saw no gain by it, and the weights stayed as fitted."
    worse = [
        name
        for name in cells
        if any("sliced" in cell and cell["score"] < cell["sliced"] for cell in cells[name].values() if "score" in cell)
    ]
    worst = (
        f" Repair left {', '.join(worse)} with a lower score than slicing alone." if worse else " None was repaired to worse than sliced."
    )
    return text + worst


def _good(cells: Mapping[str, Any], names: Sequence[str], cell: str) -> int:
    """How many of the networks keep enough of their score."""
    return sum((kept(cells[name], cell) or 0) >= ENOUGH for name in names)


def cell_text(cells: Mapping[str, Any], name: str) -> str:
    found = cells.get(name)
    if found is None:
        return ""
    return share(found["score"]) if "score" in found else "fails"


def peer_text(cells: Mapping[str, Any], name: str) -> str:
    found = cells.get(name)
    if found is None:
        return ""
    return share(found["score"]) if "score" in found else "no"


def scores(networks: Mapping[str, Network], shown: Results) -> str:
    measured = [*(f"{method} {budget}" for budget in SHARES for method in METHODS), JOINT, SEARCH]
    columns = [f"{method} {100 * float(budget):.0f} %" for method, budget in map(str.split, measured)]
    lines = [
        "Scores in percent; empty cells were not run. *sliced*: half the MACs by the same allocation as *table 50 %*, before the repair; "
        "*joint*: that allocation again, repaired by least squares and then by gradient steps of all weights, without labels; "
        f"*search*: {EVALUATIONS} candidates, scored without labels by how far their outputs on half of the calibration inputs are from "
        "the dense network's; *time*: of *table 50 %* in ONNX Runtime on one thread, as a share of the dense network's. The other tools "
        'prune uniformly by L2 norms to half the MACs, BatchNorm estimated again; "no": they do not run on it, or do not reach half.',
        "",
        f"| network | dense | {' | '.join(columns)} | sliced | time | {' | '.join(PEERS)} |",
        "|---" + "|---:" * (len(columns) + len(PEERS) + 3) + "|",
    ]
    for name, one in shown.items():
        cells = one["cells"]
        after = cells.get(TABLE, {})
        row = [name, share(cells["dense"]["score"])]
        row += [cell_text(cells, column) for column in measured]
        row += [
            share(after["sliced"]) if "sliced" in after else "",
            f"{cells['time']['share']:.0%}" if "share" in cells.get("time", {}) else "-",
        ]
        row += [peer_text(cells, peer) for peer in PEERS]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def about(networks: Mapping[str, Network], shown: Results) -> str:
    lines = [
        "| network | kind | what it does | scored on | wheel | licence | parameters | MACs of the example |",
        "|" + "---|" * 6 + "---:|---:|",
    ]
    for name, one in shown.items():
        dense, network = one["cells"]["dense"], networks[name]
        size = [f"{dense['params'] / 1e6:.2f} M", f"{dense['macs'] / 1e6:.1f} M"]
        lines.append(f"| {' | '.join([name, network.kind, network.what, network.judged, one['wheel'], one['licence'], *size])} |")
    return "\n".join(lines)


def shortcomings(shown: Results) -> str:
    lines = []
    for name, one in shown.items():
        cells, reasons = one["cells"], []
        left, moved = kept(cells, TABLE), kept(cells, JOINT)
        if left is not None and min(left, left if moved is None else moved) < ENOUGH:
            text = "" if moved is None else f", {moved:.1%} by joint"
            reasons.append(f"keeps {left:.1%} of its score at half the MACs{text}")
        reasons += [f"{cell}: {found['error']}" for cell, found in cells.items() if "error" in found and cell not in PEERS]
        reasons += [f"{cell}: {found['short']}" for cell, found in cells.items() if "short" in found]
        dense = cells["dense"]
        if reasons and dense.get("locked", 0) > 0.2:
            reasons.append(f"{dense['locked']:.0%} of its channels are locked, most because {dense['why']}")
        if reasons:
            lines.append(f"- **{name}**: {'; '.join(reasons)}.")
    return "\n".join(lines)
