"""Saving and loading slim modules: bit-equal from a fresh original, and one line for every file that does not fit."""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fxprune import atomic
from fxprune.api import compress, record
from fxprune.errors import FileError
from fxprune.files.slim_file import load, rebuild, save
from fxprune.models.small import digits_net, resnet20

IMAGE = torch.zeros(2, 3, 16, 16)
SAVED = Path(__file__).parent / "saved"


class Net(nn.Module):
    """Tied weights, a parameter nobody reads, a non-persistent buffer, an index buffer and a plain tensor attribute."""

    scale: Tensor
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.right.weight = self.left.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.linspace(0.5, 2, 8).view(1, 8, 1, 1), persistent=False)
        self.register_buffer("order", torch.arange(8))
        self.plain = torch.tensor(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.left(x) + self.right(x)
        x = x * self.scale + self.plain
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def slimmed(model: nn.Module, example: Tensor = IMAGE, sparsity: float = 0.5) -> Any:
    torch.manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1)
    return compress(model, sparsity, example)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("fresh", [Net, lambda: on_meta(Net)], ids=["cpu", "meta"])
def test_a_loaded_module_is_the_saved_one(tmp_path: Path, fresh: Callable[[], nn.Module]) -> None:
    slim = slimmed(Net()).eval()
    save(slim, tmp_path / "slim.safetensors")
    back = load(tmp_path / "slim.safetensors", fresh()).eval()
    x = torch.randn(3, 3, 20, 20)
    assert torch.equal(back(x), slim(x))
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in slim.named_parameters()}
    assert back.get_parameter("right.weight") is back.get_parameter("left.weight")
    assert torch.equal(back.get_buffer("scale"), slim.scale) and "scale" not in back.state_dict()
    mine, theirs = record(back), record(slim)
    assert mine.policy == theirs.policy and mine.before == theirs.before and mine.after == theirs.after
    assert {n: {d: i.tolist() for d, i in dims.items()} for n, dims in mine.kept.items()} == {
        n: {d: i.tolist() for d, i in dims.items()} for n, dims in theirs.kept.items()
    }


def test_the_original_is_left_alone_and_lends_modes_and_flags(tmp_path: Path) -> None:
    save(slimmed(Net()), tmp_path / "s.safetensors")
    model = Net().eval()
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    back = load(tmp_path / "s.safetensors", model)
    assert not back.training and not back.get_parameter("stem.weight").requires_grad and back.get_parameter("stem.bias").requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_trained_half_precision_and_channels_last_weights_come_back(tmp_path: Path) -> None:
    slim = slimmed(Net()).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        slim.get_parameter("head.bias").fill_(3)
    save(slim, tmp_path / "s.safetensors")
    back = load(tmp_path / "s.safetensors", Net())
    assert back.get_parameter("head.bias").tolist() == [3.0] * 5
    weight = back.get_parameter("stem.weight")
    assert weight.dtype == torch.bfloat16 and weight.stride() == slim.get_parameter("stem.weight").stride()
    assert back.order.dtype == torch.int64


