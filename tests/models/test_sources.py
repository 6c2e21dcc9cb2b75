"""Networks by spec, and weight files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxprune.errors import DependencyError, FileError, InputError
from fxprune.models.loading import load_model, load_weights
from fxprune.models.small import digits_net


def last_linear(model: nn.Module) -> nn.Linear:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


@pytest.mark.parametrize(
    ("spec", "classes"),
    [
        ("torchvision:squeezenet1_1", 1000),
        ("torchvision:shufflenet_v2_x0_5", 7),
        ("torchvision:googlenet", 5),
        ("timm:resnet10t", 3),
        ("fxprune.models:digits_net", 4),
        ("fxprune.models:resnet20", 10),
    ],
)
def test_a_spec_gives_a_module_with_that_many_classes(spec: str, classes: int) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    model = load_model(spec, num_classes=classes)
    if spec != "torchvision:squeezenet1_1":
        assert last_linear(model).out_features == classes


def test_the_builders_own_number_of_classes_is_the_default() -> None:
    assert last_linear(load_model("torchvision:shufflenet_v2_x0_5")).out_features == 1000


FACTORIES = """
from torch import nn

def fixed():
    return nn.Linear(4, 2)

instance = nn.Linear(3, 2)

def number():
    return 3

def failing(num_classes):
    raise RuntimeError("first line\\nsecond line")

constant = 4
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_model.py").write_text(FACTORIES)
    (tmp_path / "users_broken.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_model", raising=False)
    return "users_model"


def test_a_factory_of_the_working_directory_without_num_classes(users_module: str) -> None:
    assert isinstance(load_model(f"{users_module}:fixed", num_classes=9), nn.Linear)
    assert isinstance(load_model(f"{users_module}:instance"), nn.Linear)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("users_model:number", "gave an int; it must give a torch.nn.Module"),
        ("users_model:failing", "calling it failed: RuntimeError: first line$"),
        ("users_model:constant", "is an int; it must be a function or class"),
        ("users_model:fixd", "has no 'fixd'; did you mean fixed"),
        ("users_broken:f", "cannot import 'users_broken'"),
        ("users_absent:f", "cannot import 'users_absent'"),
        ("torchvision:resnet81", "unknown torchvision model 'resnet81'; did you mean resnet18"),
        ("resnet18", "not of the form torchvision:NAME"),
        ("torchvision:", "not of the form torchvision:NAME"),
    ],
)
def test_models_that_cannot_be_had(users_module: str, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(spec, num_classes=2)
    assert "\n" not in str(caught.value)


def test_an_unknown_timm_model_suggests_a_near_one() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(InputError, match="unknown timm model 'resnet_50'; did you mean"):
        load_model("timm:resnet_50")


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DependencyError, match=r"pip install 'fxprune\[timm\]'"):
        load_model("timm:resnet10t")


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return digits_net().state_dict()


@pytest.mark.parametrize("form", ["safetensors", "pt", "wrapped", "parallel", "uncounted"])
def test_weights_are_loaded_from_every_usual_form(tmp_path: Path, form: str) -> None:
    values = state()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(values, path)
    elif form == "pt":
        torch.save(values, path)
    elif form == "wrapped":
        torch.save({"state_dict": values, "epoch": 3}, path)
    elif form == "parallel":
        torch.save({f"module.{k}": v for k, v in values.items()}, path)
    else:
        torch.save({k: v for k, v in values.items() if "num_batches" not in k}, path)
    model = digits_net()
    load_weights(model, path)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


class Sneaky:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return print, ("executed",)


def test_weights_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Sneaky()}, tmp_path / "pickle.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save(state(), tmp_path / "whole.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    save_file({k: v for k, v in state().items() if k != "classifier.bias"}, tmp_path / "missing.safetensors")
    save_file({**state(), "extra.weight": torch.ones(1)}, tmp_path / "extra.safetensors")
    save_file({**state(), "classifier.weight": torch.ones(3, 48), "classifier.bias": torch.ones(3)}, tmp_path / "shape.safetensors")
    cases = {
        "pickle.pt": "hold more than tensors",
        "list.pt": "not a state_dict",
        "short.pt": "not a whole PyTorch file",
        "text.pt": "more than tensors|not a whole",
        "short.safetensors": "not a whole safetensors file",
        "missing.safetensors": "do not fit the model: missing classifier.bias",
        "extra.safetensors": "do not fit the model: unknown extra.weight",
        "shape.safetensors": "classifier.weight is 3x48 in the file, 10x48 in the model; if only the classifier",
        "absent.safetensors": "cannot read the weights .*No such file",
        "absent.pt": "cannot read the weights .*No such file",
    }
    model = digits_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name, message in cases.items():
        with pytest.raises(FileError, match=message) as caught:
            load_weights(model, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "executed" not in capsys.readouterr().out


def test_load_model_takes_weights(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    model = load_model("fxprune.models:digits_net", weights=tmp_path / "w.safetensors")
    assert torch.equal(model.state_dict()["classifier.bias"], state()["classifier.bias"])
