"""The commands under benchmarks/ run; what they find on everything stands in docs/."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxprune
from benchmarks import allocation, analysis, blocks, cifar10, demo, densenet_bc, studies
from benchmarks.coverage import RESULTS, main, read, shown
from benchmarks.coverage_page import BEGIN, TOOLS, write_page
from benchmarks.imagenet500 import pictures
from benchmarks.networks import Case, cases
from benchmarks.packages import checks, networks
from benchmarks.packages.network import CHECKS, NOT_ASKED, Network, image, of, rows
from benchmarks.torch_kirigami_tool import torch_kirigami_row
from benchmarks.zeroing import judged
from fxprune.models.loading import load_model

ROOT = Path(__file__).resolve().parents[1]


def coverage(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.coverage", "--results", "results.jsonl", "--page", "page.md", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_coverage_of_one_network_and_that_it_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("squeezenet1_1", "--library", "torchvision", "--tools", "fxprune")
    done = coverage(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (row["verdict"], row["traced"], row["parts"]) == ("exact", "whole", [])
    assert row["params"] > 0.4 and row["macs"] > 0.4 and row["moved"] > 0.01
    assert "| squeezenet1_1 | 2 × 3 × 128 × 128 | whole |" in (tmp_path / "page.md").read_text()
    assert "squeezenet1_1" in done.stdout
    main([*command, "--results", str(tmp_path / "results.jsonl"), "--page", str(tmp_path / "page.md")])
    assert "squeezenet1_1" not in capsys.readouterr().out, "what stands in the results is not run again"


def test_the_results_hold_what_the_page_shows_and_no_more() -> None:
    row = {"tool": "fxprune", "library": "timm", "name": "a", "family": "b", "sparsity": 0.5, "verdict": "exact", "params": 0.7}
    more = {"in_the_way": [("reason", 0.1)], "statistics": ["a:in"], "trace": "Traceback"}
    assert shown(row | more) == row
    assert shown(row | more | {"params": 0.2})["in_the_way"] == [("reason", 0.1)]
    assert {tool for tool, *_ in read(RESULTS)} <= set(TOOLS) and RESULTS.stat().st_size < 300_000


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_results_are_of_networks_that_are_still_listed(library: str) -> None:
    pytest.importorskip(library)
    assert {name for _, of, name, *_ in read(RESULTS) if of == library} <= {case.name for case in cases(libraries=(library,))}


def test_the_page_of_analysis_names_what_needs_most_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "1.2.3")
    seconds = {"compress": 0.2, "analyze": 0.1, "candidate": 0.01, "their prune": 1.0, "their candidate": 1.1}
    text = analysis.page({"net": seconds}, [(25, 0.003)], {"net": 4.0}, {"net": {"trace": 0.05}}, {"a": 3.0, "b": 5.0}, "the command")
    assert (
        "and Torch-Pruning 1.2.3 on" in text
        and "| net | 200 | 100 | 1000 | 5.0× | 10 | 1100 | 110.0× | 4 |" in text
        and "| 25 | 3.00 |" in text
    )
    assert text.index("| b | 5 |") < text.index("| a | 3 |")
    capped = {"net": seconds | {"kirigami": math.inf}, "other": seconds | {"kirigami": 4.0}}
    text = analysis.page(capped, [], {"net": 4.0, "other": 4.0}, {}, {}, "the command")
    assert "| net | gave up | – |" in text and "| other | 4000 | 20× |" in text
    alone = {k: v for k, v in seconds.items() if "their" not in k}
    assert "| net | 200 | 100 | – | – | 10 | – | – | 4 |" in analysis.page({"net": alone}, [], {"net": 4.0}, {}, {}, "the command")


def test_a_network_that_does_not_fit_its_caps_is_a_result(tmp_path: Path) -> None:
    coverage(tmp_path, "fasterrcnn_resnet50_fpn", "--library", "torchvision", "--tools", "fxprune", "--seconds", "1")
    assert json.loads((tmp_path / "results.jsonl").read_text())["verdict"] == "no time"
    assert "**no time**" in (tmp_path / "page.md").read_text()


def test_every_network_is_listed_once() -> None:
    names = [case.name for case in cases(libraries=("torchvision",))]
    assert len(names) == len(set(names)) >= 100
    assert [case.name for case in cases(("vgg11", "raft_*"), ("torchvision",))] == ["vgg11", "raft_large", "raft_small"]


def test_the_oracle_sees_a_wrong_index() -> None:
    torch.manual_seed(0)
    net, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), (torch.randn(5, 4),)
    stay = torch.tensor([0, 2, 3])
    kept = {"0.weight": {0: stay}, "0.bias": {0: stay}, "2.weight": {1: stay}}

    def slim(read: list[int]) -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
        state = net.state_dict()
        made.load_state_dict(
            {
                "0.weight": state["0.weight"][stay],
                "0.bias": state["0.bias"][stay],
                "2.weight": state["2.weight"][:, read],
                "2.bias": state["2.bias"],
            }
        )
        return made

    assert judged(net, inputs, slim([0, 2, 3]), kept, lambda: None, 1)["verdict"] == "exact"
    assert judged(net, inputs, slim([0, 3, 2]), kept, lambda: None, 1)["verdict"] == "wrong"


def test_torch_kirigami_is_judged_like_the_others(tmp_path: Path) -> None:
    pytest.importorskip("torch_kirigami")

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4))

    row = torch_kirigami_row(Case("here", "net", "net", build, (lambda: (torch.randn(2, 3, 8, 8),),)), 0.5)
    assert row["verdict"] == "exact" and row["prunable"] == 2 and 0.5 < row["params"] < 0.8


class Flat(nn.Module):
    """Takes one image size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12 * 64, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(self.b(self.a(x).relu()).relu().flatten(1))


