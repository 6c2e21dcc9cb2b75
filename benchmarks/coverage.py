"""Every float model of torchvision, one of each of timm's model modules and networks of other packages, pruned by half: is it right?

    python -m benchmarks.coverage                                  # fxprune and Torch-Pruning on everything: an hour or two
    python -m benchmarks.coverage 'resnet*' swin_transformer       # some names, or timm modules
    python -m benchmarks.coverage --tools fxprune --again fail     # again what failed, or came out wrong
    python -m benchmarks.coverage --library packages               # the third table: half an hour
    python -m benchmarks.coverage --render                         # only the page, from the results

Each network runs in a process of its own under a memory and a time cap. A result is appended to a JSON-lines file as soon as it is there,
and what stands there is not run again, so the command may be stopped at any moment. The file is kept in the repository, what the page shows
of each row and no more; rows marked ``page`` were read back from an older page, so their shares are rounded. ``pip install '.[bench]'``
brings what it needs, and ``pip install --no-deps -r benchmarks/requirements-coverage.txt`` the packages of the third table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import resource
import signal
import sys
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.coverage_page import LITTLE, TOOLS, write_page
from benchmarks.networks import Case, cases
from benchmarks.packages import networks
from benchmarks.packages.checks import package_row
from benchmarks.packages.network import CHECKS, Network

RESULTS = Path(__file__).parent / "results" / "coverage.jsonl"
SHOWN = frozenset(
    {"tool", "library", "name", "family", "sparsity", "page", "input", "traced", "parts", "opaque", "prunable", "locked", "settings"}
    | {"verdict", "why", "params", "macs", "seconds", "spent", "compared", "error", "moved", "advised", *CHECKS}
)
PATIENCE = 6  # seconds by the clock for each of a process's own
LIBRARIES = ("torchvision", "timm", "packages")
# What takes seconds to import, by package: imported once, in the process that the others are forked from.
SLOW = {
    "transformers": ("transformers",),
    "monai": ("monai.networks.nets",),
    "diffusers": ("diffusers.models",),
    "ultralytics": ("ultralytics.nn.tasks",),
    "segmentation-models-pytorch": ("segmentation_models_pytorch",),
    "effdet": ("effdet",),
    "speechbrain": ("speechbrain",),
    "vit-pytorch": ("vit_pytorch",),
    "spandrel": ("spandrel",),
    "open-clip-torch": ("open_clip",),
    "kornia": ("kornia",),
    "pytorchcv": ("pytorchcv.model_provider",),
    "torch-geometric": ("torch_geometric.nn",),
    "x-transformers": ("x_transformers",),
}
BAD = ("fails", "wrong", "no time", "died")


def work(channel: Any, seconds: float, memory: float, tool: str, library: str, name: str, sparsity: float, *settings: Any) -> None:
    """Run one tool on one network and send the row; what the tool raises is its result."""
    import torch

    from benchmarks.tools import fxprune_row
    from benchmarks.torch_kirigami_tool import torch_kirigami_row
    from benchmarks.torch_pruning_tool import torch_pruning_row

    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds),) * 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        if library == "packages":
            row = package_row(next(n for n in networks() if n.name == name), sparsity)
        else:
            case = next(cases((name,), (library,)))
            if tool == "fxprune":
                row = fxprune_row(case, sparsity)
            elif tool == "torch-kirigami":
                row = torch_kirigami_row(case, sparsity)
            else:
                row = torch_pruning_row(case, sparsity, *settings)
    except Exception as error:  # noqa: BLE001 - whatever a tool or a pruned network raises is what the table reports
        first = (str(error).strip().splitlines() or [""])[0]
        row = {"verdict": "fails", "why": f"{type(error).__name__}: {first}"[:400], "trace": traceback.format_exc()[-3000:]}
    row["spent"] = time.process_time()
    row["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    channel.send(row)


def run(context: Any, seconds: float, *job: Any) -> dict[str, Any]:
    """The row that ``work`` sends from a process of its own. The cap is on its own seconds, so that a busy machine is no verdict."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(send, seconds, *job))
    process.start()
    send.close()
    row: dict[str, Any] = {"verdict": "no time", "why": f"more than {seconds:g} s"}
    try:
        if receive.poll(PATIENCE * seconds + 30):
            row = receive.recv()
    except EOFError:
        process.join()
        if process.exitcode not in (-signal.SIGXCPU, -signal.SIGKILL):
            row = {"verdict": "died", "why": f"the process ended without an answer, exit code {process.exitcode}"}
    process.kill()
    process.join()
    return row


