"""``fxprune-search`` in a terminal, as a user has it: Control-C with workers about, and the same result whoever scores."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("sklearn", reason="the search extra is not installed")
pty = pytest.importorskip("pty", reason="only POSIX has terminals like that")
pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
QUICK = [
    *("--train-epochs", "3", "--distill-epochs", "1", "--no-baseline", "--target", "macs=0.4"),
    *("--rounds", "40", "--samples", "3", "--evaluations", "60", "--score-images", "100", "--calibration-images", "64"),
]
PATIENCE = 300  # seconds
# What is typed there is then a signal to all of the run's processes, as from a shell.
IN_ITS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "fxprune", *sys.argv[1:]])
"""


def typed(*arguments: object, until: bytes = b"") -> tuple[int, str]:
    """Run a command line in a terminal of its own, with Control-C typed once ``until`` is shown; the exit status and what was shown.

    Returns when no process holds the terminal any more, so a worker that stays behind is a failure.
    """
    terminal, inner = pty.openpty()
    command = [sys.executable, "-c", IN_ITS_TERMINAL, *map(str, arguments)]
    started = subprocess.Popen(command, cwd=ROOT, stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
    os.close(inner)
    shown, end, pressed = b"", time.monotonic() + PATIENCE, not until
    while True:
        assert time.monotonic() < end, f"something still holds the terminal: {shown[-500:]!r}"
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            read = os.read(terminal, 65536)
        except OSError:  # what Linux says when the last process has left the terminal
            break
        if not read:
            break
        shown += read
        if not pressed and until in shown:
            os.write(terminal, b"\x03")
            pressed = True
    os.close(terminal)
    return started.wait(), shown.decode(errors="replace")


def same(a: Path, b: Path) -> bool:
    weights = [load_file(out / "slim.safetensors") for out in (a, b)]
    equal = all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    return equal and (a / "policy.json").read_bytes() == (b / "policy.json").read_bytes()


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_whoever_scores_and_however_it_is_stopped_the_result_is_the_same(tmp_path: Path, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="the ray extra is not installed")
    alone, workers, cut = (tmp_path / name for name in ("alone", "workers", "cut"))
    others = ["--executor", executor, "--jobs", "2"]
    assert typed("--out", alone, *QUICK)[0] == 0
    assert typed("--out", workers, *QUICK, *others)[0] == 0
    assert same(workers, alone)
    for arguments, until in ((["--out", cut, *QUICK], b" scored "), (["--resume", cut], b"searching")):  # in a round; as workers start
        status, shown = typed(*arguments, *others, until=until)
        assert status == 130
        assert f"interrupted; go on with: fxprune-search --resume {cut}" in shown
        assert "Traceback" not in shown
        assert not (cut / "policy.json").exists()
    assert typed("--resume", cut, *others)[0] == 0
    assert same(cut, alone)
