"""Residual branches left out: what is found, what goes, and that the original with them at zero computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import compression
from fxprune.errors import UnsupportedError, VerificationError
from fxprune.passes.rewriting.blocks import without_blocks
from tests.passes.helpers import TOLERANCE, gap, leaves, prime, zeroed


class Basic(nn.Module):
    """The block of a ResNet, adding in place as torchvision's does."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        found: Tensor = self.relu(out)
        return found

    def silence(self) -> None:
        nn.init.zeros_(self.bn2.weight)
        nn.init.zeros_(self.bn2.bias)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.layers = nn.ModuleList([Basic(12, 16), Basic(12, 10), Basic(12, 8)])
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Layer(nn.Module):
    """A transformer layer, its norms in front."""

    def __init__(self, width: int = 16, wide: int = 24, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        found: Tensor = self.drop(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        found: Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return found

    def silence(self) -> None:
        for last in (self.out, self.mlp[2]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(self.norm(x)).mean(1)
        return found


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"resnet": (ResNet, (2, 3, 8, 8)), "encoder": (Encoder, (2, 7, 6))}


def network(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(shape)
    prime(model, (x,))
    return model, x


def test_the_blocks_of_a_resnet_and_of_a_transformer() -> None:
    model, x = network("resnet")
    blocks = fxprune.analyze(model, x, blocks=True).blocks
    assert [(b.name, b.removable, b.params) for b in blocks] == [
        (f"layers.{i}", True, sum(p.numel() for p in layer.parameters())) for i, layer in enumerate(model.layers)
    ]
    assert blocks[0].macs == 2 * 2 * 64 * 9 * 12 * 16
    assert fxprune.analyze(model, x).blocks == ()
    model, x = network("encoder")
    blocks = fxprune.analyze(model, x, blocks=True).blocks
    assert [b.name for b in blocks] == [f"layers.{i}{half}" for i in range(3) for half in (".qkv", ".mlp", "")]
    assert blocks[0].params + blocks[1].params == blocks[2].params == sum(p.numel() for p in model.layers[0].parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("gone", [["layers.1"], ["layers.0", "layers.2"], ["layers.0", "layers.1", "layers.2"]])
def test_the_original_with_its_branches_at_zero_computes_the_same(name: str, gone: list[str], tmp_path: Path) -> None:
    model, x = network(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = fxprune.analyze(model, x, blocks=True)
    slim = fxprune.compress(graph, dict.fromkeys(gone, 1.0), x, verify=True)
    reference = copy.deepcopy(model)
    for path in gone:
        reference.get_submodule(path).silence()
    rec = fxprune.record(slim)
    assert rec.blocks == dict.fromkeys(gone, "removed") and rec.kept == {}
    assert not any(n.startswith(tuple(f"{path}." for path in gone)) for n, _ in slim.named_parameters())
    left = {n for n in before if not n.startswith(tuple(f"{path}." for path in gone))}
    assert set(slim.state_dict()) == left and all(torch.equal(before[n], slim.state_dict()[n]) for n in left)
    for mode in (False, True) if name == "resnet" else (False,):  # a branch that is gone draws no random numbers for its dropout
        for inputs in (x, torch.cat([x, x[:1]])):
            mine, theirs = copy.deepcopy(slim).train(mode), copy.deepcopy(reference).train(mode)
            with torch.no_grad():
                assert gap(theirs(inputs), mine(inputs)) < TOLERANCE
    slim.eval()
    fxprune.save(slim, tmp_path / "slim.safetensors")
    again = fxprune.load(tmp_path / "slim.safetensors", NETWORKS[name][0]()).eval()
    with torch.no_grad():
        for twin in (again, copy.deepcopy(slim), fxprune.compress(model, rec.policy)):
            assert torch.equal(twin.eval()(x), slim(x))
    assert fxprune.record(again).blocks == rec.blocks
    assert rec.after.params == sum(p.numel() for p in slim.parameters()) and rec.after.macs < rec.before.macs
    slim.train()
    torch.stack([t.sum() for t in leaves(slim(x))]).sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "num_batches" not in n)


def test_blocks_and_widths_go_together() -> None:
    model, x = network("resnet")
    graph = fxprune.analyze(model, x, blocks=True)
    widths = {g.name: 0.5 for g in graph.groups if g.prunable}
    slim = fxprune.compress(graph, {**widths, "layers.1": 1}, x, verify=True).eval()
    rec = fxprune.record(slim)
    reference = copy.deepcopy(model)
    reference.layers[1].silence()
    reference = zeroed(reference, rec.kept)
    with torch.no_grad():
        assert gap(reference.eval()(x), slim(x)) < TOLERANCE
    assert rec.blocks == {"layers.1": "removed"} and slim.get_parameter("stem.weight").shape[0] == 6
    assert rec.policy.sparsity["layers.1"] == 1.0
    with torch.no_grad():
        assert torch.equal(fxprune.compress(model, rec.policy, x).eval()(x), slim(x))


def test_a_half_and_a_layer_named_both_and_a_block_kept() -> None:
    model, x = network("encoder")
    slim = fxprune.compress(model, {"layers.1.mlp": 1, "layers.1": 1, "layers.0": 0}, x, verify=True)
    assert {n.split(".")[1] for n, _ in slim.named_parameters() if n.startswith("layers.")} == {"0", "2"}
    half = fxprune.compress(model, {"layers.1.mlp": 1}, x, verify=True)
    names = {n for n, _ in half.named_parameters()}
    assert "layers.1.qkv.weight" in names and "layers.1.mlp.0.weight" not in names and "layers.1.norm2.weight" not in names


class Tapped(nn.Module):
    """What a branch computes is read elsewhere; a branch writes into its input; one is scaled by a table that others read too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b, self.c = kind, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if self.kind == "tap":
            inner = torch.relu(self.b(x))
            return self.c(x + inner), inner.mean()
        if self.kind == "write":
            return self.c(x + self.b(x.relu_()))
        table = torch.arange(x.shape[1], dtype=x.dtype)
        return self.c(x + self.b(x) * table) * table.sum()


def test_why_a_branch_cannot_go() -> None:
    x = torch.randn(4, 6)
    found = {kind: fxprune.analyze(Tapped(kind).eval(), x, blocks=True).blocks[0] for kind in ("tap", "write", "table")}
    assert not found["tap"].removable and "read outside it as well" in found["tap"].reason and "test_blocks.py" in found["tap"].reason
    assert not found["write"].removable and "writes into its input" in found["write"].reason
    assert found["table"].removable
    graph = fxprune.analyze(model := Tapped("table").eval(), x, blocks=True)
    slim = fxprune.compress(graph, {found["table"].name: 1.0}, x, verify=True)
    with torch.no_grad():
        table = torch.arange(6.0)
        assert torch.allclose(slim(x), model.c(model.a(x)) * table.sum(), atol=1e-5)
    tap = fxprune.analyze(Tapped("tap").eval(), x, blocks=True)
    with pytest.raises(UnsupportedError, match="cannot be left out: what it computes is read outside"):
        fxprune.compress(tap, {tap.blocks[0].name: 1.0}, x)


def test_the_oracle_of_blocks_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("resnet")
    graph = fxprune.analyze(model, x, blocks=True)
    made = without_blocks
    monkeypatch.setattr(compression, "without_blocks", lambda graph, blocks: made(graph, list(graph.blocks[:1])))
    with pytest.raises(VerificationError, match=r"without 'layers.1' the network differs"):
        fxprune.compress(graph, {"layers.1": 1}, x, verify=True)


class Post(nn.Module):
    """A block that does something behind its addition."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(8, 8, 3, padding=1), after

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.after(x + self.conv(x))
        return found


class Listed(nn.Module):
    """A loop over a list of blocks, behind a ReLU or not; ``late`` writes into what they give."""

    def __init__(self, *blocks: nn.Module, relu: bool = True, late: bool = False) -> None:
        super().__init__()
        self.stem, self.relu, self.late = nn.Conv2d(3, 8, 3, padding=1), relu, late
        self.layers, self.head = nn.ModuleList(blocks), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.relu() if self.relu else x
        for layer in self.layers:
            before, x = x, layer(x)
            if self.late:
                x.add_(1.0)
                x = x + before
        found: Tensor = self.head(x)
        return found


IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("after", [nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_kept_class_has_an_identity_where_a_block_was(after: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Listed(Post(after), Post(after), Post(after)).eval()
    before = copy.deepcopy(model.state_dict())
    graph = fxprune.analyze(model, IMAGES, blocks=True)
    names = [block.name for block in graph.blocks]
    policy = {**dict.fromkeys(names[:2], 1.0), "stem": 0.25}
    slim: Any = fxprune.compress(model, policy, IMAGES, keep_class=True, verify=True)
    assert type(slim) is Listed and isinstance(model.get_submodule("layers.0"), Post)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    same = fxprune.compress(model, policy, IMAGES)
    assert gap(slim.eval()(IMAGES), same.eval()(IMAGES)) < TOLERANCE
    assert set(slim.state_dict()) == set(same.state_dict())
    assert fxprune.record(slim).blocks == dict.fromkeys(names[:2], "removed")
    fxprune.save(slim, tmp_path / "slim.safetensors")
    again: Any = fxprune.load(tmp_path / "slim.safetensors", copy.deepcopy(model)).eval()
    assert type(again) is Listed and torch.equal(again(IMAGES), slim(IMAGES))


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_the_class_of_a_network_of_torchvision_stays_without_its_blocks(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    model, x = models.get_model(name, weights=None).eval(), torch.randn(1, 3, 64, 64)
    prime(model, (x,))
    slim: Any = fxprune.compress(model, {"layer1.1": 1, "layer4.1": 1, "layer2": 0.25}, x, keep_class=True)
    assert type(slim) is type(model) and isinstance(slim.layer1[1], nn.Identity)
    assert gap(slim(x), fxprune.compress(model, {"layer1.1": 1, "layer4.1": 1, "layer2": 0.25}, x).eval()(x)) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Listed(Post(nn.ReLU()), relu=False), "beside its branches it computes something"),
        (Listed(Post(nn.GELU())), "beside its branches it computes something"),
        (Listed(Post(nn.Dropout())), "beside its branches it computes something"),
        (Listed(Post(nn.Identity()), late=True), "what it gives is written into later"),
        (Listed(*[Post(nn.Identity())] * 2), "cannot"),
    ],
)
def test_a_class_that_cannot_stay_says_why(model: nn.Module, message: str) -> None:
    graph = fxprune.analyze(model.eval(), IMAGES, blocks=True)
    with pytest.raises(UnsupportedError, match=message) as caught:
        fxprune.compress(graph, {graph.blocks[0].name: 1.0}, IMAGES, keep_class=True)
    assert "\n" not in str(caught.value)


class Layers(nn.Module):
    """Transformer layers in a list, or in torch's own encoder, which calls them with masks."""

    def __init__(self, encoder: bool) -> None:
        super().__init__()
        made = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(made, 2, enable_nested_tensor=False) if encoder else None
        self.layers = nn.ModuleList([] if encoder else [made, copy.deepcopy(made)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(x if self.encoder is None else self.encoder(x))
        return found


def test_layers_of_a_transformer_are_left_out_of_its_class_whole_or_not_at_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    model = Layers(encoder=False).eval()
    slim: Any = fxprune.compress(model, {"layers.1": 1, "layers.0.linear1": 0.5}, x, keep_class=True)
    assert type(slim) is Layers and isinstance(slim.layers[1], nn.Identity)
    assert gap(slim(x), fxprune.compress(model, {"layers.1": 1, "layers.0.linear1": 0.5}, x).eval()(x)) < TOLERANCE
    half = next(block for block in fxprune.analyze(model, x, blocks=True).blocks if block.name.startswith("layers.1."))
    with pytest.raises(UnsupportedError, match="beside its branches it computes something"):
        fxprune.compress(model, {half.name: 1}, x, keep_class=True)
    with pytest.raises(UnsupportedError, match=r"does not run with nn.Identity for 'encoder.layers.1'") as caught:
        fxprune.compress(Layers(encoder=True).eval(), {"encoder.layers.1": 1}, x, keep_class=True)
    assert "\n" not in str(caught.value)
