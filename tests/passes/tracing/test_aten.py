"""Modules that are graphs already: fx's own, and those of torch.export with ATen operators."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import InputError, TraceError
from fxprune.passes.tracing import aten
from tests.passes.exporting import assert_exported_sound, exported
from tests.passes.helpers import call, gap, leaves, prime
from tests.passes.zoo.networks import ZOO

# Networks whose forward asks for a tensor's values, or returns a type that it does not know: torch.export refuses them.
NOT_EXPORTED = {
    *("unknown_operation", "registered_operation", "untraceable_child", "outputs_dataclass"),
    *("packed_lstm", "packed_gru", "vmap_over_gains", "single_values_read", "asserted", "parts_share"),
}
SOME = (
    "attention_einsum",
    "crop_channels",
    "instance_norm",
    "language_model",
    "scripted_function",
    "slice_in_place",
    "unfold_fold",
    "weight_norm_hook",
)


class Small(nn.Module):
    """Convolutions, a norm, dropout, a view with sizes of its own, and a named output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.norm(self.conv(x)))
        y = torch.relu(self.wide(y)).view(x.shape[0], 12, -1)
        return {"logits": self.head(self.drop(y.mean(-1)))}


def small(training: bool = False, **options: Any) -> tuple[Small, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(3, 3, 8, 8)
    prime(model, (x,))
    model.train(training)
    return model, exported(model, (x,), **options), x


DYNAMIC: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("batch", max=16)},)}


@pytest.mark.parametrize("decomposed", [False, True], ids=["training", "decomposed"])
@pytest.mark.parametrize("name", SOME)
def test_exported_networks_agree_with_the_oracle(name: str, decomposed: bool) -> None:
    _check(name, decomposed)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("decomposed", [False, True], ids=["training", "decomposed"])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in SOME and n not in NOT_EXPORTED])
def test_every_exported_network_agrees_with_the_oracle(name: str, decomposed: bool) -> None:
    _check(name, decomposed)


def _check(name: str, decomposed: bool) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].make().eval(), ZOO[name].inputs()
    prime(model, inputs)
    assert_exported_sound(exported(model, inputs, decomposed), inputs, 0.34)


@pytest.mark.parametrize(
    ("name", "decomposed"),
    [
        ("resnet18", False),
        ("mobilenet_v3_small", False),
        pytest.param("resnet18", True, marks=pytest.mark.long),
        pytest.param("mobilenet_v3_small", True, marks=pytest.mark.long),
    ],
)
def test_torchvision_through_export_is_what_it_is_without(name: str, decomposed: bool) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, x = getattr(models, name)(num_classes=10), torch.randn(2, 3, 64, 64)
    prime(model, (x,))
    module = exported(model, (x,), decomposed, **DYNAMIC)
    mine, theirs = fxprune.analyze(module, x), fxprune.analyze(model, x)
    assert [(g.name, g.size, g.prunable) for g in mine.groups] == [(g.name, g.size, g.prunable) for g in theirs.groups]
    slim = fxprune.compress(mine, 0.5, x, verify=True).eval()
    with torch.no_grad():
        assert gap(fxprune.compress(theirs, 0.5, x).eval()(x), slim(x)) < 1e-5
        assert slim(torch.randn(5, 3, 64, 64)).shape == (5, 10)
    assert fxprune.record(slim).after.macs == fxprune.profile(slim, x).macs


def test_tiny_vision_transformer_through_export() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, x = models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7), torch.randn(2, 3, 32, 32)
    prime(model, (x,))
    for decomposed in (False, True):
        slim, graph = assert_exported_sound(exported(model, (x,), decomposed, **DYNAMIC), (x,))
        assert sum(g.prunable for g in graph.groups) == 5
        assert slim(torch.randn(5, 3, 32, 32)).shape == (5, 7)


def test_dynamic_sizes_stay_dynamic_and_guards_on_inputs_stay() -> None:
    _, module, x = small(**DYNAMIC)
    slim = fxprune.compress(module, 0.5, x, verify=True).eval()
    assert slim(torch.randn(7, 3, 8, 8))["logits"].shape == (7, 4)
    if any("guards" in str(n.target) for n in module.graph.nodes):  # older versions of torch keep them outside of the graph
        with pytest.raises(AssertionError, match="Guard failed.*16"):
            slim(torch.randn(17, 3, 8, 8))
        with pytest.raises(AssertionError, match="Guard failed"):
            slim(torch.randn(3, 3, 9, 8))
    assert {n for n, _ in slim.named_parameters()} == {n for n, _ in module.named_parameters()}
    assert not fxprune.record(slim).notes


def test_where_and_which_layer_are_those_of_the_original() -> None:
    model, module, x = small()
    graph = fxprune.analyze(module, x)
    assert [g.name for g in graph.groups] == [g.name for g in fxprune.analyze(model, x).groups]
    locked = next(g for g in graph.groups if g.name == "head")
    assert not locked.prunable
    wheres = {n.name: n.meta["where"] for n in graph.traced.graphs["eval"].nodes}
    assert "test_aten.py" in wheres["relu"]
    assert fxprune.record(fxprune.compress(module, 0.5, x)).before.per_layer["wide"]["macs"] == 3 * 64 * 8 * 12


