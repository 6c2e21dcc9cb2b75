"""Runtimes, the table of layers, and what a candidate is predicted to take."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.driver import SearchConfig
from fxprune.driver.problem import IntArray
from fxprune.errors import FxPruneError, InputError, SearchError, TargetError
from fxprune.importance.criteria import scores
from fxprune.searching.candidates import Candidates
from fxprune.searching.problem import multiple_for
from fxprune.timing import candidates as timing_candidates
from fxprune.timing.candidates import MOST_SESSIONS, SESSIONS, CandidateTimer
from fxprune.timing.layers import Layer, LayerTable, cache_file, layer_of
from fxprune.timing.predicting import LatencyModel
from fxprune.timing.runtimes import CALLS, Runtime, Subject, against, in_turns, onnx_bytes, onnx_run

INPUTS = torch.randn(2, 3, 12, 12)
CPU = torch.device("cpu")


class Net(nn.Module):
    """Dense, depthwise and grouped convolutions, norms, a residual addition, and a linear behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, groups=4)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.point(self.depthwise(x))
        out: Tensor = self.head(self.grouped(x).mean((2, 3)).flatten(1))
        return out


@pytest.fixture
def candidates() -> Candidates:
    torch.manual_seed(0)
    graph = fxprune.analyze(Net().eval(), INPUTS)
    return Candidates(graph, scores(graph, "l2", None, 0), 4)


def even(candidates: Candidates, share: float) -> IntArray:
    return np.asarray(candidates.rounded(np.array([int(share * group.size) for group in candidates.groups])))


@pytest.mark.parametrize(("name", "threads", "batch"), [("tensorrt", 1, None), ("eager", 0, None), ("eager", 1, 0)])
def test_a_runtime_that_there_is_not(name: str, threads: int, batch: int | None) -> None:
    with pytest.raises(InputError):
        Runtime(name, threads, batch)


def test_inputs_are_repeated_to_the_batch() -> None:
    made = Runtime(batch=5).batched({"x": INPUTS, "scale": torch.tensor(2.0)})
    assert made["x"].shape == (5, 3, 12, 12) and torch.equal(made["x"][4], INPUTS[0]) and made["scale"] == 2


def test_networks_take_turns_and_a_busy_machine_falls_on_both() -> None:
    clock, calls, busy = [0.0], [0], iter([1.0, 5.0, 1.0, 1.0, 9.0] * 40)

    def takes(seconds: float, turn: bool) -> Subject:
        def run() -> None:
            calls[0] += turn
            if turn and calls[0] % (CALLS + 1) == 3:  # the first two calls say how long one takes
                clock[1:] = [next(busy)]
            clock[0] += seconds * clock[1]

        return Subject(nn.Identity(), run, lambda: clock[0], CPU)

    clock.append(1.0)
    _, shares = against(takes(1.0, turn=True), [takes(0.4, turn=False)], Runtime())
    assert shares == [pytest.approx(0.4)]


def test_the_first_call_of_a_turn_does_not_count() -> None:
    """It is slow, since the other network was in the caches; of a small network it would be a good part of a turn."""
    clock, last = [0.0], [""]

    def takes(name: str, seconds: float) -> Subject:
        def run() -> None:
            clock[0] += seconds + (0.5 if last[0] != name else 0.0)
            last[0] = name

        return Subject(nn.Identity(), run, lambda: clock[0], CPU)

    whole, slims = against(takes("whole", 1.0), [takes("slim", 0.4)], Runtime())
    assert whole == pytest.approx(1.0) and slims == pytest.approx([0.4])


def test_what_cannot_be_timed_is_said_in_one_line() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Complex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = torch.linalg.eigvals(x)
            return found

    with pytest.raises(FxPruneError, match="cannot be timed in onnx: .*; choose another runtime") as caught:
        in_turns([Complex()], torch.randn(3, 3), Runtime("onnx"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "shape", "found"),
    [
        (nn.Conv2d(8, 16, 3, 2, 1), (2, 8, 9, 9), Layer("conv", (2, 9, 9), 8, 16, (3, 3), (2, 2), (1, 1), (1, 1))),
        (nn.Conv1d(8, 16, 5, padding="same"), (2, 8, 9), Layer("conv", (2, 9), 8, 16, (5,), (1,), (2,), (1,))),
        (nn.ConvTranspose2d(8, 4, 2, 2), (2, 8, 9, 9), Layer("transposed", (2, 9, 9), 8, 4, (2, 2), (2, 2), (0, 0), (1, 1))),
        (nn.Linear(8, 4), (2, 7, 8), Layer("linear", (14,), 8, 4)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 9), None),
        (nn.ReLU(), (2, 8), None),
    ],
)
def test_a_layer_and_what_stands_for_it(module: nn.Module, shape: tuple[int, ...], found: Layer | None) -> None:
    assert layer_of(module, shape) == found
    if found is not None:
        with torch.no_grad():
            assert found.module()(found.example()).numel() == module(torch.zeros(shape)).numel()


