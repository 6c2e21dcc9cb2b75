"""The files of a finished run: what is written, how it is read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.api import record as recorded
from fxprune.atomic import remove, replace_text
from fxprune.attached import record_of
from fxprune.cli.options import Options
from fxprune.driver import SearchOutcome
from fxprune.errors import SearchError
from fxprune.files.slim_file import save
from fxprune.records import PruningRecord
from fxprune.report.formatting import Row, duration_text
from fxprune.report.lane_layout import coupling_data
from fxprune.report.search_page import search_page
from fxprune.searching.candidates import Candidates
from fxprune.searching.recovery import write_weights
from fxprune.searching.result import SearchResult
from fxprune.training.checkpoints import NAME as TRAINING

RESULT, SESSION = "result.json", "session.json"


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. ``unmet``: why the target was not met, or empty; the files then hold the nearest result.
    ``exports``: what became of every format asked for: its file, and its difference from eager PyTorch or the error."""

    rows: tuple[Row, ...]
    unmet: str
    load: str
    summary: str
    exports: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> RunSummary:
        """From what ``result.json`` holds."""
        rows = tuple(Row(**row) for row in result["rows"])
        return cls(rows, result["unmet"], result["load"], result["summary"], tuple(result["exports"]))


def begin(out: Path, described: Mapping[str, Any]) -> None:
    """Make a run's folder, emptied of an earlier run's checkpoint, and write down what is to be done, ``described``, before it is done."""
    folder = out / "checkpoint"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The configuration goes first and comes back last: without it a folder is no run, rather than a mixture of two.
        cut = [*folder.glob("repaired-*.json"), *folder.glob("*.safetensors")]
        cut += [*folder.glob("*.part"), *folder.glob("search/*"), *folder.glob(f"*/{TRAINING}*")]
        cut += (out / "tensorboard").glob("events.out.tfevents*")
        for path in [folder / SESSION, folder / RESULT, *cut]:
            remove(path)
    except OSError as error:
        raise SearchError(f"cannot write to --out {out}: {error.strerror}; choose a folder that can be written") from error
    replace_text(folder / SESSION, json.dumps(described, indent=2) + "\n")


def finished(folder: Path) -> RunSummary | None:
    """The end of the run whose checkpoint folder this is, if it came to one."""
    path = folder / RESULT
    return RunSummary.of(read_json(path, f"{folder.parent} cannot be resumed")) if path.exists() else None


def write(
    options: Options,
    command: str,
    outcome: SearchOutcome,
    candidates: Candidates,
    found: Mapping[str, SearchResult],
    rows: Sequence[Row],
    unmet: str,
    classes: int,
    exports: Sequence[dict[str, Any]],
) -> RunSummary:
    """Write the policy and the network of every point, the history, the page, and last of all the result; each whole or not at all."""
    out = Path(options.out)
    for stem, one in found.items():
        one.policy.save(out / f"{stem.replace('slim', 'policy', 1)}.json")
        save(one.model, out / f"{stem}.safetensors")
    record = recorded(found["slim"].model)
    coupling = coupling_data(candidates.graph, record.removed_units)
    result: dict[str, Any] = {
        "model": options.model,
        "targets": list(options.search.described()["targets"]),
        "unmet": unmet,
        "command": command,
        "load": _snippet(options, classes),
        "summary": _summary(rows, outcome, unmet, found["slim"].policy.meta.get("allocation")),
        "rows": [asdict(row) for row in rows],
        "exports": list(exports),
        "groups": _groups(found["slim"], candidates),
        "coupling": coupling,
        "layers": _layers(record, [one["name"] for one in coupling["layers"]]),
        "options": {**{name: value for name, value in options.state().items() if name != "search"}, **options.search.described()},
    }
    replace_text(out / "history.jsonl", "".join(json.dumps(record) + "\n" for record in outcome.history))
    result = json.loads(json.dumps(result))  # as a later reader has it, for whom a tuple is a list
    replace_text(out / "report.html", search_page(result, outcome.history))
    replace_text(out / "checkpoint" / RESULT, json.dumps(result, indent=2) + "\n")
    return RunSummary.of(result)


def report(out: str) -> Path:
    """Write the page of a finished run again; returns its path."""
    folder, otherwise = Path(out), f"{out} holds no finished run"
    result = read_json(folder / "checkpoint" / RESULT, otherwise)
    history = [json.loads(line) for line in read_text(folder / "history.jsonl", otherwise).splitlines()]
    replace_text(folder / "report.html", search_page(result, history))
    return folder / "report.html"


def size_on_disk(model: nn.Module, folder: Path) -> int:
    """Bytes of the network's file."""
    path = folder / "size.safetensors"
    if record_of(model) is not None:
        save(model, path)
    else:
        write_weights(model, path)
    size = path.stat().st_size
    path.unlink()
    return size


def read_text(path: Path, otherwise: str) -> str:
    """A file's text. Raises ``SearchError`` that begins with ``otherwise``."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SearchError(f"{otherwise}: cannot read {path} ({error})") from error


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ``SearchError`` that begins with ``otherwise``."""
    try:
        found = json.loads(read_text(path, otherwise))
    except ValueError as error:
        raise SearchError(f"{otherwise}: {path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise SearchError(f"{otherwise}: {path} holds no JSON object")
    return found


def _groups(found: SearchResult, candidates: Candidates) -> list[dict[str, Any]]:
    uniform = found.outcome.baselines["uniform"].removed.tolist()
    return [
        {"name": group.name, "units": group.size, "removed": round(found.policy.sparsity[group.name] * group.size), "uniform": even}
        for group, even in zip(candidates.groups, uniform, strict=True)
    ]


def _layers(record: PruningRecord, order: Sequence[str]) -> list[dict[str, Any]]:
    """MACs and parameters of every layer, before and after; those of the coupling graph in its ``order``, then the others."""
    before, after = record.before.per_layer, record.after.per_layer
    names = [*(name for name in order if name in before), *(name for name in before if name not in set(order))]
    nothing = {"macs": 0, "params": 0}
    return [{"name": name, **{key: [before[name][key], after.get(name, nothing)[key]] for key in nothing}} for name in names]


def _snippet(options: Options, classes: int) -> str:
    path = Path(options.out) / "slim.safetensors"
    return (
        "import fxprune\nfrom fxprune.models.loading import load_model\n\n"
        f'slim = fxprune.load("{path}", load_model("{options.model}", num_classes={classes}))'
    )


def _summary(rows: Sequence[Row], outcome: SearchOutcome, unmet: str, instead: str | None) -> str:
    first, last = rows[0], rows[-1]
    said = (
        f"Test accuracy {100 * last.accuracy:.2f} % after {100 * first.accuracy:.2f} %, with {100 * last.macs / first.macs:.1f} % of the "
        f"MACs and {100 * last.params / first.params:.1f} % of the parameters; {outcome.evaluations} networks were scored."
    )
    if instead is not None:
        kept = "the uniform allocation" if instead == "uniform" else "the allocation halfway between it and the uniform one"
        said += f" After training, what the search found was not the best on held-out images; kept is {kept}."
    recoveries = [step["recover_seconds"] for step in outcome.history if "recover_seconds" in step]
    if recoveries:
        said += f" {len(recoveries)} recoveries between steps took {duration_text(sum(recoveries))}."
    last_word = unmet or outcome.note
    return f"{said} {last_word[:1].upper()}{last_word[1:]}." if last_word else said