def test_ignore_keeps_outputs_alone() -> None:
    _, module, x = small()
    slim = fxprune.compress(module, 0.5, x, ignore=["wide"])
    assert slim.get_parameter("wide.weight").shape == (12, 4, 1, 1)
    names = {g.name for g in fxprune.analyze(module, x, ignore=["conv"]).groups if g.prunable}
    assert names == {"wide"}


def test_an_exported_program_is_taken_as_its_module() -> None:
    model, _, x = small()
    program = torch.export.export(model, (x,))
    assert fxprune.compress(program, 0.5, x, verify=True).get_parameter("conv.weight").shape[0] == 4
    assert len(fxprune.analyze(program, x).groups) == 4
    with pytest.raises(InputError, match=r"model is a dict; pass a torch.nn.Module or a torch.export.ExportedProgram"):
        fxprune.compress({}, 0.5, x)  # type: ignore[arg-type]


def test_inputs_are_known_from_the_export() -> None:
    _, module, x = small(**DYNAMIC)
    assert fxprune.analyze(module).inputs == {"dict": {"x": {"tensor": [3, 3, 8, 8], "dtype": "float32"}}}
    assert fxprune.compress(module, 0.5)(x)["logits"].shape == (3, 4)


def test_training_mode_export_trains_as_it_did() -> None:
    _, module, x = small(training=True)
    whole, twin = fxprune.compress(module, 0.0, x), copy.deepcopy(module)
    for mode in (True, False):  # the exported mode is frozen: train() and eval() change nothing
        whole.train(mode)
        torch.manual_seed(3)
        want = twin(x)["logits"]
        torch.manual_seed(3)
        assert torch.equal(want, whole(x)["logits"])
        assert torch.equal(twin.get_buffer("norm.running_var"), whole.get_buffer("norm.running_var"))
    assert int(whole.get_buffer("norm.num_batches_tracked")) == int(twin.get_buffer("norm.num_batches_tracked"))
    assert (fxprune.compress(module, 0.5, x)(x)["logits"] == 0).sum() == 0


@pytest.mark.parametrize("training", [False, True])
def test_distilled_with_the_exported_module_as_teacher(training: bool) -> None:
    _, module, x = small(training, **DYNAMIC)
    slim = fxprune.compress(module, 0.5, x)
    before = slim.get_parameter("conv.weight").clone()
    history = fxprune.distill(slim, module, [(x, torch.tensor([0, 1, 2]))], config=fxprune.DistillConfig(epochs=2, lr=0.05))
    assert len(history) == 2
    assert not torch.equal(before, slim.get_parameter("conv.weight"))


def test_repairing_batchnorm_says_that_calls_are_left() -> None:
    _, module, x = small(**DYNAMIC)
    slim = fxprune.compress(module, 0.5, x, calibration=[x], importance="l2", repair="bn")
    assert any("left the statistics of norm: batch_norm is called as a function" in note for note in fxprune.record(slim).notes)


def test_saved_loaded_copied_shown_and_compressed_again(tmp_path: Any, capsys: Any) -> None:
    _, module, x = small(**DYNAMIC)
    slim = fxprune.compress(module, 0.5, x).eval()
    fxprune.save(slim, tmp_path / "slim.safetensors")
    _, fresh, _ = small(**DYNAMIC)
    again = fxprune.load(tmp_path / "slim.safetensors", fresh).eval()
    assert torch.equal(again(x)["logits"], slim(x)["logits"])
    twice = fxprune.compress(again, 0.5, x, verify=True)
    assert twice.get_parameter("conv.weight").shape[0] == 2
    assert fxprune.record(twice).before.params == fxprune.record(slim).before.params
    assert len(fxprune.record(twice).removed_units["conv"]) == 6
    assert fxprune.record(slim).after.per_layer.keys() == fxprune.record(twice).after.per_layer.keys()
    fxprune.visualize(module, x)
    assert "wide" in capsys.readouterr().out
    assert gap(slim(x), exported(slim, (x,))(x)) == 0.0  # and it can be exported again


def test_no_operator_of_its_own_is_left_but_the_unknown() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            return self.c(torch.relu(self.b(torch.special.bessel_j1(self.a(x)))))

    x = torch.randn(4, 6)
    slim, graph = assert_exported_sound(exported(Odd().eval(), (x,)), (x,))
    reasons = {g.name: g.reason for g in graph.groups}
    assert reasons["a"].startswith("special_bessel_j1.default has no rule at special_bessel_j1.default (")
    assert reasons["b"] == ""
    assert isinstance(slim, fx.GraphModule)
    operators = [n.target for n in slim.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert operators == [torch.ops.aten.special_bessel_j1.default]


def test_a_rule_registered_for_an_operator_is_used() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.special.bessel_j0(self.a(x)))

    target = torch.ops.aten.special_bessel_j0.default
    x = torch.randn(4, 6)
    module = exported(Odd().eval(), (x,))
    assert not any(g.prunable for g in fxprune.analyze(module, x).groups)

    @fxprune.register_op(target)
    def rule(ctx: Any, node: Any, x: Any) -> Any:
        return ctx.pointwise(node, x)

    try:
        assert_exported_sound(module, (x,))
        assert any(g.prunable for g in fxprune.analyze(module, x).groups)
    finally:
        del fxprune.passes.rules.registry.FUNCTIONS[target]