def test_narrow_layers_have_widths_that_runtimes_like() -> None:
    dense = Layer("conv", (1, 8, 8), 100, 60, (3, 3), (1, 1), (1, 1), (1, 1))
    assert (dense.narrowed(0.5, 0.125).outputs, dense.narrowed(0.5, 0.125).inputs) == (32, 16)
    depthwise = Layer("conv", (1, 8, 8), 64, 128, (3, 3), (1, 1), (1, 1), (1, 1), 64).narrowed(0.5, 1.0)
    assert (depthwise.inputs, depthwise.outputs, depthwise.groups) == (32, 64, 32)
    grouped = Layer("conv", (1, 8, 8), 64, 128, (3, 3), (1, 1), (1, 1), (1, 1), 4).narrowed(0.5, 0.5)
    assert (grouped.inputs, grouped.outputs, grouped.groups) == (32, 64, 4)
    assert grouped.module()(grouped.example()).shape[1] == 64


def test_layers_are_measured_once_and_kept_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    layer, runtime = Layer("linear", (4,), 16, 16), Runtime()
    known: dict[str, float] = {}
    first = LayerTable(runtime, CPU, known)
    seconds = first.seconds(layer)
    assert seconds > 0 and list(known.values()) == [seconds]
    first.save()
    monkeypatch.setattr(LayerTable, "_measured", lambda self, layer: pytest.fail("measured again"))
    assert LayerTable(runtime, CPU, {}).seconds(layer) == seconds
    assert LayerTable(runtime, CPU, dict.fromkeys(known, 7.0)).seconds(layer) == 7.0  # what a search began with
    assert cache_file(Runtime(threads=2), CPU) != cache_file(runtime, CPU)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 0, "seconds": {}}', '{"format": 2, "seconds": {"a": -1, "b": "x"}}', '{"format": 2}']
)
def test_a_file_that_cannot_be_read_is_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    cache_file(Runtime(), CPU).write_text(text)
    table = LayerTable(Runtime(), CPU, {})
    assert table.kept == {} and table.seconds(Layer("linear", (1,), 8, 8)) > 0
    table.save()
    assert len(json.loads(table.path.read_text())["seconds"]) == 1


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "file"))
    table = LayerTable(Runtime(), CPU, {})
    assert table.seconds(Layer("linear", (1,), 8, 8)) > 0
    table.save()


def by_products(self: LayerTable, layer: Layer) -> float:
    """As if a layer took a fixed time and one for its products."""
    return 1.0 + 0.01 * layer.inputs * layer.outputs / layer.groups


@pytest.fixture
def model(candidates: Candidates, monkeypatch: pytest.MonkeyPatch) -> LatencyModel:
    monkeypatch.setattr(LayerTable, "_measured", by_products)
    return LatencyModel(candidates.graph, candidates.groups, Runtime(), {"latency": 40.0})


def test_predicted_shares_fall_as_the_layers_times_do(model: LatencyModel, candidates: Candidates) -> None:
    rows = np.stack([even(candidates, share) for share in (0.0, 0.3, 0.6, 0.9)])
    shares = model.shares(rows)
    assert shares[0] == pytest.approx(1.0)
    assert (np.diff(shares) < 0).all() and shares[-1] > 0


@pytest.mark.parametrize("gone", [16, 32, 48, 63])
def test_layers_shrink_by_their_table(monkeypatch: pytest.MonkeyPatch, gone: int) -> None:
    monkeypatch.setattr(LayerTable, "_measured", by_products)
    graph = fxprune.analyze(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 8, 1)), INPUTS)
    groups = [group for group in graph.groups if group.prunable]
    layers = 2.0 + 0.01 * (3 * 64 + 64 * 8)
    model = LatencyModel(graph, groups, Runtime(), {"latency": layers / 0.95})
    assert [group.size for group in groups] == [64]
    lost = 0.01 * gone * (3 + 8)
    assert model.shares(np.array([[gone]]))[0] == pytest.approx(1 - lost / (layers / 0.95))


