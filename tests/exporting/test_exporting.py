"""Slim modules in the files of other runtimes, run there and compared with eager PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import DependencyError, ExportError, FileError, InputError, VerificationError
from fxprune.evaluation.accuracy import recalibrate_batchnorm
from fxprune.exporting import exporter as exporting
from fxprune.exporting import formats as runtimes
from fxprune.exporting.formats import FORMATS, format_named, installed

EVERY = [name for name in FORMATS if not FORMATS[name].quantized]
INT8 = [name for name in FORMATS if FORMATS[name].quantized]


class Branches(nn.Module):
    """A residual, a grouped convolution, a view with a literal, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mix = nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.mix(torch.relu(self.deep(x)))
        y = x.mean((2, 3))
        return {"out": self.head(y), "pairs": y.view(y.shape[0], 8, 2).amax(2)}


def slimmed(model: nn.Module, example: Any, **options: Any) -> Any:
    """Half of every group; statistics that fit, so that outputs have a size worth comparing."""
    torch.manual_seed(0)
    recalibrate_batchnorm(model, [torch.randn(8, *example.shape[1:])])
    slim = fxprune.compress(model.eval(), 0.5, example, **options)
    recalibrate_batchnorm(slim, [torch.randn(8, *example.shape[1:])])
    return slim


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    slim: nn.Module = slimmed(Branches(), torch.randn(1, 3, 16, 16))
    return slim


def skip_without(name: str) -> None:
    for package in (*FORMATS[name].writes, *FORMATS[name].runs):
        pytest.importorskip(package.split(".")[0], reason=f"the {FORMATS[name].extra} extra is not installed")


# -- files that are run again ---------------------------------------------------------------------------------------------------


@pytest.mark.export
@pytest.mark.parametrize("name", [*EVERY[:-1], pytest.param("executorch", marks=pytest.mark.long)])
def test_a_file_computes_what_eager_does(small: nn.Module, name: str, tmp_path: Path) -> None:
    skip_without(name)
    path = tmp_path / f"slim{FORMATS[name].suffix}"
    done = fxprune.export(small, path)
    assert done.path == path and done.format == name and done.difference is not None and done.difference < 1e-5
    given = torch.randn(7, 3, 16, 16)
    wanted = small.eval()(given)
    found = FORMATS[name].run(path, [given])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted.values(), strict=True))
    assert done.bytes == sum(one.stat().st_size for one in tmp_path.iterdir())
    assert path.stat().st_mode & stat.S_IRGRP, "others may read it, where the umask lets them"


@pytest.mark.export
@pytest.mark.parametrize("name", ["torch", "onnx", "openvino"])
def test_other_sizes_change_where_they_are_asked_to(small: nn.Module, name: str, tmp_path: Path) -> None:
    skip_without(name)
    done = fxprune.export(small, tmp_path / f"slim{FORMATS[name].suffix}", name, dynamic={0: "batch", 2: "height", 3: "width"})
    assert done.difference is not None and done.difference < 1e-5
    given = torch.randn(3, 3, 22, 36)
    found = FORMATS[name].run(done.path, [given])
    assert torch.allclose(found[0], small.eval()(given)["out"], atol=1e-5)


@pytest.mark.export
@pytest.mark.parametrize("name", [INT8[0], INT8[1], pytest.param(INT8[2], marks=pytest.mark.long)])
def test_eight_bits_are_near(small: nn.Module, name: str, tmp_path: Path) -> None:
    skip_without(name)
    batches = [(torch.randn(8, 3, 16, 16), torch.zeros(8)) for _ in range(4)]
    done = fxprune.export(small, tmp_path / f"slim{FORMATS[name].suffix}", calibration=batches)
    assert done.format == name and done.difference is not None and 1e-6 < done.difference < 0.2


@pytest.mark.export
def test_weights_of_eight_bits_leave_room_for_processors_without_vnni(small: nn.Module, tmp_path: Path) -> None:
    """Two products of an unsigned byte and such a weight fit into 16 bits, in which those processors add them."""
    skip_without("onnx-int8")
    onnx = importlib.import_module("onnx")
    fxprune.export(small, tmp_path / "slim.int8.onnx", calibration=[torch.randn(8, 3, 16, 16)], verify=False)
    found = onnx.load(tmp_path / "slim.int8.onnx").graph.initializer
    weights = [onnx.numpy_helper.to_array(one) for one in found if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1]
    assert weights and max(int(abs(one.astype(int)).max()) for one in weights) == 64


@pytest.mark.export
def test_onnx_axes_have_their_names_and_int8_needs_no_calibration(small: nn.Module, tmp_path: Path) -> None:
    skip_without("onnx")
    fxprune.export(small, tmp_path / "slim.onnx", dynamic={0: "images"})
    graph = importlib.import_module("onnx").load(tmp_path / "slim.onnx").graph
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"images"}
    done = fxprune.export(small, tmp_path / "slim.int8.onnx")
    assert done.difference is not None and 1e-6 < done.difference < 0.1


