"""Files that somebody made to do harm, or that rot got at: whatever is in them, only an ``FxPruneError`` of one line comes out."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.api import compress
from fxprune.errors import FileError, FxPruneError
from fxprune.files.slim_file import load, rebuild, save


class Net(nn.Module):
    """A tie, an index table, and a tensor attribute."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.right.weight = self.left.weight
        self.register_buffer("order", torch.tensor([1, 0]))
        self.plain = torch.tensor(0.5)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        logits: Tensor = self.head((self.left(x) + self.right(x) * self.plain).mean((2, 3)))
        return logits[:, self.order]


def meta_net() -> nn.Module:
    with torch.device("meta"):
        return Net()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a file as it should be."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "s.safetensors"
    save(compress(Net().to(memory_format=torch.channels_last), 0.5, torch.randn(1, 3, 5, 5)), path)
    return path.read_bytes()


def parts(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header of a safetensors file, fxprune's own metadata in it, and the tensors' bytes."""
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["fxprune"]), raw[8 + size :]


def joined(header: dict[str, Any], described: Any, data: bytes) -> bytes:
    text = described if isinstance(described, str) else json.dumps(described)
    encoded = json.dumps({**header, "__metadata__": {**header["__metadata__"], "fxprune": text}}).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def refused(raw: bytes, folder: Path, message: str | None = None) -> None:
    path = folder / "s.safetensors"
    path.write_bytes(raw)
    roads: list[Callable[[], Any]] = [lambda: load(path, Net()), lambda: load(path, meta_net()), lambda: rebuild(Net(), path)]
    for road in roads:
        with pytest.raises(FileError, match=message) as caught:
            road()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert [one.name for one in folder.iterdir()] == ["s.safetensors"]


def put(*place: Any, value: Any) -> Callable[[Any], Any]:
    def edit(described: Any) -> Any:
        holder = described
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value
        return described

    return edit


def nested(described: Any) -> Any:
    described["record"]["steps"] = [{**copy.deepcopy(described["record"]), "steps": [copy.deepcopy(described["record"])]}]
    return described


KEPT = ("record", "kept", "stem.weight")
STRANGE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a JSON so deep that reading it ends the stack": (lambda d: "[" * 200_000, "metadata are damaged"),
    "not an object": (lambda d: [1], "its format is '"),
    "a format as long as a book": (put("format", value="x" * 10**6), "its format is 'x{40}'"),
    "a list of all numbers there are": (put("record", "lists", 0, value="0-99999999999"), "names more than"),
    "many lists that are long together": (put("record", "lists", value=[f"0-{2**23}"] * 3), "names more than"),
    "a number of more digits than Python reads": (put("record", "lists", 0, value="9" * 5000), "no ascending list"),
    "negative indices": (put("record", "lists", 0, value="-3"), "no ascending list"),
    "a list that is counted from the end": (put(*KEPT, "0", value=-1), "there is no list '-1'"),
    "a list by truth": (put(*KEPT, "0", value=True), "there is no list 'True'"),
    "a dimension that is counted from the end": (put(*KEPT, "-1", value=0), "'-1' is no dimension"),
    "a dimension that is not there": (put(*KEPT, "7", value=0), "dimension 7 of 'stem.weight' has no channels here"),
    "a name that climbs out of its folder": (
        put("record", "kept", "../../etc/passwd", value={"0": 0}),
        "'../../etc/passwd' has no channels",
    ),
    "an infinite number": (put("record", "before", "macs", value=float("inf")), "'inf' is no count"),
    "a negative number": (put("record", "before", "per_layer", "stem", "params", value=-162), "'-162' is no count"),
    "steps within steps": (nested, "a step has steps of its own"),
    "steps that are none": (put("record", "steps", value=7), "'steps' holds '7', no list"),
    "notes that are numbers": (put("record", "notes", value=[1]), "'notes' holds '1', no str"),
    "inputs nobody could make": (
        put("record", "policy", "inputs", value={"tensor": [2**62, 2**62], "dtype": "float32"}),
        "cannot be analysed on",
    ),
    "inputs of another rank": (put("record", "policy", "inputs", value={"tensor": [1], "dtype": "float32"}), "cannot be analysed on"),
    "no inputs": (put("record", "policy", "inputs", value=None), "recorded inputs are malformed"),
    "an attention nobody knows": (put("record", "policy", "options", value={"attention": "\x1b[2J\n"}), "attention is"),
    "aliases that are a list": (put("aliases", value=["right.weight"]), "'aliases' is no mapping"),
    "an alias of a list": (put("aliases", value={"right.weight": ["left.weight"]}), "'aliases' is no mapping"),
    "an alias of itself": (put("aliases", "right.weight", value="right.weight"), "'right.weight' is an alias of 'right.weight'"),
    "an alias in place of a tensor": (put("aliases", "left.bias", value="right.bias"), "'left.bias' is an alias and a tensor"),
    "a layout nobody knows": (put("layouts", "stem.weight", value="sideways"), "laid out as 'sideways'"),
    "a layout of another rank": (
        put("layouts", "head.weight", value="channels_last"),
        "shape 2x3 is said to be laid out as 'channels_last'",
    ),
    "layouts that are a number": (put("layouts", value=3), "'layouts' is no mapping"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_metadata_made_to_do_harm(case: str, whole: bytes, tmp_path: Path) -> None:
    edit, message = STRANGE[case]
    header, described, data = parts(whole)
    refused(joined(header, edit(described), data), tmp_path, message)


def test_tensors_of_another_kind(whole: bytes, tmp_path: Path) -> None:
    header, described, data = parts(whole)
    begin, end = header["stem.weight"]["data_offsets"]
    header["stem.weight"]["dtype"] = "I32"
    refused(joined(header, described, data), tmp_path, "'stem.weight' is torch.int32 in the file and torch.float32 in the model")
    header["stem.weight"]["dtype"] = "Z99"
    refused(joined(header, described, data), tmp_path, "no whole safetensors file")
    header["stem.weight"] = {"dtype": "F32", "shape": header["stem.weight"]["shape"], "data_offsets": [begin, end + 4]}
    refused(joined(header, described, data), tmp_path, "no whole safetensors file")


def test_a_name_that_is_there_twice(whole: bytes, tmp_path: Path) -> None:
    header, described, data = parts(whole)
    raw = joined(header, described, data)
    (size,) = struct.unpack("<Q", raw[:8])
    doubled = raw[8 : 8 + size].replace(b'{"', b'{"head.bias": ' + json.dumps(header["head.weight"]).encode() + b', "', 1)
    (tmp_path / "s.safetensors").write_bytes(struct.pack("<Q", len(doubled)) + doubled + data)
    assert load(tmp_path / "s.safetensors", Net()).get_parameter("head.bias").shape == (2,), "the last one counts"


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    refused(struct.pack("<Q", 2**63) + b"{}", tmp_path, "no whole safetensors file")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nest of lists and dicts."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["0-2", "stem.weight", "heads", "channels_last"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["0", "tensor", "dict"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def only_our_errors(raw: bytes, folder: Path) -> None:
    path = folder / "s.safetensors"
    path.write_bytes(raw)
    for make in (Net, meta_net):
        try:
            load(path, make())
        except FxPruneError as error:
            assert "\n" not in str(error) and len(str(error)) < 500


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_metadata(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    header, described, tensors = parts(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(described)))
        if not place:
            continue
        holder = described
        for key in place[:-1]:
            holder = holder[key]
        if data.draw(st.booleans()):
            del holder[place[-1]]
        else:
            holder[place[-1]] = data.draw(ANYTHING)
    only_our_errors(joined(header, described, tensors), tmp_path)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw))) if data.draw(st.booleans()) else len(raw)
    only_our_errors(bytes(raw[:cut]), tmp_path)
