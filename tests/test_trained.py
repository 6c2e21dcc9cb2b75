"""The command that scores trained networks out of their wheels: it goes on where it stopped, and its page says what was found."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.trained import __main__ as command
from benchmarks.trained import measuring
from benchmarks.trained.drawing import collapsed, likeness, lines, pages
from benchmarks.trained.network import CONVOLUTIONAL, Network, Task, pickled_arrays
from benchmarks.trained.page import MARK, page
from benchmarks.trained.registry import NETWORKS
from benchmarks.trained.sounds import cents, tones

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Made:
    """A network whose wheel is torch's, and how often it was made and failed."""

    def __init__(self) -> None:
        self.times, self.broken = 0, False
        self.network = Network("made", CONVOLUTIONAL, ("torch",), "nothing", "8 inputs", self.task)

    def task(self, _: Path) -> Task:
        self.times += 1
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4)).eval()
        with torch.no_grad():
            wanted = model(X).argmax(1)

        def score(net: nn.Module) -> float:
            if self.broken and len(net.get_parameter("0.weight")) < 16:
                raise RuntimeError("no luck (/somewhere/on/this/machine.py:3) today")
            return float((net(X).argmax(1) == wanted).float().mean())

        return Task(model, X[:2], [X.roll(one, 0) + 0.1 for one in range(5)], score)


def test_it_goes_on_where_it_stopped_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    made = Made()
    networks = {"made": made.network, "absent": Network("absent", CONVOLUTIONAL, ("no-such-wheel",), "", "", made.task)}
    monkeypatch.setattr(command, "NETWORKS", networks)
    monkeypatch.setattr(measuring, "RUNS", 2)
    out = tmp_path / "page.md"
    out.write_text(f"old\n{MARK}\n\nby hand\n")
    arguments = ["--results", str(tmp_path / "results"), "--out", str(out), "--folder", str(tmp_path), "--tools"]
    made.broken = True
    command.main(arguments)
    cells = json.loads((tmp_path / "results" / "made.json").read_text())["cells"]
    assert cells["dense"]["score"] == 1.0 and cells["table 0.5"] == {"error": "RuntimeError: no luck today"}
    assert "fails" in out.read_text() and "no luck" in out.read_text()
    made.broken = False
    command.main(arguments)
    cells = json.loads((tmp_path / "results" / "made.json").read_text())["cells"]
    assert made.times == 2 and all("error" not in cell for cell in cells.values())
    assert cells["table 0.5"]["macs"] <= 0.5 * cells["dense"]["macs"] < cells["uniform 0.75"]["macs"] <= 0.75 * cells["dense"]["macs"]
    assert cells["joint 0.5"]["macs"] == cells["table 0.5"]["macs"] and cells["joint 0.5"]["sliced"] == cells["table 0.5"]["sliced"]
    assert cells["joint 0.5"]["moved"] is ("moved all layers together" in cells["joint 0.5"]["notes"][-1])
    assert cells["time"]["share"] == pytest.approx(cells["time"]["slim"] / cells["time"]["dense"], rel=0.1)
    command.main(arguments)
    assert made.times == 2, "what is finished is not run again"
    held = json.loads((tmp_path / "results" / "made.json").read_text())
    del held["cells"]["joint 0.5"]
    held["cells"]["table 0.5"]["score"] = held["cells"]["uniform 0.5"]["score"] = -1.0
    (tmp_path / "results" / "made.json").write_text(json.dumps(held))
    command.main(arguments)
    again = json.loads((tmp_path / "results" / "made.json").read_text())["cells"]
    assert again["uniform 0.5"]["score"] == -1.0, "what it shares nothing with stays"
    for name in ("table 0.5", "joint 0.5"):
        assert {**again[name], "seconds": 0} == {**cells[name], "seconds": 0}, "one slim network, whatever an older run allocated"
    text = out.read_text()
    assert "| made | 100.0 |" in text and text.endswith(f"{MARK}\n\nby hand\n") and "absent" not in text


def test_the_page_says_what_fell_short() -> None:
    cells: dict[str, Any] = {"dense": {"score": 0.9, "macs": 100, "params": 10, "locked": 0.5, "why": "it reaches the output"}}
    cells |= {f"{method} {share}": {"score": 0.5, "sliced": 0.6} for method in ("uniform", "table") for share in (0.75, 0.5)}
    cells["Torch-Pruning"] = {"error": "IndexError: it does not know LSTMs"}
    one = {"wheel": "torch 2", "licence": "BSD", "cells": cells}
    text = page({"made": Made().network}, {"made": one}, "")
    assert "0 of 1 networks keep 95 %" in text and "Repair left made with a lower score" in text
    assert "| made | 90.0 | 50.0 | 50.0 | 50.0 | 50.0 |  |  | 60.0 | - | no |" in text
    assert "**made**: keeps 55.6% of its score at half the MACs; 50% of its channels are locked, most because it reaches the output" in text