def test_a_module_pruned_twice_loads_from_the_outermost_original(tmp_path: Path) -> None:
    once = slimmed(resnet20(), torch.zeros(2, 3, 32, 32), 0.3)
    twice = compress(once, 0.4, torch.zeros(2, 3, 32, 32)).eval()
    save(twice, tmp_path / "s.safetensors")
    back = load(tmp_path / "s.safetensors", on_meta(resnet20)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(back(x), twice(x))


def test_a_loaded_module_saves_again(tmp_path: Path) -> None:
    save(slimmed(Net()), tmp_path / "a.safetensors")
    save(load(tmp_path / "a.safetensors", Net()), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_file_reads_as_a_state_dict(tmp_path: Path) -> None:
    slim = slimmed(digits_net(), torch.zeros(2, 1, 8, 8))
    save(slim, tmp_path / "s.safetensors")
    other = copy.deepcopy(slim)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(load_file(tmp_path / "s.safetensors"))
    assert all(torch.equal(v, slim.state_dict()[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("fresh", [Net, lambda: on_meta(Net)], ids=["cpu", "meta"])
def test_a_file_that_another_torch_wrote(fresh: Callable[[], nn.Module]) -> None:
    """Made by torch 2.6 and kept: what is in a file, and what is understood by it, may not change."""
    back = load(SAVED / "torch-2.6.safetensors", fresh()).eval()
    found = back(torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6))
    torch.testing.assert_close(found, torch.tensor(json.loads((SAVED / "torch-2.6.json").read_text())))
    assert back.get_parameter("stem.weight").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fresh", [Net, lambda: on_meta(Net)], ids=["cpu", "meta"])
def test_a_plain_state_dict_loads_into_the_rebuilt_module(tmp_path: Path, fresh: Callable[[], nn.Module]) -> None:
    slim = slimmed(Net()).to(memory_format=torch.channels_last).eval()
    save(slim, tmp_path / "s.safetensors")
    blank = rebuild(fresh(), tmp_path / "s.safetensors").eval()
    assert all(p.is_meta and p.shape == slim.get_parameter(n).shape for n, p in blank.named_parameters())
    assert blank.get_parameter("stem.weight").stride() == slim.get_parameter("stem.weight").stride()
    assert torch.equal(blank.get_buffer("scale"), slim.scale) and record(blank).policy == record(slim).policy
    x = torch.randn(3, 3, 20, 20)
    for module, given in ((copy.deepcopy(blank), slim.state_dict()), (blank, load_file(tmp_path / "s.safetensors"))):
        done = module.load_state_dict(given, assign=True)
        assert not done.missing_keys and not done.unexpected_keys
        assert module.get_parameter("right.weight") is module.get_parameter("left.weight")
        assert torch.allclose(module(x), slim(x), atol=1e-6)
    del given["head.bias"]
    with pytest.raises(RuntimeError, match='Missing key.*"head.bias"'):
        blank.load_state_dict(given, assign=True)
    with pytest.raises(FileError, match="another model: this one has 6 parameters in 'extra'"):
        rebuild(Longer(), tmp_path / "s.safetensors")


def test_what_a_killed_write_leaves_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(tensors: object, path: Path, metadata: object) -> None:
        assert path.parent.parent == tmp_path  # and with it the temporary file that safetensors makes beside it
        (path.parent / ".tmpXyZ").touch()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "save_file", killed)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # SIGKILL leaves no time for it
        with pytest.raises(Killed):
            save(slimmed(Net()), tmp_path / "s.safetensors")
    assert len(list(tmp_path.rglob(".tmp*"))) == 1
    save(slimmed(Net()), tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.rglob("*")] == ["s.safetensors"]


class Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.skipif(os.name != "posix", reason="only POSIX has a umask")
def test_the_umask_says_who_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(slimmed(Net()), tmp_path / "s.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s.safetensors").stat().st_mode) == 0o640


class Looping(nn.Module):
    """Traceable parts in a root that looks at its data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        while bool(x.abs().sum() < 100):
            x = x + 1
        y: Tensor = self.body(x)
        return y


def test_a_partly_traced_module_loads_from_an_original_with_or_without_values(tmp_path: Path) -> None:
    slim = slimmed(Looping(), torch.ones(1, 3, 8, 8)).eval()
    save(slim, tmp_path / "s.safetensors")
    x = torch.randn(2, 3, 8, 8)
    for original in (Looping(), on_meta(Looping)):  # the file says what the parts are called with
        back = load(tmp_path / "s.safetensors", original).eval()
        assert back.get_submodule("body.0").get_parameter("weight").shape[0] == 4
        assert torch.equal(back(x), slim(x))


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the metadata of a file, with everything else as it was."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    described = json.loads(header["__metadata__"]["fxprune"])
    edit(described)
    header["__metadata__"]["fxprune"] = json.dumps(described)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


class Transposed(Net):
    """The same numbers of parameters in every layer, but other dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.unused = nn.Parameter(torch.ones(1, 3))


class Rewired(Net):
    """The same layers, otherwise connected: nothing is added to the left branch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.left(torch.relu(self.norm(self.stem(x)))).relu()
        logits: Tensor = self.head((self.right(x) * self.scale).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wider, "another model: this one has 296 parameters in 'stem', the file's original 224"),
        (Longer, "another model: this one has 6 parameters in 'extra', the file's original none"),
        (lambda: nn.Linear(3, 5), "another model: this one has no layer '.*' with parameters"),
        (Transposed, "does not fit this model: 'unused' is 3 in the file and 1x3 in the model"),
        (Rewired, "does not fit this model: "),
    ],
)
def test_another_model_is_refused(tmp_path: Path, make: Callable[[], nn.Module], message: str) -> None:
    save(slimmed(Net()), tmp_path / "s.safetensors")
    with pytest.raises(FileError, match=message) as caught:
        load(tmp_path / "s.safetensors", make())
    assert "\n" not in str(caught.value) and "s.safetensors" in str(caught.value)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def header_alone(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path)


def old_pickle(path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def weights_alone(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)


def other_format(path: Path) -> None:
    edited(path, lambda d: d.update(format="fxprune-slim/9"))


def no_record(path: Path) -> None:
    edited(path, lambda d: d.pop("record"))


def no_aliases(path: Path) -> None:
    edited(path, lambda d: d.update(aliases={}))


def false_alias(path: Path) -> None:
    edited(path, lambda d: d["aliases"].update({"right.weight": "nowhere"}))


def other_indices(path: Path) -> None:
    edited(path, lambda d: d["record"]["lists"].__setitem__(0, "0-90"))


def uncoupled_indices(path: Path) -> None:
    edited(path, lambda d: d["record"]["kept"]["norm.bias"].pop("0"))


def renumbered_on_the_way(path: Path) -> None:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + size].replace(b'"head.bias"', b'"head.bios"')
    path.write_bytes(raw[:8] + header + raw[8 + size :])


def not_json(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path, {"fxprune": "{"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "no whole safetensors file"),
        (header_alone, "no whole safetensors file"),
        (emptied, "no whole safetensors file"),
        (pickled, "is a pickle, which can run code"),
        (old_pickle, "is a pickle, which can run code"),
        (weights_alone, "holds weights but no pruning record"),
        (other_format, "its format is 'fxprune-slim/9'; this fxprune reads 'fxprune-slim/1'"),
        (no_record, "its metadata have no 'record'"),
        (no_aliases, "'right.weight' is missing from the file"),
        (false_alias, "'right.weight' is an alias of 'nowhere'"),
        (other_indices, "does not fit this model: "),
        (uncoupled_indices, "dimension 0 of 'norm.bias' is coupled to other channels here"),
        (renumbered_on_the_way, "'head.bias' is missing from the file"),
        (not_json, "its metadata are damaged"),
        (Path.unlink, "No such file"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "s.safetensors"
    save(slimmed(Net()), path)
    damage(path)
    with pytest.raises(FileError, match=message) as caught:
        load(path, Net())
    assert "\n" not in str(caught.value)


def test_an_older_file_stays_when_saving_fails(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    slim = slimmed(Net())
    save(slim, path)
    before = path.read_bytes()
    with pytest.raises(FileError, match="lies on the meta device"):
        save(copy.deepcopy(slim).to("meta"), path)
    slim.get_submodule("stem").weight = nn.Parameter(slim.get_parameter("stem.weight").to_sparse())
    with pytest.raises(FileError, match="cannot save stem.weight: it is sparse"):
        save(slim, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="this Net: it carries no pruning record"):
        save(Net(), tmp_path / "s.safetensors")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="choose a folder that can be written"):
        save(slimmed(Net()), tmp_path / "file" / "s.safetensors")


def test_a_folder_is_made_and_wrappers_are_taken_off(tmp_path: Path) -> None:
    slim = slimmed(Net())
    save(nn.DataParallel(slim), tmp_path / "new" / "folder" / "s.safetensors")
    loaded = load(tmp_path / "new" / "folder" / "s.safetensors", nn.DataParallel(Net()))
    assert torch.equal(loaded(IMAGE), slim(IMAGE)) and record(loaded).kept.keys() == record(slim).kept.keys()


class InAPlainList(nn.Module):
    """A frozen network where ``parameters()`` does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 16), nn.Linear(4, 4)
        made = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).requires_grad_(False)
        self.hidden, self.table = [made], (torch.randn(8, 4), torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.hidden[0](self.first(x)) @ self.table[0].T @ self.table[1])
        assert isinstance(made, Tensor)
        return made


def test_layers_in_a_plain_list_are_pruned_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = InAPlainList().eval(), torch.randn(3, 10)
    slim = compress(model, 0.5, x, verify=True)
    assert not any(12 in value.shape for value in slim.state_dict().values())
    twice = compress(slim, 0.5, x)
    for one in (slim, twice):
        save(one, tmp_path / "slim.safetensors")
        torch.testing.assert_close(load(tmp_path / "slim.safetensors", InAPlainList().eval())(x), one(x))