def test_a_network_of_another_package_goes_through_every_check() -> None:
    row = checks.package_row(Network("x", "flat", Flat, image(), 8, 12), 0.5)
    assert row["verdict"] == "exact" and row["params"] > 0.5 and row["moved"] > 0.01
    assert {c: row[c] for c in CHECKS} == dict.fromkeys(CHECKS, "ok") | {"other size": NOT_ASKED}
    assert "advised" not in row, "it loses enough"


class Baked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1)


class Freezing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach() + self.bias


def test_the_checks_see_what_a_slim_network_gets_wrong() -> None:
    torch.manual_seed(0)
    network = Network("x", "linear", of("torch.nn:Linear", 6, 4), rows(6), 1, 1)
    model, two, three = nn.Linear(6, 4), (torch.randn(2, 6),), (torch.randn(3, 6),)
    whole = [model(*three)]
    assert checks._other(network, model, model, (model, {}), three, whole) == "ok"
    assert checks._other(network, model, nn.Linear(6, 4), (nn.Linear(6, 4), {}), three, whole).startswith("differs by")
    assert checks._other(network, model, nn.Sequential(model, Baked()), None, three, whole).startswith("shapes [(3, 4)] became")
    assert checks._backward(network, model, model, two) == "ok"
    frozen = Freezing(6, 4)
    assert checks._backward(network, model, frozen, two) == "no gradient for weight"
    assert checks._backward(network, frozen, frozen, (torch.randn(2, 5),)) == NOT_ASKED
    assert checks._checked(lambda: str(model(torch.randn(2, 5)))).startswith("RuntimeError: ")
    with torch.no_grad():
        references = {"example": (two, [model(*two)]), "other batch": (three, [model(*three) + 1])}
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    names = {"": sorted(vars(model))}
    assert checks._intact(model, state, names, {"example": references["example"]}) == "ok"
    assert checks._intact(model, state, names, references).endswith("at other batch")
    assert checks._intact(model, state | {"bias": state["bias"] + 1}, names, references) == "bias changed"
    assert checks._intact(model, state, {"": []}, references) == "attributes of the root changed"


def test_every_network_of_the_third_table_has_a_name_of_its_own_and_its_package_a_requirement() -> None:
    found = list(networks())
    assert len(found) >= 80 and len({n.family for n in found}) >= 25 and len({n.name for n in found}) == len(found)
    listed = (ROOT / "benchmarks" / "requirements-coverage.txt").read_text().splitlines()
    assert {n.family for n in found} <= {line.partition("==")[0] for line in listed}
    assert [n.name for n in networks(("BertForSequence*", "tabm"))] == ["BertForSequenceClassification", "TabM"]


