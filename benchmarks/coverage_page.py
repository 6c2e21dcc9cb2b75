"""Results to docs/coverage.md: the tables between the page's marks; the text around them is written by hand."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.packages.network import CHECKS, NOT_ASKED, OK

Rows = dict[tuple[str, str, str], dict[str, Any]]
TOOLS = ("fxprune", "torch-pruning", "torch-kirigami")
BEGIN, END = "<!-- made by benchmarks/coverage.py: begin -->", "<!-- end -->"
SOUND = ("exact", "exact where defined", "runs", "shapes only")
LITTLE = 0.4  # a network that loses a smaller share of its parameters says why
ORDER = ("exact", "exact where defined", "runs", "shapes only", "wrong", "fails", "no time", "died", "not run")
PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "torch-kirigami")


def write_page(path: Path, done: Rows) -> None:
    """Put the tables of ``done`` between the marks of the page, which is made where there is none."""
    made = f"{BEGIN}\n\n{_tables(done)}\n{END}"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Coverage\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{made}{tail}", encoding="utf-8")


def _tables(done: Rows) -> str:
    versions = ", ".join(f"{p} {found}" for p in PACKAGES if (found := _version(p)))
    sparsity = sorted({row["sparsity"] for row in done.values()})
    parts = [
        f"Made with {versions}, Python {platform.python_version()}, {platform.system()} on {platform.machine()} "
        f"({os.cpu_count()} cores, one thread used), at sparsity {', '.join(map(str, sparsity))}.",
        "## Totals\n\n" + _totals(done),
    ]
    for library in ("torchvision", "timm"):
        names = [name for tool, where, name in done if tool == "fxprune" and where == library]
        if names:
            parts.append(f"## {library}\n\n" + _table(done, library, names))
    if packages := [row for (_, library, _), row in done.items() if library == "packages"]:
        count = len({row["family"] for row in packages})
        parts.append(f"## {len(packages)} networks of {count} other packages\n\n{_passed(packages)}\n\n{_checks(packages)}")
    if any(tool == TOOLS[2] for tool, _, _ in done):
        lines = [
            _line(["network", "budget", "params", "MACs", "oracle", "s", "fxprune: params", "MACs", "oracle", "s"]),
            _line(["---"] * 10),
        ]
        for (tool, library, name), row in done.items():
            if tool == TOOLS[2]:
                lines.append(_line([name, row.get("settings", ""), *_result(row), *_result(done.get((TOOLS[0], library, name), {}))]))
        parts.append("## torch-kirigami\n\n" + "\n".join(lines))
    parts.append("## What stands in the way\n\n" + _shortfalls(done))
    return "\n\n".join(parts) + "\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _totals(done: Rows) -> str:
    kinds = [v for v in ORDER if any(row["verdict"] == v for row in done.values())]
    head = ["", "networks", *kinds, "params removed, median", "MACs removed, median"]
    lines = [_line(head), _line(["---"] * len(head))]
    for library in ("torchvision", "timm", "packages"):
        for tool in TOOLS:
            rows = [row for key, row in done.items() if key[:2] == (tool, library)]
            if rows:
                counts = [sum(row["verdict"] == k for row in rows) for k in kinds]
                medians = [_share(_median(row.get(c) for row in rows)) for c in ("params", "macs")]
                lines.append(_line([f"{library}, {tool}", len(rows), *counts, *medians]))
    both = [key[1:] for key in done if key[0] == TOOLS[0] and all("seconds" in done.get((tool, key[1], key[2]), {}) for tool in TOOLS[:2])]
    if both:
        took = {tool: _seconds(_median(done[tool, where, name]["seconds"] for where, name in both)) for tool in TOOLS[:2]}
        lines.append(f"\nOf the {len(both)} networks for which both were timed, the median took fxprune {took[TOOLS[0]]} s and ")
        lines[-1] += f"Torch-Pruning {took[TOOLS[1]]} s."
    moved = [row["moved"] for row in done.values() if row["verdict"] in SOUND and "moved" in row]
    many = sum(m > 1e-3 for m in moved)
    older = " (rows read back from an older page aside)" if any(row.get("page") for row in done.values()) else ""
    seen = f"In {many} of the {len(moved)} comparisons that passed{older}, zeroing moves the output by more than ten times the oracle's "
    seen += "tolerance."
    return "\n".join(lines) + (f"\n\n{seen}" if moved else "")


def _table(done: Rows, library: str, names: Iterable[str]) -> str:
    head = ["network", "input", "traced", "groups", "locked", "params", "MACs", "oracle", "s"]
    head += ["Torch-Pruning: params", "MACs", "oracle", "s"]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in names:
        ours, theirs = done["fxprune", library, name], done.get(("torch-pruning", library, name), {})
        label = f"{ours['family']}: {name}" if library == "timm" else name
        cells = [label, ours.get("input", "").replace("x", " × "), _traced(ours), ours.get("prunable", ""), ours.get("locked", "")]
        lines.append(_line([*cells, *_result(ours), *_result(theirs)]))
    return "\n".join(lines)


def _passes(row: dict[str, Any]) -> bool:
    """Whether every check that the original passes is passed."""
    return row["verdict"] in SOUND and all(row.get(check) in (OK, NOT_ASKED) for check in CHECKS)


def _passed(rows: list[dict[str, Any]]) -> str:
    good = sum(map(_passes, rows))
    wrong = sum(row["verdict"] in ("wrong", "fails", "no time", "died") for row in rows)
    little = [row for row in rows if row.get("params", 1.0) < LITTLE]
    said = sum(bool(row.get("advised")) for row in little)
    text = f"{good} of {len(rows)} pass every check that the original itself passes; {wrong} are wrong, fail or end without a result. "
    return text + f"{len(little)} lose less than {LITTLE:.0%} of their parameters; for {said} of these `explain` says what to do about it."


def _checks(rows: list[dict[str, Any]]) -> str:
    head = ["package", "network", "traced", "groups", "locked", "params", "MACs", "oracle", "other batch", "other size"]
    head += ["backward", "save and load", "original intact", "s"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        params, macs, word, seconds = _result(row)
        checks = ["" if check not in row else {OK: "yes", NOT_ASKED: "–"}.get(row[check], "**no**") for check in CHECKS]
        cells = [row["family"], row["name"], _traced(row), row.get("prunable", ""), row.get("locked", ""), params, macs, word]
        lines.append(_line([*cells, *checks, seconds]))
    return "\n".join(lines)


def _result(row: dict[str, Any]) -> list[str]:
    verdict = row.get("verdict", "")
    word = f"**{verdict}**" if verdict and verdict not in (*SOUND, "not run") else verdict
    if verdict == "exact where defined":
        word += f" ({row['compared']})"
    if verdict == "wrong":
        word += f" ({row['error']:.0e})"
    return [_share(row.get("params")), _share(row.get("macs")), word, _seconds(row.get("seconds"))]


def _traced(row: dict[str, Any]) -> str:
    if row.get("traced") == "parts":
        return "parts: " + ", ".join(f"`{p}`" for p in row["parts"])
    inside = f", `{'`, `'.join(row['opaque'])}` kept" if row.get("opaque") else ""
    return f"{row.get('traced', '')}{inside}"


def _shortfalls(done: Rows) -> str:
    lines = []
    for (tool, _, name), row in sorted(done.items()):
        if row["verdict"] not in (*SOUND, "not run"):
            lines.append(f"- {tool}, {name}: {row['verdict']}: {_plain(row.get('why', ''))}")
    for (tool, _, name), row in sorted(done.items()):
        for check in CHECKS:
            if row.get(check, OK) not in (OK, NOT_ASKED):
                lines.append(f"- {tool}, {name}, {check}: {_plain(row[check])}")
    for (tool, _, name), row in sorted(done.items()):
        if tool == "fxprune" and row.get("params", 1.0) < LITTLE:
            why = "; ".join(f"{_plain(reason)} ({share:.0%})" for reason, share in row.get("in_the_way", ())[:3])
            advice = "".join(f". To do: {_plain(one)}" for one in row.get("advised", ())[:1])
            text = (
                f"- fxprune, {name}: {row['params']:.0%} of its parameters go. Locked, and the share of the parameters met: {why}{advice}"
            )
            lines.append(text)
    return "\n".join(lines) or "Nothing."


def _plain(text: str) -> str:
    """A message without the folders of the machine it was made on."""
    words = [w.rpartition("site-packages/")[2] if "site-packages/" in w else w for w in text.replace("(/", "( /").split(" ")]
    return " ".join(words).replace("( ", "(").replace("|", "\\|").replace("<", "&lt;")


def _median(values: Iterable[Any]) -> float | None:
    found = sorted(v for v in values if v is not None)
    return found[len(found) // 2] if found else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
