"""The command line and the configuration file of ``fxprune-search``: what they may say, turned into ``Options``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from fxprune import __version__
from fxprune.cli.options import Options
from fxprune.driver import STRATEGIES, SearchConfig
from fxprune.driver.config import PRESETS, RUNTIMES
from fxprune.driver.rewards import REWARDS
from fxprune.errors import SearchError
from fxprune.exporting.formats import FORMATS
from fxprune.importance.registry import CRITERIA
from fxprune.imports import needed
from fxprune.repair.registry import REPAIRS

HELP = {
    "model": "torchvision:NAME, timm:NAME or package.module:factory; default: a small network for digits",
    "weights": "a .safetensors or .pt file with the network's state_dict",
    "data": "digits, warped-digits, imagefolder:DIR, parquet:DIR, torchvision:NAME:DIR or package.module:factory",
    "mean": "of the channels of images in [0, 1], for example 0.485,0.456,0.406; default: what is usual for the data",
    "std": "standard deviation of the channels, likewise",
    "image_size": "pixels a side",
    "train_epochs": "epochs of ordinary training before the search; default: enough for digits, else none",
    "distill_epochs": "epochs of distillation after the search; default: 20 for digits, else 2",
    "distill_lr": "highest learning rate of the distillation",
    "baseline": "distil the uniform allocation and the one halfway to it too, test the former, and keep the best",
    "score_images": "held-out training images that a candidate is scored on",
    "rough_images": "of these, how many judge all but the finalists, where --finalists says how many",
    "calibration": "data: training images; none: inputs made from what BatchNorm layers remember, for importance and repair",
    "calibration_images": "training images for importance and for the repair of candidates",
    "repair_images": "training images for the repair of the result",
    "augment": "score and repair on images moved and mirrored as in training; default: unless this run trains the network itself",
    "out": "folder for the results",
    "export": f"formats to write the result in too, with commas: {', '.join(FORMATS)}, or module:NAME of a fxprune.Format",
    "tensorboard": "write the figures of each round to OUT/tensorboard too",
    "targets": "macs|params|latency|memory=SHARE that is left, or sparsity=SHARE that goes; repeat it for several at once, "
    "commas for a Pareto run; latency may be a time too: latency=12ms",
    "runtime": f"where latency is measured: {', '.join(RUNTIMES)}",
    "threads": "of the runtime that latency is measured in, on a CPU",
    "latency_batch": "samples per call whose latency is measured; default: 32",
    "costs": "a cost of your own as target: NAME=module:function of the network; repeat it for several",
    "most": "the largest share of its units that any group loses, or NAME=SHARE,... for groups, modules and globs",
    "loss": "module:function of output and batch, for importances that need gradients; default: cross-entropy",
    "strategy": f"{', '.join(STRATEGIES)}, optuna:SAMPLER or module:Class",
    "reward": f"{', '.join(REWARDS)} or module:function",
    "importance": f"auto, {', '.join(CRITERIA)}, or module:NAME of a fxprune.Criterion or a function",
    "repair": f"what repairs a candidate before it is scored, and the result: {', '.join(REPAIRS)}, or module:function",
    "recover": "none, or norms: between repair and distillation train normalisation scales and shifts and biases alone",
    "recover_epochs": "epochs of that",
    "jobs": "worker processes",
    "executor": "local or ray",
    "evaluations": "candidates scored at most, or none",
    "steps": "prune steps, or none for what step-ratio gives",
    "blocks": "whole residual branches may be left out, beside units",
    "experts": "whole experts of a mixture may go, beside widths",
    "round_to": "channels kept are rounded up to a multiple of this; default: 1, or 8 where convolutions are wide or latency is the target",
    "norms": "plain, or exact: layer, RMS and group norms keep the divisor of the original",
    "ignore": "names or globs of modules whose output channels stay, with commas",
}
COMMON = (
    *("targets", "strategy", "reward", "repair", "importance", "steps", "samples", "seed", "most"),
    *("device", "jobs", "executor", "round_to", "blocks", "runtime", "threads", "latency_batch"),
)
RESUMABLE = frozenset({"jobs", "executor", "device"})
_REPEATED = {"targets": "METRIC=SHARE", "costs": "NAME=MODULE:FUNCTION"}  # given once for each, by a name in the singular
_OWN = {one.name: str(one.type) for one in fields(Options) if one.name not in ("search", "preset")}
_SEARCH = {one.name: str(one.type) for one in fields(SearchConfig)}


@dataclass(frozen=True)
class Request:
    """What a command line asks for: a new run (``options``), or only to ``explain`` its network; one to ``resume`` with ``changes``; a
    page to ``report``; or the ``completion`` script of a shell."""

    options: Options | None = None
    explain: bool = False
    resume: str | None = None
    report: str | None = None
    completion: str | None = None
    changes: Mapping[str, Any] | None = None


def read(arguments: Sequence[str]) -> Request:
    """Read a command line. Raises ``SearchError`` in one line for whatever is wrong with it."""
    given = list(arguments)
    if given[:1] == ["report"]:  # the same in one word
        given[:1] = ["--report"]
    values = vars(_parser().parse_args(given))
    report, resume, file, explain = (values.pop(name, None) for name in ("report", "resume", "config", "explain"))
    if "print_completion" in values:
        return Request(completion=_completion(values["print_completion"]))
    if report is not None:
        if values or resume or file or explain:
            raise SearchError("--report stands alone: fxprune-search --report DIR")
        return Request(report=report)
    if resume is not None:
        others = sorted(set(values) - RESUMABLE)
        if others or file or explain:
            first = others[0].replace("_", "-") if others else "config" if file else "explain"
            raise SearchError(f"--{first} cannot be changed by --resume, which goes on with the options of the run; start a new one")
        return Request(resume=resume, changes=values)
    return Request(options=_options({**(_from_file(Path(file)) if file else {}), **values}), explain=bool(explain))


def _completion(shell: str) -> str:
    """A shell's script that completes the options. Raises ``DependencyError`` without shtab, which writes it."""
    shtab = needed("shtab", "--print-completion", "completion")
    return str(shtab.complete(_parser(), shell=shell))