def test_the_third_table_counts_what_passes_and_says_what_does_not(tmp_path: Path) -> None:
    row = {
        "tool": "fxprune",
        "library": "packages",
        "name": "a",
        "family": "p",
        "sparsity": 0.5,
        "verdict": "exact",
        "params": 0.7,
        "macs": 0.7,
    }
    good = row | dict.fromkeys(CHECKS, "ok") | {"other size": NOT_ASKED}
    bad = row | dict.fromkeys(CHECKS, "ok") | {"name": "b", "other batch": "differs by 1e-1", "params": 0.1, "in_the_way": [["why", 0.5]]}
    write_page(tmp_path / "page.md", {("fxprune", "packages", str(r["name"])): r | {"advised": ["why: do this"]} for r in (good, bad)})
    text = (tmp_path / "page.md").read_text()
    assert "1 of 2 pass every check that the original itself passes; 0 are wrong" in text
    assert "| yes | – | yes | yes | yes |" in text and "| **no** | yes | yes | yes | yes |" in text
    assert (
        "- fxprune, b, other batch: differs by 1e-1" in text
        and "10% of its parameters go. Locked" in text
        and "To do: why: do this" in text
    )


def test_coverage_of_a_network_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = coverage(tmp_path, "GPT2LMHeadModel", "mlp-mixer-pytorch", "--library", "packages")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["verdict"] for r in rows if r["name"] == "GPT2LMHeadModel"] == ["runs"] and all(rows[0][c] == "ok" for c in CHECKS)
    assert "GPT2LMHeadModel" in (tmp_path / "page.md").read_text()


def test_the_page_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    row = {"tool": "fxprune", "library": "timm", "name": "a", "family": "b", "sparsity": 0.5, "verdict": "fails", "why": "no reason"}
    write_page(page, {("fxprune", "timm", "a"): row})
    page.write_text(page.read_text().replace(BEGIN, f"By hand.\n\n{BEGIN}") + "\nThe end.\n")
    write_page(page, {("fxprune", "timm", "a"): row | {"why": "another"}})
    text = page.read_text()
    assert "By hand." in text and text.endswith("The end.\n") and "another" in text and "no reason" not in text