def test_summing_into_duplicates_stays_the_operator() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.place: Tensor
            self.register_buffer("place", torch.tensor([0, 0, 1, 1]))

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return self.b(torch.zeros_like(y).index_put((self.place,), y, accumulate=True))

    x = torch.randn(4, 6)
    _, graph = assert_exported_sound(exported(Sum().eval(), (x,)), (x,))
    assert "index_put.default has no rule" in next(g.reason for g in graph.groups if g.name == "a")


def test_arguments_by_name_are_put_in_the_order_of_the_schema() -> None:
    add = torch.ops.aten.add.Tensor
    assert aten.positional(add, (), {"other": 2, "self": 1, "alpha": 3}) == ((1, 2), {"alpha": 3})
    softmax = torch.ops.aten.conv2d.default
    assert aten.positional(softmax, (1, 2), {"groups": 4})[0] == (1, 2, None, [1, 1], [0, 0], [1, 1], 4)


def test_graph_modules_of_other_front_ends() -> None:
    model, _, x = small()
    traced = fx.symbolic_trace(model)
    slim = fxprune.compress(traced, 0.5, x, verify=True)
    assert slim.get_parameter("conv.weight").shape[0] == 4

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = exported(model, (x,)), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.inner(x)["logits"])

    around = Around()
    slim = fxprune.compress(around, 0.5, x, verify=True)
    assert slim.get_parameter("inner.conv.weight").shape[0] == 4
    assert slim.get_parameter("inner.head.weight").shape == (2, 6)


class Shared(nn.Module):
    """One weight is read for its dtype; another is also that of a layer inside a child that a trace cannot enter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.child, self.tail = nn.Conv2d(3, 6, 2), ValueChild(), nn.Conv2d(6, 2, 1)
        self.pre, self.next, self.last = nn.Conv2d(3, 6, 2), nn.Conv2d(6, 6, 2), nn.Conv2d(6, 2, 1)
        self.child.inner.weight = self.next.weight

    def forward(self, x: Tensor) -> Any:
        y = self.child(torch.relu(self.conv(x.to(self.conv.weight.dtype))))
        return self.last(torch.relu(self.next(torch.relu(self.pre(x))))) + self.tail(y)


class ValueChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(6, 6, 2, bias=False)

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return y if bool(y.sum() > 1e9) else y * 1.0


def test_weights_read_beside_their_layer() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 3, 8, 8)
    groups = {g.name: g for g in fxprune.analyze(model, x).groups}
    assert not any(n == "conv.weight" and d > 1 for g in groups.values() for n, d, _ in g.members)  # a kernel's width has no channels
    shared = [g for g in groups.values() if any(n == "child.inner.weight" for n, _, _ in g.members)]
    assert shared and all(g.reason.startswith("it is inside 'child', which could not be traced") for g in shared)
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("next.weight").shape == (6, 6, 2, 2)
    assert slim.get_parameter("conv.weight").shape[2:] == (2, 2)


def test_conditions_over_values_are_refused_by_name() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return torch.cond(y.sum() > 0, lambda y: self.b(y), lambda y: self.b(-y), (y,))

    x = torch.randn(4, 6)
    with pytest.raises(TraceError, match=r"the exported operation cond holds graphs of its own"):
        fxprune.compress(exported(Branch().eval(), (x,)), 0.5, x)


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, pair: tuple[Tensor, Tensor], *, more: dict[str, Tensor]) -> tuple[Tensor, dict[str, list[Tensor]]]:
            y = torch.relu(self.a(pair[0] + pair[1] + more["z"]))
            return self.b(y), {"all": [self.b(-y)]}

    x = torch.randn(4, 6)
    inputs = {"pair": (x, x + 1), "more": {"z": x * 2}}
    with torch.no_grad():
        module = exported(Nested().eval(), inputs)
        slim, _ = assert_exported_sound(module, inputs)
        assert [t.shape for t in leaves(call(slim, inputs))] == [(4, 3), (4, 3)]


class Reshapes(nn.Module):
    """A tensor that gets another shape in place; channels picked by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([True, False] * 4))
        self.mask: Tensor

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.a(x))
        picked = self.c(y[:, self.mask])
        y.unsqueeze_(1)
        return self.b(y.sum(1)) + picked


def test_reshapes_in_place_and_masks() -> None:
    x = torch.randn(4, 6)
    slim, _ = assert_exported_sound(exported(Reshapes().eval(), (x,)), (x,))
    (note,) = fxprune.record(slim).notes
    assert "test_aten.py" in note and "a mask was specialised to the value of 'mask'" in note