def _options(values: dict[str, Any]) -> Options:
    preset = values.pop("preset", "default")
    if preset not in PRESETS:
        raise SearchError(f"unknown preset {preset!r}; use one of {', '.join(PRESETS)}")
    search = {name: value for name, value in values.items() if name in _SEARCH}
    own = {name: value for name, value in values.items() if name in _OWN}
    if preset == "paper":
        own.setdefault("distill_lr", 1e-3)  # Wang 2024: SGD at 1e-3; the rest of its recovery is DistillConfig's default
        own.setdefault("calibration_images", 100)
        own.setdefault("augment", False)
    return Options(preset=preset, search=SearchConfig.preset(preset, **search), **own)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SearchError(f"{message}; fxprune-search --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fxprune-search",
        description="Find how much to remove from which layer of a network, remove it, distil what is left, and save it. "
        "Without arguments it shows all of that on a small network for digits.",
        epilog="fxprune-search report DIR writes the report page of a finished run again.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fxprune {__version__}")
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="options from a file, by the names listed here; the command line has precedence"
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    parser.add_argument("--report", metavar="DIR", help="write the report page of the run in this folder again")
    parser.add_argument(
        "--explain", action="store_true", help="say what of the network can be pruned, and what is locked and why; search nothing"
    )
    parser.add_argument("--print-completion", choices=["bash", "zsh", "tcsh"], help="print a script that completes options in this shell")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: a small CNN in minutes; paper: RL-Pruner's own settings")
    network = parser.add_argument_group("network and data")
    for name, kind in _OWN.items():
        _add(network, name, kind)
    search = parser.add_argument_group("search")
    knobs = parser.add_argument_group("every knob of the search (fxprune/driver/config.py says more)")
    for name, kind in _SEARCH.items():
        _add(search if name in COMMON else knobs, name, kind)
    return parser


def _add(group: Any, name: str, kind: str) -> None:
    flag = f"--{name.removesuffix('s')}" if name in _REPEATED else f"--{name.replace('_', '-')}"
    text = HELP.get(name)
    if kind.removesuffix(" | None") == "bool":
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif name in _REPEATED:
        group.add_argument(flag, dest=name, action="append", metavar=_REPEATED[name], help=text)
    else:
        group.add_argument(flag, dest=name, type=_reader(kind), metavar=_metavar(kind), help=text)


def _metavar(kind: str) -> str:
    for start, name in (("tuple[float", "N,N,..."), ("tuple", "NAME,..."), ("int", "N"), ("float", "X")):
        if kind.startswith(start):
            return name
    return "TEXT"


def _reader(kind: str) -> Callable[[str], Any]:
    """What turns an option's text into a value of the type that its field is annotated with."""
    bare = kind.removesuffix(" | None")
    single: Callable[[str], Any] = {"int": int, "float": float}.get(bare, str)
    if bare.startswith("tuple"):
        each: Callable[[str], Any] = float if "float" in bare else str

        def single(text: str) -> Any:
            return tuple(each(part.strip()) for part in text.split(","))

    def read_one(text: str) -> Any:
        return None if bare != kind and text.lower() == "none" else single(text)

    read_one.__name__ = {"int": "whole number", "float": "number"}.get(
        bare, "list of numbers" if "float" in bare else "text"
    )  # for argparse
    return read_one


def _from_file(path: Path) -> dict[str, Any]:
    """The options in a YAML file. Raises ``SearchError`` that names the file and the entry."""
    yaml = needed("yaml", "--config", "search")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SearchError(f"cannot read --config {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise SearchError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SearchError(f"--config {path} must hold a mapping of options, for example 'target: macs=0.5'")
    values = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        name = f"{name}s" if f"{name}s" in _REPEATED else name
        kind = "str" if name == "preset" else {**_OWN, **_SEARCH}.get(name)
        if kind is None:
            raise SearchError(f"--config {path}: unknown option {key!r}; fxprune-search --help lists the options")
        values[name] = _from_yaml(value, name, kind, f"--config {path}: {key}")
    return values


def _from_yaml(value: Any, name: str, kind: str, where: str) -> Any:
    if name == "most" and isinstance(value, dict):
        return value
    if name in _REPEATED:
        return [str(item) for item in value] if isinstance(value, list) else value if isinstance(value, dict) else str(value)
    truth = kind.removesuffix(" | None") == "bool"
    if truth and value is None and kind != "bool":
        return None
    if truth or isinstance(value, bool):
        if not truth or not isinstance(value, bool):
            raise SearchError(f"{where} is {value!r}; {'true or false is' if truth else 'a value is'} expected")
        return value
    if isinstance(value, dict) or (value is None and not kind.endswith("None")):
        raise SearchError(f"{where} is {value!r}; a value is expected")
    text = ",".join(str(item) for item in value) if isinstance(value, list) else "none" if value is None else str(value)
    reader = _reader(kind)
    try:
        return reader(text)
    except ValueError as error:
        raise SearchError(f"{where} is {value!r}; a {reader.__name__} is expected") from error
