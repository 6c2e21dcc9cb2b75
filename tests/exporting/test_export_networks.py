"""The networks that people deploy, pruned, in every runtime: `make test-export`. The table of docs/export.md is made by the same code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from benchmarks import exports
from benchmarks.exports import LIMITS, NETWORKS, RUNTIMES, backend_of, made, outcome
from fxprune.exporting.formats import FORMATS

_made: dict[str, nn.Module] = {}


def network(name: str) -> nn.Module:
    """The slim network, kept for its next runtime: a network's tests follow each other."""
    if name not in _made:
        _made.clear()
        _made[name] = made(name)
    return _made[name]


@pytest.mark.export
@pytest.mark.long
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, runtime: str, tmp_path: Path, record_property: Any) -> None:
    for package in () if runtime == "compile" else (*FORMATS[runtime].writes, *FORMATS[runtime].runs):
        pytest.importorskip(package.split(".")[0], reason=f"the {FORMATS[runtime].extra} extra is not installed")
    if (name, runtime) in LIMITS:
        pytest.skip(LIMITS[name, runtime])
    found = outcome(network(name), runtime, tmp_path, backend_of(name))
    record_property("difference", found)
    quantized = runtime != "compile" and FORMATS[runtime].quantized
    assert found < (exports.NOISE if quantized else exports.TOLERANCE)


@pytest.mark.export
@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_exported_is_pruned_to_scattered_channels_and_odd_widths(name: str) -> None:
    record = fxprune.record(network(name))
    assert record.after.params < 0.9 * record.before.params
    kept = [indices for dims in record.kept.values() for indices in dims.values()]
    assert any(len(indices) % 2 for indices in kept), "no widths that runtimes could dislike"
    assert any(int(indices[-1]) - int(indices[0]) >= len(indices) for indices in kept), "nothing but the first or last ones"


def test_the_command_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(exports.NETWORKS, "small", lambda: nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 3, 3, stride=31)))
    monkeypatch.setitem(LIMITS, ("small", "onnx"), "it is not asked")
    page = tmp_path / "page.md"
    page.write_text(f"By hand.\n\n{exports.BEGIN}\n{exports.END}\n\nAlso by hand.\n")

    def run(*runtimes: str) -> str:
        monkeypatch.setattr("sys.argv", ["exports", "--networks", "small", "--runtimes", ",".join(runtimes), "--page", str(page)])
        exports.main()
        return page.read_text()

    run("torch")
    text = run("onnx")
    assert text.startswith("By hand.") and text.endswith("Also by hand.\n")
    assert exports.rows(text) == {"small": {**dict.fromkeys(RUNTIMES, ""), "torch": "0e+00", "onnx": "no"}}
    assert "small" in capsys.readouterr().out


def test_noise_sees_outputs_of_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 8 bits are judged by is far above its bound where a file computes something else."""
    torch.manual_seed(0)
    slim = exports.slimmed(
        nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 3, 3, stride=31)), torch.randn(2, 3, exports.SIZE, exports.SIZE)
    )
    one = FORMATS["torch"]
    monkeypatch.setattr(fxprune, "export", lambda *a, **k: type("Exported", (), {"difference": None}))
    for run, low, high in ((lambda path, given: [slim(given[0])], 0.0, 1e-9), (lambda path, given: [slim(given[0].flip(0))], 1.0, 3.0)):
        monkeypatch.setitem(FORMATS, "torch", replace(one, writes=(), runs=(), run=run, quantized=True))
        with torch.no_grad():
            assert low <= outcome(slim, "torch", tmp_path) <= high
