"""``fxprune-search``: parses, calls, prints."""

from __future__ import annotations

import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from fxprune.cli import arguments, session
from fxprune.cli import run_folder as outputs
from fxprune.cli.arguments import Request
from fxprune.cli.run_folder import RunSummary
from fxprune.cli.session import Session
from fxprune.driver import Progress as SearchProgress
from fxprune.errors import FxPruneError
from fxprune.report import plots as figures
from fxprune.report.terminal import result_table, search_line, training_line
from fxprune.training.config import Progress as TrainingProgress

DONE, BAD_INPUT, UNMET, INTERRUPTED = 0, 2, 3, 130
PLAIN_SECONDS = 5.0  # between two lines of progress where the terminal cannot be rewritten


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status: 0 done, 2 bad input, 3 target not met, 130 interrupted."""
    given = sys.argv[1:] if argv is None else list(argv)
    signal.signal(signal.SIGTERM, _interrupted)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries warn of is no business of a user who runs a program
    console = Console()
    begun: Session | None = None
    try:
        request = arguments.read(given)
        if request.completion is not None:
            print(request.completion)
            return DONE
        if request.report is not None:
            console.print(f"written: {outputs.report(request.report)}", markup=False, soft_wrap=True)
            _say_without_figures(request.report, console)
            return DONE
        if request.explain and request.options is not None:
            text = str(Session(request.options, "").explained())
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            return DONE
        begun = _session(request, given)
        with Display(console) as display:
            done = begun.run(display)
        _show(done, begun, console)
        failed = [one for one in done.exports if "error" in one]
        for one in failed:
            _complain(f"error: {one['file']}: {one['error']}")
        return _unmet(done, begun) if done.unmet else BAD_INPUT if failed else DONE
    except KeyboardInterrupt:
        again = f"go on with: fxprune-search --resume {shlex.quote(begun.options.out)}" if begun else "nothing had been started"
        _complain(f"interrupted; {again}")
        # CPython notes an interrupt that ends a piece of code in a string, as imports of dataclasses run them, and would die of SIGINT
        # in place of exiting with our status. The next piece of code makes it forget.
        exec("")
        return INTERRUPTED
    except (FxPruneError, OSError) as error:
        _complain(f"error: {error}")
        return BAD_INPUT


def _session(request: Request, given: Sequence[str]) -> Session:
    if request.options is None:
        return session.resume(request.resume or "", **(request.changes or {}))
    return session.begin(request.options, shlex.join(["fxprune-search", *given]))


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _complain(text: str) -> None:
    """One line on stderr."""
    print(f"fxprune-search: {' '.join(text.split())}", file=sys.stderr)


def _unmet(done: RunSummary, run: Session) -> int:
    _complain(f"{done.unmet}; the nearest result is kept in {run.options.out}")
    return UNMET


def _show(done: RunSummary, run: Session, console: Console) -> None:
    console.print(result_table(done.rows, f"{run.options.model} on {run.options.data}"))
    console.print(Text(f"accuracy on the test part; latency in {run.runtime} on {run.device}", style="dim"))
    console.print(Text(f"in {run.options.out}: policy.json, slim.safetensors, history.jsonl, report.html"))
    _say_without_figures(run.options.out, console)
    for one in done.exports:
        if "error" not in one:
            told = "not run" if one["difference"] is None else f"within {one['difference']:.1e} of PyTorch's outputs"
            console.print(Text(f"in {run.options.out}: {one['file']}, {one['bytes'] / 1e6:.2f} MB, {told}"), soft_wrap=True)
    console.print(Text(f"the result, in Python:\n{done.load}"), soft_wrap=True)


def _say_without_figures(out: str, console: Console) -> None:
    if figures.missing():
        again = f"then: fxprune-search --report {shlex.quote(out)}"
        console.print(Text(f"report.html has tables only: {figures.missing()}, {again}"), soft_wrap=True)


class Display:
    """How a run stands: rewritten in place on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self.printed = 0.0

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def stage(self, text: str) -> None:
        self.console.print(f"[bold]{escape(text)}[/bold]")
        self.printed = time.monotonic()

    def searched(self, progress: SearchProgress) -> None:
        self._update(search_line(progress), progress.kind == "end" or (progress.kind == "step" and progress.steps > 1))

    def repaired(self, done: int, total: int, layer: str) -> None:
        self._update(Text(f"  layer {done}/{total}  {layer}"), done == total)

    def trained(self, progress: TrainingProgress) -> None:
        self._update(training_line(progress), progress.epoch == progress.epochs and progress.step == progress.steps)

    def _update(self, line: Text, worth_a_line: bool) -> None:
        if self.live is not None:
            self.live.update(line)
        if worth_a_line or (self.live is None and time.monotonic() - self.printed >= PLAIN_SECONDS):
            self.console.print(line)
            self.printed = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