def test_the_page_counts_by_least_squares_and_by_joint() -> None:
    def one(table: float, joint: float | None, moved: bool = True) -> dict[str, Any]:
        cells: dict[str, Any] = {"dense": {"score": 0.8, "macs": 100, "params": 10}, "table 0.5": {"score": table, "sliced": 0.1}}
        if joint is not None:
            cells["joint 0.5"] = {"score": joint, "sliced": 0.1, "moved": moved}
        return {"wheel": "torch 2", "licence": "BSD", "cells": cells}

    networks = dict.fromkeys(("a", "b", "c", "d"), Made().network)
    found = {"a": one(0.72, 0.78), "b": one(0.79, 0.77), "c": one(0.5, 0.5, moved=False), "d": one(0.8, None)}
    text = page(networks, found, "")
    assert (
        "by the error table and least squares alone, 2 of 4 networks keep 95 % of their score; with all weights moved together afterwards "
        "(*joint*), 2 of 3 measured so far, of which least squares alone holds 1." in text
    )
    assert "Joint scores higher than least squares alone on a (+6.0). Joint scores lower than least squares alone on b (-2.0)." in text
    assert "On c inputs that were not fitted saw no gain by it, and the weights stayed as fitted." in text
    assert "- **a**: keeps 90.0% of its score at half the MACs, 97.5% by joint.\n- **c**: keeps 62.5% of its score" in text
    del found["d"]
    assert "(*joint*), 2 of 3." in page(networks, found, "")


def test_a_pickle_of_arrays_is_read_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "good.pkl").write_bytes(pickle.dumps({"a": np.arange(3.0), "b": [np.ones((2, 2), np.float32)]}, protocol=4))
    found = pickled_arrays(tmp_path / "good.pkl")
    assert found["a"].tolist() == [0, 1, 2] and found["b"][0].shape == (2, 2)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(pickle.UnpicklingError, match="print is no array"):
        pickled_arrays(tmp_path / "bad.pkl")


def test_what_is_made_here_is_what_it_is_labelled() -> None:
    waves, pitches = tones(6, 16000, 16000, 100, 800, 0)
    spectra = torch.fft.rfft(waves).abs()
    for spectrum, pitch in zip(spectra, pitches, strict=True):
        harmonics = torch.stack([spectrum[int(pitch * n) - 3 : int(pitch * n) + 4].max() for n in (1, 2)])
        between = spectrum[int(pitch * 1.4) : int(pitch * 1.6)].max()
        assert float(harmonics.min()) > 3 * float(between)
    assert float(cents(torch.tensor(880.0), torch.tensor(440.0))) == pytest.approx(1200)
    assert likeness("kitten", "sitting") == pytest.approx(1 - 3 / 7) and likeness("", "ab") == 0 and likeness("ab", "ab") == 1
    assert collapsed([0, 1, 1, 0, 1, 2, 2], ["", "a", "b"]) == "aab"
    drawn = lines(["import", "yield"], 32, 96, 0)
    assert drawn.shape == (2, 32, 96) and float(drawn[0].std()) > 10
    sheets, masks = pages(1, 96, 0)
    assert float(sheets[~masks].std()) < 1 < float(sheets[masks].std()), "outside of words there is nothing"


def test_every_network_has_a_wheel_and_a_name_of_its_own() -> None:
    assert len(NETWORKS) >= 20 and all(network.wheels and network.what and network.judged for network in NETWORKS.values())
    listed = (Path(__file__).parents[1] / "benchmarks" / "requirements-trained.txt").read_text().lower()
    for network in NETWORKS.values():
        assert f"\n{network.wheels[0].lower().replace('_', '-')}==" in listed.replace("_", "-"), network.name


@pytest.mark.parametrize("name", ["mtcnn-pnet", "mtcnn-rnet", "mtcnn-onet"])
@pytest.mark.filterwarnings("ignore")
def test_three_networks(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    if network.missing():
        pytest.skip(f"not installed: {', '.join(network.missing())}")
    torch.manual_seed(0)
    found = dict(measuring.cells(network, tmp_path, {}))
    assert all("error" not in cell for name, cell in found.items() if name != "time"), found
    dense = found["dense"]["score"]
    assert dense > 0.95 and found["table 0.5"]["score"] >= 0.9 * dense and found["table 0.5"]["macs"] <= 0.5 * found["dense"]["macs"]
