"""The slim module among its surroundings: other sizes, dtypes and front ends, both modes, reasons, verification, errors."""

from __future__ import annotations

import copy
import importlib
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import InputError, TraceError, VerificationError
from fxprune.passes.rules import registry
from tests.passes.helpers import call, gap, leaves, prime, zeroed
from tests.passes.zoo.networks import ZOO


def network(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    inputs = ZOO[name].inputs()
    return prime(ZOO[name].make(), inputs), inputs


def reason_of(name: str, parameter: str, dim: int) -> str:
    model, inputs = network(name)
    graph = fxprune.analyze(model, inputs)
    return next(g.reason for g in graph.groups if (parameter, dim) in [m[:2] for m in g.members])


# -- other sizes and dtypes ---------------------------------------------------------------------------------------------------

SIZES = [
    "residual",
    "unet",
    "squeeze_excitation",
    "interpolate_like",
    "shufflenet_units",
    "attention_channels",
    "window_partition",
    "depthwise",
]


@pytest.mark.parametrize("name", SIZES)
def test_another_resolution_and_batch(name: str) -> None:
    model, inputs = network(name)
    slim = fxprune.compress(model, 0.5, inputs).eval()
    rec = fxprune.record(slim)
    for shape in ((1, 3, 16, 16), (3, 3, 16, 24)):
        other = (torch.randn(shape),)
        with torch.no_grad():
            assert gap(call(zeroed(model, rec.kept), other), call(slim, other)) < 1e-4
    assert not rec.notes, rec.notes


def test_sequences_of_another_length() -> None:
    for name in ("attention_fused_computed", "attention_causal_triu", "mha_self", "lstm", "mask_buffer"):
        model, inputs = network(name)
        slim = fxprune.compress(model, 0.5, inputs).eval()
        other = tuple(x[:, :4] if x.ndim > 1 else x for x in inputs)
        with torch.no_grad():
            assert gap(call(zeroed(model, fxprune.record(slim).kept), other), call(slim, other)) < 1e-4, name


def test_specialisation_is_reported() -> None:
    model, inputs = network("control_flow_on_shapes")
    notes = fxprune.record(fxprune.compress(model, 0.5, inputs)).notes
    assert any("forms.py" in n and "specialised" in n for n in notes), notes


@pytest.mark.parametrize("name", ["residual", "attention_separate", "squeeze_excitation", "lstm"])
def test_dtypes(name: str) -> None:
    """``.double()`` on the slim module is the slim module of the double model; half the bits run too."""
    model, inputs = network(name)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    slim = fxprune.compress(model, 0.5, inputs).eval()
    with torch.no_grad():
        twin = fxprune.compress(copy.deepcopy(model).double(), 0.5, wide).eval()
        assert gap(call(twin, wide), call(copy.deepcopy(slim).double(), wide)) < 1e-12
        narrow = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
        assert {t.dtype for t in leaves(call(slim.bfloat16(), narrow)) if t.is_floating_point()} == {torch.bfloat16}


def test_autocast() -> None:
    model, inputs = network("residual")
    slim = fxprune.compress(model, 0.0, inputs).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = call(model, inputs), call(slim, inputs)
    assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)


def test_meta_device_gives_shapes() -> None:
    model, inputs = network("unet")
    slim = fxprune.compress(copy.deepcopy(model).to("meta"), 0.5, inputs, importance="random")
    assert slim(inputs[0].to("meta")).shape == model(inputs[0]).shape
    assert all(p.device.type == "meta" for p in slim.parameters())


# -- front ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "attention_fused_literal", "shuffle_buffer"])
def test_a_graph_module_is_taken_as_it_is(name: str) -> None:
    model, inputs = network(name)
    traced = fx.symbolic_trace(model)
    policy = {g.name: 0.5 for g in fxprune.analyze(model, inputs).groups if g.prunable}
    slim, want = fxprune.compress(traced, policy, inputs).eval(), fxprune.compress(model, policy, inputs).eval()
    with torch.no_grad():
        assert torch.equal(slim(*inputs), want(*inputs))


def test_inputs_are_a_tensor_a_tuple_or_a_dict() -> None:
    model, inputs = network("residual")
    want = fxprune.compress(model, 0.5, inputs).state_dict()
    for given in (inputs[0], list(inputs), {"x": inputs[0]}):
        got = fxprune.compress(model, 0.5, given).state_dict()
        assert all(torch.equal(v, got[k]) for k, v in want.items())


# -- modes --------------------------------------------------------------------------------------------------------------------


def test_the_auxiliary_head_comes_in_training_alone() -> None:
    model, inputs = network("auxiliary_head")
    slim = fxprune.compress(model, 0.5, inputs)
    assert not slim.training and isinstance(slim(*inputs), Tensor)
    out, aux = slim.train()(*inputs)
    assert out.shape == aux.shape == (2, 4)
    rec = fxprune.record(slim)
    assert "aux.0.weight" in rec.kept  # it is pruned like the rest
    (out.sum() + aux.sum()).backward()
    assert all(p.grad is not None for p in slim.parameters())
    assert isinstance(slim.eval()(*inputs), Tensor)


def test_the_training_flag_is_that_of_the_original() -> None:
    model, inputs = network("stochastic_depth")
    model.train()
    model.get_submodule("b").eval()
    slim = fxprune.compress(model, 0.5, inputs)
    assert slim.training and model.training and not model.get_submodule("b").training


def test_stochastic_depth_drops_whole_rows_in_training() -> None:
    model, inputs = network("stochastic_depth")
    slim = fxprune.compress(model, 0.5, inputs)
    torch.manual_seed(0)
    outs = [slim.train()(*inputs) for _ in range(8)]
    assert any(not torch.allclose(outs[0], o) for o in outs[1:])
    with torch.no_grad():
        assert torch.equal(slim.eval()(*inputs), slim(*inputs))