def test_a_teacher_that_remembers_answers_alike_and_runs_once_a_batch() -> None:
    calls: list[int] = []

    class Teacher(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return x.mean((2, 3))

    torch.manual_seed(0)
    teacher, batches = cifar10.Remembering(Teacher()), [torch.randn(4, 3, 16, 16) for _ in range(3)]
    first = [teacher(one) for one in batches]
    again = [teacher(one.clone()) for one in batches]
    assert calls == [4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(teacher(batches[0].flip(0)), first[0])


def test_the_page_of_cifar10_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    cifar10.write_page(path, f"table 1\n\n{cifar10.BY_HAND}\n\n")
    path.write_text(path.read_text() + "By hand.\n")
    cifar10.write_page(path, f"table 2\n\n{cifar10.BY_HAND}\n\n")
    assert path.read_text() == f"table 2\n\n{cifar10.BY_HAND}\n\nBy hand.\n"


def test_bars_are_as_long_as_the_shares() -> None:
    drawn = studies.bars(["a", "b"], np.array([[1.0, 0.5], [0.25, 0.0]]))
    assert [part.split('"')[0] for part in drawn.split('width="')[1:] if 'fill="#4c6ef5"' in part] == ["360.0", "90.0", "180.0", "0.0"]
    assert drawn.count("</text>") == 2


def test_allocations_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    save_file(load_model("fxprune.models:digits_net", num_classes=10).state_dict(), tmp_path / "digits.safetensors")
    spec = {"title": "Digits", "data": "digits", "classes": 10, "mean": None, "std": None}
    spec |= {"model": "fxprune.models:digits_net", "weights": "digits.safetensors"}
    monkeypatch.setattr(allocation, "NETWORKS", {"digits": spec})
    page = tmp_path / "page.md"
    methods = "uniform,magnitude,table,tried,joint,rl-pruner:8,synthetic"
    options = ["--networks", "digits", "--folder", str(tmp_path), "--methods", methods, "--images", "128", "--test-images", "50"]
    allocation.main([*options, "--macs", "0.6", "--out", str(tmp_path / "cells.jsonl"), "--page", str(page)])
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| Digits")]
    assert [row[1] for row in rows] == ["dense", *methods.split(",")]
    assert all(0.57 < float(row[4].rstrip("%")) / 100 <= 0.606 for row in rows[1:])
    assert [row[6] for row in rows[:4]] == ["0"] * 4 and 3 <= int(rows[6][6]) <= 8 and all(3 <= int(row[6]) <= 45 for row in rows[4:6])
    page.write_text(page.read_text() + "By hand.\n")
    allocation.main([*options, "--out", str(tmp_path / "cells.jsonl"), "--page", str(page)])  # nothing is left to do
    assert page.read_text().endswith("By hand.\n")


def test_torch_pruning_takes_what_the_budget_asks_for() -> None:
    pytest.importorskip("torch_pruning")
    model = load_model("fxprune.models:resnet20", num_classes=10).eval()
    x = torch.randn(1, 3, 32, 32)
    slim = cifar10.torch_pruned(lambda: copy.deepcopy(model), x, "tp-l2-uniform", 0.7, "layer*conv1", [], halvings=4)
    assert 0.5 < fxprune.profile(slim, x).macs / fxprune.profile(model, x).macs <= 0.7
    slim(torch.randn(2, 3, 32, 32))


def test_the_demo_is_measured_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.demo_options()[:2] == ["--data", "warped-digits"]
    quick = ["--train-epochs", "1", "--distill-epochs", "1", "--evaluations", "3", "--score-images", "60", "--calibration-images", "64"]
    monkeypatch.setattr(demo, "demo_options", lambda: [*quick, "--repair-images", "64"])
    page, out = tmp_path / "demo.md", tmp_path / "demo.jsonl"
    demo.main(["--seeds", "0,1", "--out", str(out), "--page", str(page)])
    text = page.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "%" in line]
    assert [row[0].strip("| ") for row in rows] == ["original", "uniform", "magnitude", "search"]
    assert all(45 < float(row[3].rstrip(" %")) < 50.6 for row in rows[1:])
    assert not rows[0][1] and all(row[1].count("%") == 1 for row in rows[1:])
    for name in ("uniform", "magnitude"):
        (gain,) = [line for line in text.splitlines() if line.startswith(f"Search minus {name}: ")]
        assert gain.count("(standard error") == 2 and "before training, " in gain and gain.endswith("in the end; 2 seeds.")
    written = out.read_text()
    demo.main(["--seeds", "0,1", "--out", str(out)])  # nothing is left to do
    assert out.read_text() == written


def test_the_densenet_of_that_page_is_the_published_one() -> None:
    model = densenet_bc.densenet_bc100()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.80e6, rel=0.01)
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_photographs_are_halved_by_the_seed(tmp_path: Path) -> None:
    image, arrow = pytest.importorskip("PIL.Image"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = []
    for number in range(6):
        with io.BytesIO() as file:
            image.new("RGB", (4, 4), (40 * number, 0, 0)).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": ""})
    parquet.write_table(arrow.table({"img": rows, "label": [100 * number for number in range(6)]}), tmp_path / "train.parquet")
    data, other = pictures(tmp_path), pictures(tmp_path, seed=1)
    labels = [sorted(part.labels.tolist()) for part in (data.train, data.test)]
    assert len(labels[0]) == len(labels[1]) == 3 and sorted(labels[0] + labels[1]) == [0, 100, 200, 300, 400, 500]
    assert sorted(other.train.labels.tolist()) != labels[0]
    x, y = next(iter(data.batches("test", 3)))
    assert x.shape == (3, 3, 4, 4) and torch.allclose(x[:, 0, 0, 0], (0.4 * y.float() - 127) / 128, atol=1e-5)


def test_blocks_of_a_transformer_and_that_the_benchmark_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "blocks.jsonl", tmp_path / "page.md"
    page.write_text(f"above\n{blocks.BEGIN}old{blocks.END}\nbelow\n")
    sizes = ["--repairs", "none,lstsq", "--layers", "4", "--steps", "2", "--more", "1", "--calibration", "5", "--test-pieces", "64"]
    command = ["--parts", "transformer", *sizes, "--out", str(out), "--page", str(page)]
    blocks.main(command)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["what"], row["repair"], len(row["gone"])) for row in rows] == [
        ("whole", "none", 0),
        *(("1 layers of 4", repair, 1) for repair in ("none", "lstsq")),
        *(("2 halves of 8", repair, 2) for repair in ("none", "lstsq")),
    ]
    assert all(math.isfinite(row["before"] + row["after"]) for row in rows) and set(rows[1]["blocks"].values()) == {"removed"}
    text = page.read_text()
    assert text.startswith("above") and text.endswith("below\n") and "old" not in text and text.count("| 2 halves of 8 |") == 2
    capsys.readouterr()
    blocks.main(command)
    assert capsys.readouterr().out == "" and page.read_text() == text