def read(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The last result of every (tool, library, name)."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {(row["tool"], row["library"], row["name"]): row for row in rows}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a row. What one tool tells the other is left out: it is found again where it is needed."""
    found = {key: value for key, value in row.items() if key in SHOWN}
    if row["tool"] == "fxprune" and row.get("params", 1.0) < LITTLE:
        found["in_the_way"] = row.get("in_the_way", ())[:3]
    return found


def installed(package: str) -> bool:
    """Whether a package of the third table is there; one that is not is left out with a line."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        print(f"{package} is not installed and left out: pip install --no-deps -r benchmarks/requirements-coverage.txt", file=sys.stderr)
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="names or globs of models, or of timm's modules; all without one")
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="only this one")
    parser.add_argument("--tools", default=",".join(TOOLS[:2]), help=f"which of {', '.join(TOOLS)} (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of every prunable group (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=None, help="at most this many networks")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds for one network and tool (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space for one process (default: %(default)s)")
    parser.add_argument("--again", choices=("all", "fail"), help="run again what the results hold already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON-lines file (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"), help="the page (default: %(default)s)")
    parser.add_argument("--render", action="store_true", help="only write the page from the results")
    given = parser.parse_args(argv)
    tools = [t for t in given.tools.split(",") if t]
    if unknown := sorted(set(tools) - set(TOOLS)):
        parser.error(f"--tools names {', '.join(unknown)}; choose from {', '.join(TOOLS)}")
    libraries, names = tuple(given.library or LIBRARIES), tuple(given.names)
    chosen: list[Case | Network] = [*cases(names, libraries), *(networks(names) if "packages" in libraries else ())]
    chosen = chosen[: given.limit]
    if not chosen:
        parser.error(f"no network fits {', '.join(given.names)}")
    done = read(given.results)
    if not given.render:
        for peer in TOOLS[1:]:
            if peer in tools and importlib.util.find_spec(peer.replace("-", "_")) is None:
                print(f"{peer} is not installed and left out: pip install 'fxprune[bench]'", file=sys.stderr)
                tools.remove(peer)
        context = multiprocessing.get_context("forkserver")
        wanted = {name for case in chosen for name in (SLOW.get(case.family, ()) if case.library == "packages" else (case.library,))}
        wanted |= {tool.replace("-", "_") for tool in tools}
        context.set_forkserver_preload(["torch", *sorted(wanted), "benchmarks.networks", "benchmarks.packages.checks"])
        given.results.parent.mkdir(parents=True, exist_ok=True)

        def result(tool: str, case: Case | Network, hints: dict[str, Any], note: str) -> dict[str, Any]:
            job = (given.memory, tool, case.library, case.name, given.sparsity)
            row = run(context, given.seconds, *job, *((hints, True) if tool == "torch-pruning" else ()))
            if tool == "torch-pruning" and row["verdict"] in BAD and hints.get("heads", 1):
                other = run(context, given.seconds, *job, hints, False)
                row = row if other["verdict"] in BAD else other | {"settings": "without num_heads"}
            row = {"tool": tool, "library": case.library, "name": case.name, "family": case.family, "sparsity": given.sparsity, **row}
            with given.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(shown(row)) + "\n")
            done[tool, case.library, case.name] = row
            print(f"{note} {tool:13s} {case.name:36s} {summary(row)}", flush=True)
            if "trace" in row:
                print(row["trace"], file=sys.stderr, flush=True)
            return row

        for tool in tools:
            if tool != "fxprune":  # the quick ones first, as far as is known
                chosen.sort(key=lambda case: done.get(("fxprune", case.library, case.name), {}).get("spent", math.inf))
            for number, case in enumerate(chosen, 1):
                key = (tool, case.library, case.name)
                bad = key in done and done[key]["verdict"] in BAD
                if key in done and not (given.again == "all" or (given.again == "fail" and bad)):
                    continue
                hints = done.get(("fxprune", case.library, case.name), {})
                note = f"{number:3d}/{len(chosen)}"
                if case.library == "packages" and (tool != "fxprune" or not installed(case.family)):
                    continue
                if tool == "torch-pruning" and "outputs" not in hints and hints.get("verdict") not in BAD:
                    hints = result("fxprune", case, {}, note)
                result(tool, case, hints, note)
    write_page(given.page, done)
    return 0


def summary(row: dict[str, Any]) -> str:
    checks = " ".join(f"{c}: {row[c]};" for c in CHECKS if row.get(c, "ok") != "ok")
    share = f"-{row['params']:.0%} params -{row['macs']:.0%} MACs" if "params" in row else ""
    spent = f"{row['seconds']:.1f} s " if "seconds" in row else ""
    return f"{row['verdict']:20s} {share} {spent}{row.get('compared', '')} {row.get('why', '')} {checks} [{row.get('spent', 0):.0f} s]"


if __name__ == "__main__":
    sys.exit(main())