def test_state_dicts_keep_their_keys() -> None:
    for name in ("unet", "tied_head", "channel_buffers", "unused_parameters", "mha_cross"):
        model, inputs = network(name)
        slim = fxprune.compress(model, 0.5, inputs)
        assert list(slim.state_dict()) == list(model.state_dict()) or set(slim.state_dict()) == set(model.state_dict()), name
        buffer = io.BytesIO()
        torch.save(slim.state_dict(), buffer)
        buffer.seek(0)
        assert slim.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys == []


def test_tied_parameters_stay_tied() -> None:
    model, inputs = network("tied_head")
    slim = fxprune.compress(model, 0.5, inputs)
    assert slim.get_parameter("head.weight") is slim.get_parameter("e.weight")
    assert slim.get_parameter("e.weight").shape == (11, 5)


# -- reasons ------------------------------------------------------------------------------------------------------------------


def test_an_unknown_operation_is_named_with_its_line() -> None:
    reason = reason_of("unknown_operation", "a.weight", 0)
    assert "mystery has no rule" in reason and "forms.py:" in reason


def test_an_untraceable_child_is_named() -> None:
    assert "'child'" in reason_of("untraceable_child", "child.inner.weight", 0)


def test_a_registered_operation_couples_what_it_adds() -> None:
    model, inputs = network("registered_operation")
    group = fxprune.analyze(model, inputs).by_name["a"]
    assert group.prunable and {("a.weight", 0), ("b.weight", 0), ("c.weight", 1)} <= {m[:2] for m in group.members}


def test_what_nothing_reads_says_so() -> None:
    assert reason_of("unused_parameters", "forgotten.weight", 0) == "no operation reads it"


# -- verification -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["unet", "group_norm", "language_model", "attention_relative_table", "lstm", "auxiliary_head", "outputs_dataclass"]
)
def test_compress_proves_its_own_output(name: str) -> None:
    model, inputs = network(name)
    fxprune.compress(model, 0.5, inputs, verify=True)


def backwards(x: Tensor) -> Tensor:
    return x.flip(1)


fx.wrap("backwards")


class Liar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.b(backwards(self.a(x)))


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that claims to be element-wise where the operation turns the channels round."""
    rule = registry.Rule(lambda walk, node, x: walk.pointwise(node, x))
    monkeypatch.setitem(registry.FUNCTIONS, backwards, rule)
    torch.manual_seed(0)
    model, inputs = Liar().eval(), torch.randn(2, 3, 4, 4)
    fxprune.compress(model, 0.5, inputs)
    with pytest.raises(VerificationError, match="backwards"):
        fxprune.compress(model, 0.5, inputs, verify=True)


def test_a_rule_of_the_users_comes_before_one_for_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's rules are added when a model may need them, which can be after the user's."""
    rule = registry.Rule(lambda walk, node, x, *_: walk.pointwise(node, x))
    monkeypatch.setitem(registry.FUNCTIONS, torchvision.ops.stochastic_depth, rule)
    importlib.reload(importlib.import_module("fxprune.passes.rules.computing.vision"))
    assert registry.FUNCTIONS[torchvision.ops.stochastic_depth] is rule


# -- errors -------------------------------------------------------------------------------------------------------------------


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        if x.sum() > 0:
            return x
        return -x


def test_what_cannot_be_traced_names_its_line() -> None:
    with pytest.raises(TraceError, match=r"test_behaviour\.py:\d+"):
        fxprune.analyze(Undecided(), torch.randn(2, 4))


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, inputs = network("residual")
    with pytest.raises(InputError):
        fxprune.analyze(model, (*inputs, *inputs))
    with pytest.raises(InputError, match=r"the model itself fails on the example inputs: .*catalogue\.py:\d+"):
        fxprune.analyze(model, torch.randn(2, 5, 8, 8))
    with pytest.raises(InputError, match="example_inputs"):
        fxprune.analyze(model)
    with pytest.raises(InputError, match="example_inputs"):
        fxprune.analyze(model, 3)


def test_a_failed_analysis_leaves_the_model_alone() -> None:
    model = Undecided()
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(TraceError):
        fxprune.analyze(model, torch.randn(2, 4))
    assert before == {n: sorted(vars(m)) for n, m in model.named_modules()} and model.training
    assert torch.zeros(2).shape == (2,) and isinstance(model, nn.Module)  # nothing that tracing patches stays patched


def test_an_operation_that_forward_itself_is_the_first_to_import() -> None:
    """In a process of its own: the first analysis finds the rule as every later one does."""
    code = """
import sys, torch, fxprune
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
    def forward(self, x):
        from torchvision.ops import roi_align
        return self.last(roi_align(self.first(x), [torch.tensor([[0.0, 0, 4, 4]])] * x.shape[0], (2, 2)))
assert "torchvision" not in sys.modules
print(fxprune.compress(Net().eval(), 0.5, torch.randn(2, 3, 8, 8), verify=True).first.out_channels)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "8"


class Gram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(256, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).flatten(2)
        made = self.last((y @ y.mT).flatten(1))
        assert isinstance(made, torch.Tensor)
        return made


def test_products_of_all_channels_with_all_say_why_they_stay() -> None:
    found = fxprune.explain(fxprune.analyze(Gram().eval(), torch.randn(2, 3, 8, 8)))
    assert "pairs of its channels lie on one axis" in str(found)
    assert "the other channels on that axis can be pruned" not in str(found)