def test_measured_shares_set_the_prediction_right(model: LatencyModel, candidates: Candidates) -> None:
    half, most = even(candidates, 0.5), even(candidates, 0.75)
    before = model.shares(np.stack([half, most]))
    model.correct([(half, 0.9 * before[0])])
    after = model.shares(np.stack([np.zeros_like(half), half, most]))
    assert after[0] == pytest.approx(1.0) and after[1] == pytest.approx(0.9 * before[0]) and after[2] < after[1]
    model.correct([(half, 0.9 * before[0]), (most, 0.5 * before[1])])
    assert model.shares(most[None])[0] == pytest.approx(0.5 * before[1])
    model.correct([(half, 0.3), (most, 0.9)])  # out of order: the newest counts
    assert model.shares(most[None])[0] == pytest.approx(0.9)
    assert model.shares(even(candidates, 0.9)[None])[0] > 0


def test_what_parts_of_the_network_count_is_fitted_to_what_was_measured(model: LatencyModel, candidates: Candidates) -> None:
    """The same widths everywhere are measured, and other widths then predicted better: which parts are slower than they seemed is known."""
    weights = np.array([0.4, 3.0, 2.0])

    def true(removed: IntArray) -> float:
        whole = model._parts(np.zeros_like(removed)[None])[0] @ weights
        return float(model._parts(removed[None])[0] @ weights / whole)

    other = even(candidates, 0.5)
    other[::2] = 0
    before = abs(model.shares(other[None])[0] / true(other) - 1)
    model.correct([(even(candidates, share), true(even(candidates, share))) for share in (0.25, 0.5, 0.75)])
    assert abs(model.shares(other[None])[0] / true(other) - 1) < before / 2 and before > 0.02
    assert model.shares(np.zeros_like(other)[None])[0] == pytest.approx(1.0)


def test_what_a_call_of_a_runtime_takes_is_no_part_of_a_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path))
    for name, wanted in (("onnx", [3.0 - 2.0, 0.1 * 1.5]), ("eager", [3.0, 1.5])):
        taken = iter([3.0, 2.0, 1.5] if name == "onnx" else [3.0, 1.5])
        monkeypatch.setattr(LayerTable, "_fastest", lambda self, run, taken=taken: (run(), next(taken))[1])
        table = LayerTable(Runtime(name), CPU, {})
        assert [table.seconds(Layer("linear", (4,), 8, 8)), table.seconds(Layer("linear", (4,), 8, 16))] == pytest.approx(wanted)


