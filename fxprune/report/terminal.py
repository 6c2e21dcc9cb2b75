"""Data to rich renderables: the coupling tree, the table of a search's result, the lines of its progress. Pure: nothing is printed here."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from fxprune.errors import few
from fxprune.report.formatting import Row, accuracy_text, bytes_text, count_text, duration_text, latency_text
from fxprune.report.layers import Graph, Group, Line, layer_lines

if TYPE_CHECKING:
    from fxprune.driver import Progress as SearchProgress
    from fxprune.training.config import Progress as TrainingProgress

LAYERS_SHOWN = 24  # layers listed under one group; DenseNet's have hundreds
NAME_WIDTH = 40  # columns for a layer's name, so that a tree fits into 100
KIND_WIDTH = 11  # columns for its type


def coupling_tree(
    graph: Graph,
    *,
    removed: Mapping[str, Any] | None = None,
    lost: Mapping[str, Any] | None = None,
    title: str = "coupling graph",
) -> Tree:
    """The groups of a coupling graph as a tree: their layers, kept and total channels, and what couples them; locked groups by reason.

    ``removed``: group name -> numbers of the units that are to go, as the record of its slim module says; without it everything is kept.
    ``lost``: the same of the pruning that made a graph's slim module, whose units are not among the graph's any more.
    """
    removed, lost = removed or {}, lost or {}
    prunable = [group for group in graph.groups if group.prunable]
    locked = [group for group in graph.groups if not group.prunable]
    units = sum(group.size for group in prunable)
    root = Tree(
        Text.assemble(
            (title, "bold"), f": {_count(len(prunable), 'group')} prunable with {units:,} units, {_count(len(locked), 'group')} locked"
        ),
        guide_style="dim",
    )
    for group in prunable:
        gone = {int(unit) for unit in removed.get(group.name, ())}
        head = Text.assemble((group.name, "bold cyan"), f"  {group.size - len(gone)}/{group.size} units")
        if group.name in lost:
            head.append(f", {len(lost[group.name])} removed", "green")
        branch = root.add(head)
        lines = layer_lines(group, graph.graph, gone)
        width = min(NAME_WIDTH, max((len(line.layer) for line in lines), default=0))
        for line in lines[:LAYERS_SHOWN]:
            branch.add(_layer_text(line, width))
        if len(lines) > LAYERS_SHOWN:
            kinds = Counter(line.kind or "tensor" for line in lines[LAYERS_SHOWN:])
            rest = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
            branch.add(Text(f"and {len(lines) - LAYERS_SHOWN} more: {rest}", style="dim"))
        for note in group.notes:
            branch.add(Text(f"note: {note}", style="yellow"))
    if locked:
        _add_locked(root, locked)
    return root


def _add_locked(root: Tree, locked: Sequence[Group]) -> None:
    by_reason: dict[str, list[Group]] = {}
    for group in locked:
        by_reason.setdefault(group.reason, []).append(group)
    branch = root.add(Text(f"locked: {_count(len(locked), 'group')}", style="bold red"))
    for reason, groups in by_reason.items():
        branch.add(Text.assemble((reason, "red"), ": ", few([f"{group.name} ({group.size})" for group in groups], LAYERS_SHOWN)))


def _layer_text(line: Line, width: int) -> Text:
    name = line.layer if len(line.layer) <= width else f"{line.layer[: width // 2 - 1]}…{line.layer[len(line.layer) - width // 2 :]}"
    style = "" if line.kept == line.total else "green"
    kept = f"{line.kept}/{line.total}".rjust(9)
    text = Text.assemble(name.ljust(width), "  ", (kept, style), f"  {line.kind.ljust(KIND_WIDTH)} ", (line.slices, "dim"))
    return text.append(f"  joined by {line.joins}" if line.joins else "", "magenta")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def result_table(rows: Sequence[Row], title: str = "") -> Table:
    """Networks side by side, one a column, the first of them the original; shares of it in brackets."""
    table = Table(title=escape(title) or None, title_justify="left", title_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(escape(row.name), justify="right")
    first = rows[0]
    # Three networks fit into 80 columns with figure and share on one line; of more, the shares go below.
    apart = " " if len(rows) <= 3 else "\n"
    table.add_row("test accuracy", *(accuracy_text(row.accuracy, row, first, apart) for row in rows))
    if any(row.untrained is not None for row in rows):
        table.add_row("before training", *(accuracy_text(row.untrained, row, first, apart) for row in rows))
    lines: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("MACs", "macs", count_text),
        ("parameters", "params", count_text),
        ("latency", "latency", latency_text),
        ("size on disk", "bytes", bytes_text),
    )
    for label, figure, as_text in lines:
        whole = getattr(first, figure)
        values = [getattr(row, figure) for row in rows]
        table.add_row(label, *(as_text(v) + _share(v, whole, i == 0, apart) for i, v in enumerate(values)))
    return table


def _share(value: float, whole: float, is_whole: bool, apart: str) -> str:
    return "" if is_whole or not whole else f"{apart}({100 * value / whole:.1f} %)"


def search_line(progress: SearchProgress) -> Text:
    """A search's progress in one line: its step, candidates, rewards, the share of the target reached, the time left."""
    best = "" if progress.best is None else f"  best {progress.best:.4f}"
    step = ""
    if progress.steps > 1:
        way = f" ({100 * progress.share:.0f} % of the way)" if progress.share < 0.995 else ""
        step = f"  step {min(progress.step + 1, progress.steps)}/{progress.steps}{way}"
    left = "" if progress.left is None else f"  left {duration_text(progress.left)}"
    return _bar(progress.done).append(f"  {progress.evaluations} scored{step}  reward {progress.reward:.4f}{best}{left}")


def show(renderable: Any) -> None:
    """Print to the terminal."""
    Console().print(renderable)


def text_of(renderable: Any) -> str:
    """What a terminal of 120 columns would show, without colours."""
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def training_line(progress: TrainingProgress) -> Text:
    """A training's progress in one line: a bar, its epoch, loss, accuracy and the time left."""
    share = ((progress.epoch - 1) * progress.steps + progress.step) / max(1, progress.epochs * progress.steps)
    accuracy = "" if progress.accuracy is None else f"accuracy {100 * progress.accuracy:.1f} %  "
    return _bar(share).append(
        f"  epoch {progress.epoch}/{progress.epochs}  loss {progress.loss:.4f}  {accuracy}left {duration_text(progress.seconds_left)}"
    )


def _bar(share: float, width: int = 16) -> Text:
    full = round(width * min(1.0, max(0.0, share)))
    return Text.assemble(("━" * full, "cyan"), ("─" * (width - full), "dim"))
