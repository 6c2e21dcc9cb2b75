"""What a path of the user's names, and packages that only some features need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune.errors import DependencyError, InputError, SearchError
from fxprune.imports import by_path, needed


def test_both_forms_of_a_path() -> None:
    assert by_path("torch.optim:AdamW", "optimizer") is torch.optim.AdamW
    assert by_path("torch.optim.AdamW", "optimizer") is torch.optim.AdamW
    assert by_path("torch:nn.Linear", "layer") is torch.nn.Linear


def test_the_working_directory_is_looked_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_users.py").write_text("answer = 42\nraise_at = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert by_path("mine_of_users:answer", "number") == 42


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.optim:Adagard", r"reward 'torch.optim:Adagard': 'torch.optim' has no 'Adagard'; did you mean Adagrad"),
        ("nowhere_at_all:f", r"cannot import 'nowhere_at_all': No module named 'nowhere_at_all'; run from the folder that holds it"),
        ("word", "not of the form package.module:name"),
        ("torch:", "not of the form package.module:name"),
        (":f", "not of the form package.module:name"),
    ],
)
def test_what_is_wrong_with_a_path(path: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        by_path(path, "reward", SearchError)
    with pytest.raises(InputError, match=message):
        by_path(path, "reward")


def test_a_module_that_fails_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent_of_users.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot import 'silent_of_users': RuntimeError"):
        by_path("silent_of_users:f", "model")


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DependencyError, match=r"^--config needs PyYAML: pip install 'fxprune\[search\]'$"):
        monkeypatch.setitem(sys.modules, "yaml", None)
        needed("yaml", "--config", "search")
    (tmp_path / "halfway_there.py").write_text("import absent_below\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=r"needs halfway_there: .* \(No module named 'absent_below'\)"):
        needed("halfway_there", "this", "search")


WITHOUT = """if True:
    import sys
    sys.modules.update(dict.fromkeys({blocked!r}))  # None there: as if it were not installed
    import torch, fxprune
    from torch import nn
    from fxprune.errors import DependencyError
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 3, 8, 8)
    slim = fxprune.compress(net, 0.5, x, verify=True)
    fxprune.save(slim, {file!r}); fxprune.load({file!r}, net)
    print(fxprune.profile(slim, x).macs < fxprune.profile(net, x).macs, end=" ")
    from fxprune.data import load_data
    from fxprune.models import load_model
    for call in (lambda: load_model("torchvision:resnet18"), lambda: load_data("torchvision:CIFAR10:."), lambda: load_data("digits")):
        try:
            call()
        except DependencyError as error:
            print(error)
"""


def test_the_core_does_without_what_is_an_extra(tmp_path: Path) -> None:
    blocked = ["torchvision", "scipy", "sklearn", "PIL", "yaml", "pyarrow", "plotly", "accelerate", "timm", "optuna", "ray"]
    code = WITHOUT.format(blocked=blocked, file=str(tmp_path / "slim.safetensors"))
    root = Path(fxprune.__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True model 'torchvision:resnet18' needs torchvision: pip install 'fxprune[vision]'",
        "data 'torchvision:CIFAR10' needs torchvision: pip install 'fxprune[vision]'",
        "data 'digits' needs scikit-learn: pip install 'fxprune[search]'",
    ]


STARTED = """if True:
    import contextlib, io, sys, time
    began = time.process_time()
    import torch
    alone = time.process_time() - began
    {code}
    print((time.process_time() - began) / alone, *sorted(name for name in ("networkx", "triton", "torch._dynamo") if name in sys.modules))
"""
COMMAND = """from fxprune.cli import main
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(["--help"])
    assert said.getvalue().startswith("usage: fxprune-search")"""
ENOUGH, TRIES = 1.5, 6  # times what torch takes, in one process; another load on the machine can fall on either part


@pytest.mark.parametrize("code", ["import fxprune", COMMAND], ids=["package", "command"])
def test_starting_takes_at_most_half_as_long_again_as_torch(code: str) -> None:
    root, least = Path(fxprune.__file__).parents[1], float("inf")
    for _ in range(TRIES):
        done = subprocess.run([sys.executable, "-c", STARTED.format(code=code)], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ratio, *loaded = done.stdout.split()
        assert not loaded  # what takes long and few need
        least = min(least, float(ratio))
        if least <= ENOUGH:
            return
    pytest.fail(f"{least:.2f} times as long as importing torch")