def test_the_batch_counts(candidates: Candidates, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: set[int] = set()

    def measured(self: LayerTable, layer: Layer) -> float:
        shapes.add(layer.shape[0])
        return 1.0

    monkeypatch.setattr(LayerTable, "_measured", measured)
    model = LatencyModel(candidates.graph, candidates.groups, Runtime(batch=6), {"latency": 40.0})
    model.shares(even(candidates, 0.5)[None])
    assert shapes == {6} and model.timer.inputs.shape[0] == 6


def test_timing_leaves_the_network_as_it_was(candidates: Candidates) -> None:
    network = candidates.graph.model.train()
    state = copy.deepcopy(network.state_dict())
    timer = CandidateTimer(candidates.graph, Runtime(), {})
    assert timer.seconds > 0 and timer.share(candidates.slim(even(candidates, 0.5))) > 0
    assert network.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_candidates_are_made_of_the_originals_file(candidates: Candidates, runtime: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[runtime])
    pytest.importorskip("onnxscript")
    timer = CandidateTimer(candidates.graph, Runtime(runtime), {})
    slim = candidates.slim(even(candidates, 0.5)).eval()
    assert timer._files is not None
    assert timer._swapped(slim, timer._files[0]) is not None  # compared with the slim network's own output on the way
    assert timer._swapped(Net().eval(), timer._files[0]) is not None
    wrong = copy.deepcopy(slim)
    wrong.register_forward_hook(lambda module, args, out: out + 1.0)
    assert timer._swapped(wrong, timer._files[0]) is None


def test_a_file_is_timed_in_several_sessions(candidates: Candidates, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    timer, made = CandidateTimer(candidates.graph, Runtime("onnx"), {}), list[bytes]()
    session = timer._session

    def counted(file: bytes) -> object:
        made.append(file)
        return session(file)

    found = [0.5]
    monkeypatch.setattr(timer, "_session", counted)
    monkeypatch.setattr(timing_candidates, "against", lambda first, others, *_: (1.0, [found[len(made) // 2 % len(found)]]))
    slim = candidates.slim(even(candidates, 0.5)).eval()
    assert timer._files is not None
    swapped = timer._swapped(slim, timer._files[0])
    for found[:], count in (([0.5], SESSIONS), ([0.4, 0.6], MOST_SESSIONS)):  # what they agree on is known sooner
        made.clear()
        assert timer.share(slim) == pytest.approx(0.5) and swapped is not None
        assert [made.count(file) for file in (timer._files[1], swapped)] == [count, count + 1]  # one to compare its outputs
        assert made[1:5] == [swapped, timer._files[1], timer._files[1], swapped], "the later one is often the faster"


def test_networks_are_timed_as_they_are_deployed_with_norms_in_the_convolutions() -> None:
    """The exporter gives a convolution without bias zeros that are made when it runs, and the runtime then leaves the norm outside."""
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.up, self.biased = nn.ConvTranspose2d(8, 4, 2, bias=False), nn.Conv2d(4, 4, 1)
            self.scale = nn.Parameter(torch.zeros(4))
            nn.init.normal_(self.norm.bias)

        def forward(self, x: Tensor) -> Tensor:
            x = self.biased(self.up(self.norm(self.plain(x)).relu()))
            out: Tensor = nn.functional.conv2d(x, self.biased.weight, self.scale) + torch.zeros(4, 1, 1).expand_as(x)
            return out

    model = Layers().eval()
    file = onnx_bytes(model, INPUTS)
    convolutions = [node for node in onnx.load_from_string(file).graph.node if node.op_type.startswith("Conv")]
    assert [len(node.input) for node in convolutions] == [2, 2, 3, 3]
    found = onnx_run(file, [INPUTS.numpy()], Runtime("onnx"))()
    with torch.no_grad():
        assert np.allclose(found[0], model(INPUTS), atol=1e-5)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(Path(tempfile.mkdtemp()) / "optimised.onnx")
    ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert not left & {"BatchNormalization", "Expand", "Cast"}


def test_the_runtime_chooses_the_multiple_where_the_user_does_not(candidates: Candidates) -> None:
    graph = candidates.graph
    assert multiple_for(graph, SearchConfig(targets="latency=0.5")) == 8
    assert multiple_for(graph, SearchConfig(targets="latency=5ms")) == 8
    assert multiple_for(graph, SearchConfig(targets="latency=0.5", round_to=1)) == 1
    assert multiple_for(graph, SearchConfig(targets="macs=0.5")) == 1
    plain = fxprune.analyze(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 8))
    assert multiple_for(plain, SearchConfig(targets="latency=0.5")) == 1


def test_a_search_for_a_latency_ends_where_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the networks runs otherwise than that of the layers, and the search comes to what is measured."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    monkeypatch.setattr(LayerTable, "_measured", by_products)

    def seconds(model: nn.Module) -> float:
        return 0.02 + 1e-6 * sum(p.numel() for p in model.parameters())

    monkeypatch.setattr(CandidateTimer, "seconds", property(lambda self: seconds(self.graph.model)))
    monkeypatch.setattr(CandidateTimer, "share", lambda self, slim: seconds(slim) / seconds(self.graph.model))
    whole = seconds(network)
    for targets in ("latency=0.6", f"latency={600 * whole:.6f}ms", {"latency": 0.6, "params": 0.9}):
        for strategy in ("uniform", "table", "rl-pruner"):
            config = SearchConfig(targets=targets, strategy=strategy, rounds=2, round_to=1, repair="none")
            found = fxprune.search(network, INPUTS, lambda slim: 1.0, config=config, calibration=[INPUTS])
            assert seconds(found.model) / whole == pytest.approx(0.6, rel=0.05)
            assert found.outcome.metrics["latency"] == pytest.approx(seconds(found.model) / whole)
    with pytest.raises(TargetError, match="latency"):
        fxprune.search(network, INPUTS, lambda slim: 1.0, config=SearchConfig(targets="latency=0.3", strategy="uniform", repair="none"))
    with pytest.raises(SearchError, match="the original takes .* already"):
        fxprune.search(network, INPUTS, lambda slim: 1.0, config=SearchConfig(targets="latency=9s", strategy="uniform", repair="none"))