@pytest.mark.export
def test_keyword_inputs_integers_and_a_fixed_batch(tmp_path: Path) -> None:
    skip_without("onnx")

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 5)

        def forward(self, words: Tensor, weights: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.mix((self.table(words) * weights[..., None]).sum(1))))
            return logits

    given = {"words": torch.randint(0, 30, (2, 6)), "weights": torch.rand(2, 6)}
    slim = fxprune.compress(Words().eval(), 0.5, given)
    for suffix in ("pt2", "onnx"):
        done = fxprune.export(slim, tmp_path / f"slim.{suffix}", example_inputs=given)
        assert done.difference is not None and done.difference < 1e-5
    fxprune.export(slim, tmp_path / "fixed.pt2", dynamic={})
    with pytest.raises((RuntimeError, AssertionError)):
        torch.export.load(tmp_path / "fixed.pt2").module()(words=given["words"][:1], weights=given["weights"][:1])


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    slim = slimmed(Branches(), torch.randn(2, 3, 16, 16)).train()
    before = {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    fxprune.export(slim, tmp_path / "slim.pt2")
    assert slim.training and slim.get_parameter("head.weight").requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())


# -- what is refused ------------------------------------------------------------------------------------------------------------


def test_formats_by_name_and_suffix() -> None:
    assert [format_named(None, Path(f"a.b{one.suffix}")) for one in FORMATS.values()] == list(FORMATS)
    with pytest.raises(InputError, match=r"unknown export format 'tflite'; there are torch \(.pt2\), onnx"):
        format_named("tflite")
    with pytest.raises(InputError, match="the name of slim.bin says no export format"):
        format_named(None, Path("slim.bin"))


def test_a_missing_package_is_named_with_its_extra(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    export = fxprune.export
    monkeypatch.setattr(importlib, "import_module", absent)
    for name in EVERY[1:]:
        with pytest.raises(DependencyError, match=rf"export to {name} needs \w+: pip install 'fxprune\[{FORMATS[name].extra}\]'") as caught:
            export(small, tmp_path / "slim", name)
        assert "\n" not in str(caught.value)
    assert not installed(["surely_not_there"])


def test_rounding_of_outputs_that_are_nearly_zero_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 3)
    nn.init.constant_(head.bias, -15.0)
    slim = fxprune.compress(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head, nn.Sigmoid()).eval(), 0.25, torch.randn(2, 6))
    right = FORMATS["torch"].run
    for off, message in ((1.2e-7, None), (1e-5, "they differ by 2.0e-02 of the largest magnitude")):
        shifted = runtimes.Format(".pt2", FORMATS["torch"].write, lambda *a, off=off: [t + off for t in right(*a)])
        monkeypatch.setitem(FORMATS, "torch", shifted)
        if message is None:
            assert 1e-4 < (fxprune.export(slim, tmp_path / "near.pt2").difference or 0) < 1e-3
        else:
            with pytest.raises(VerificationError, match=message):
                fxprune.export(slim, tmp_path / "far.pt2")


def test_a_file_that_computes_something_else_is_not_kept(small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slim.pt2"
    path.write_bytes(b"older")
    right = FORMATS["torch"].run
    for wrong, message in (
        (lambda *a: [t * 1.01 for t in right(*a)], "the torch file gives other outputs than eager PyTorch: they differ by 1.0e-02 of"),
        (lambda *a: [t * float("nan") for t in right(*a)], "they differ by nan"),
        (lambda *a: right(*a)[:1], "outputs of shape 3x10, eager PyTorch 3x10, 3x8"),
    ):
        monkeypatch.setitem(FORMATS, "torch", runtimes.Format(".pt2", FORMATS["torch"].write, wrong))
        with pytest.raises(VerificationError, match=message):
            fxprune.export(small, path)
    assert path.read_bytes() == b"older" and [p.name for p in tmp_path.iterdir()] == ["slim.pt2"]
    assert fxprune.export(small, path, verify=False).difference is None


def test_what_an_exporter_raises_comes_in_one_line(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.mix(x.reshape(2, 4))
            return y

    with pytest.raises(ExportError, match="cannot export to torch: ") as caught:
        fxprune.export(Fixed(), tmp_path / "slim.pt2", example_inputs=torch.randn(2, 4))
    assert "\n" not in str(caught.value)


def test_a_wrapped_module_is_exported(small: nn.Module, tmp_path: Path) -> None:
    assert fxprune.export(nn.DataParallel(small), tmp_path / "a.pt2", verify=False).path.exists()


def test_arguments_that_mean_nothing_are_refused(small: nn.Module, tmp_path: Path) -> None:
    for options, message in (
        ({"dynamic": {7: "batch"}}, "dynamic names axis 7, which no input has; the inputs have axes 0 to 3"),
        ({"dynamic": {-1: "width"}}, "dynamic names axis -1"),
        ({"dynamic": "batch"}, "dynamic is 'batch'; it must be a mapping from axes to names"),
        ({"dynamic": {0: 1}}, "dynamic is a dict; it must be"),
        ({"format": torch.randn(1, 3, 16, 16)}, "format is a Tensor; it must be a name"),
    ):
        with pytest.raises(InputError, match=message):
            fxprune.export(small, tmp_path / "a.pt2", **options)


def test_what_cannot_be_exported(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="example_inputs are missing"):
        fxprune.export(nn.Linear(3, 3), tmp_path / "a.pt2")
    with pytest.raises(InputError, match="lies on the meta device"):
        fxprune.export(nn.Linear(3, 3, device="meta"), tmp_path / "a.pt2", example_inputs=torch.randn(2, 3))
    with pytest.raises(FileError, match="there is no folder"):
        fxprune.export(small, tmp_path / "absent" / "a.pt2")
    if importlib.util.find_spec("torchao"):
        with pytest.raises(InputError, match="torch-int8 needs calibration data"):
            fxprune.export(small, tmp_path / "a.int8.pt2")
    assert exporting._relative(torch.zeros(0), torch.zeros(0)) == 0.0
