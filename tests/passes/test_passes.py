"""The steps run as ``torch.fx.passes`` passes: pure, truthful about what they changed, and their errors reach the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.utils._pytree import tree_leaves

import fxprune
from fxprune.errors import InputError, PolicyError, TraceError, UnsupportedError
from fxprune.importance.criteria import scores
from fxprune.passes import rules
from fxprune.passes.base import GraphPass, run_passes
from fxprune.passes.pipeline import Couple, Plan, Slim, TracedGraph, analysed, compilation, traced_graph
from fxprune.passes.planning.plan import keep_counts
from fxprune.passes.tracing import shapes
from fxprune.passes.tracing.modes import trace
from tests.passes.zoo.networks import ZOO


def carrier_of(name: str = "residual") -> tuple[nn.Module, Any, TracedGraph]:
    torch.manual_seed(0)
    model, inputs = ZOO[name].make().eval(), ZOO[name].inputs()
    return model, inputs, traced_graph(trace(model, inputs, rules.is_known, rules.registry.FUNCTIONS.__contains__))


def coupled(model: nn.Module, inputs: Any) -> TracedGraph:
    graph = analysed(model, inputs, (), "auto")
    return traced_graph(graph.traced, graph)


def nodes(module: fx.GraphModule) -> list[str]:
    return [n.format_node() or str(n) for n in module.graph.nodes]


def applied(step: GraphPass, module: fx.GraphModule) -> PassResult:
    result = step(module)
    assert result is not None
    return result


def plan_of(sparsity: Any) -> Plan:
    return Plan(sparsity, lambda graph: scores(graph, "l2"))


def test_couple_reports_no_change_and_edits_nothing() -> None:
    _, _, carrier = carrier_of()
    before = nodes(carrier)
    result = applied(Couple(None), carrier)
    assert not result.modified and result.graph_module is carrier and nodes(carrier) == before
    assert compilation(carrier).coupled().groups


def test_plan_reports_no_change_and_edits_nothing() -> None:
    model, inputs, _ = carrier_of()
    carrier = coupled(model, inputs)
    before = nodes(carrier)
    result = applied(plan_of(0.5), carrier)
    assert not result.modified and result.graph_module is carrier and nodes(carrier) == before
    kept = compilation(carrier).planned()
    assert 0 < int(kept.sum()) < len(kept)


def test_slim_reports_a_change_and_leaves_its_input() -> None:
    model, inputs, _ = carrier_of()
    carrier = coupled(model, inputs)
    plan_of(0.5)(carrier)
    before, weight = nodes(carrier), model.get_parameter("stem.0.weight").clone()
    result = applied(Slim(), carrier)
    assert result.modified and result.graph_module is not carrier and nodes(carrier) == before
    assert torch.equal(weight, model.get_parameter("stem.0.weight"))
    assert sum(p.numel() for p in result.graph_module.parameters()) < sum(p.numel() for p in model.parameters())
    result.graph_module.graph.lint()


def test_slim_reports_no_change_where_only_parts_were_traced() -> None:
    """The slim network is then no graph module: it travels beside the carrier."""
    model, inputs = HalfTraceable().eval(), (torch.randn(2, 3, 8, 8),)
    carrier = coupled(model, inputs)
    plan_of(0.5)(carrier)
    result = applied(Slim(), carrier)
    assert not result.modified and result.graph_module is carrier
    assert not isinstance(compilation(carrier).rewritten()[1], fx.GraphModule)


def test_the_edges_of_a_part_are_not_called_the_networks() -> None:
    graph = analysed(HalfTraceable().eval(), (torch.randn(2, 3, 8, 8),), (), "auto")
    reasons = {g.name: g.reason for g in graph.groups if not g.prunable}
    assert reasons["body.2"] == "it reaches the output of 'body', a part traced by itself"
    assert "the input 'input_1' of 'body', a part traced by itself" in reasons["body.0:in"]


class HalfTraceable(nn.Module):
    """Its root branches on values; its child does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.body(x)
        return x if float(x.sum()) > 1e9 else x + 1


def test_a_keep_all_plan_keeps_every_unit() -> None:
    model, inputs, _ = carrier_of()
    for nothing in (0.0, 0, {}, {"a.0": 0.0}):
        carrier = coupled(model, inputs)
        plan_of(nothing)(carrier)
        assert compilation(carrier).planned().all()


def test_the_steps_run_under_the_pass_manager_of_torch() -> None:
    model, inputs, _ = carrier_of()
    carrier = coupled(model, inputs)
    result = PassManager([plan_of(0.5), Slim()])(carrier)
    assert result.modified
    with torch.no_grad():
        assert torch.equal(result.graph_module(*inputs), fxprune.compress(model, 0.5, inputs)(*inputs))


class Nothing(GraphPass):
    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        return module


class Edits(GraphPass):
    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        module.graph.call_function(torch.relu, (next(iter(module.graph.nodes)),))
        return module


class Breaks(GraphPass):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        raise self.error


def small() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))


def test_a_pass_that_edits_its_input_is_caught() -> None:
    with pytest.raises(AssertionError, match="Edits edited its input"):
        run_passes(small(), [Edits()])


class Retargets(GraphPass):
    """Changes a target in place: as many nodes as before."""

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        next(n for n in module.graph.nodes if n.op == "call_module").target = "1"
        return module


class Zeroes(GraphPass):
    def __init__(self, write: Callable[[torch.Tensor], Any]) -> None:
        self.write = write

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        with torch.no_grad():
            self.write(module.get_parameter("0.weight"))
        return module


def test_a_pass_that_edits_a_node_or_a_weight_is_caught() -> None:
    with pytest.raises(AssertionError, match="Retargets edited its input: node '_0' was changed"):
        run_passes(small(), [Retargets()])
    for write in (lambda p: p.zero_(), lambda p: p.data.zero_(), lambda p: p.data.mul_(-1)):
        with pytest.raises(AssertionError, match=r"Zeroes edited its input: tensor '0.weight' was written"):
            run_passes(small(), [Zeroes(write)])


def test_passes_of_ones_own_run_in_compress_and_an_observer_sees_every_step() -> None:
    model, inputs, _ = carrier_of()
    seen: dict[str, Any] = {}

    def doubled(module: fx.GraphModule) -> None:
        output = next(iter(reversed(module.graph.nodes)))
        with module.graph.inserting_before(output):
            output.args = (module.graph.call_function(torch.mul, (output.args[0], 2.0)),)

    class Counts(GraphPass):
        def run(self, module: fx.GraphModule) -> fx.GraphModule:
            return module

    def observe(step: str, result: Any, seconds: float) -> None:
        seen[step] = result
        assert seconds >= 0

    plain = fxprune.compress(model, 0.5, inputs)
    slim = fxprune.compress(model, 0.5, inputs, passes=[doubled, Counts()], observe=observe)
    assert list(seen) == ["Trace", "Couple", "Plan", "Slim", "doubled", "Counts"]
    assert isinstance(seen["Slim"], fx.GraphModule) and seen["doubled"] is slim
    assert "doubled, Counts ran" in fxprune.record(slim).notes[-1]
    assert fxprune.record(plain).kept.keys() == fxprune.record(slim).kept.keys()
    with torch.no_grad():
        assert torch.equal(2 * plain(*inputs), slim(*inputs))


def test_a_pass_that_returns_no_graph_module_is_named() -> None:
    model, inputs, _ = carrier_of()
    with pytest.raises(InputError, match="pass str returned a str"):
        fxprune.compress(model, 0.5, inputs, passes=[str])
    with pytest.raises(InputError, match="passes= takes functions"):
        fxprune.compress(model, 0.5, inputs, passes=[3])
    with pytest.raises(InputError, match="needs the graph of the whole network"):
        fxprune.compress(HalfTraceable().eval(), 0.5, torch.randn(2, 3, 8, 8), passes=[lambda module: module])


def test_steps_out_of_order_say_which_is_missing() -> None:
    _, _, carrier = carrier_of()
    with pytest.raises(InputError, match="run the pass Couple first"):
        applied(plan_of(0.5), carrier)
    applied(Couple(None), carrier)
    with pytest.raises(InputError, match="run the pass Plan first"):
        applied(Slim(), carrier)
    with pytest.raises(InputError, match="stands for no compilation"):
        compilation(small())


@pytest.mark.parametrize("error", [PolicyError("p"), UnsupportedError("u"), TraceError("t"), KeyError("k"), AssertionError("a")])
def test_errors_arrive_as_they_were_raised(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_passes(small(), [Nothing(), Breaks(error)])
    assert caught.value is error


def test_an_observer_sees_every_step_with_its_time() -> None:
    model, inputs, _ = carrier_of()
    seen: list[tuple[str, float]] = []
    steps = [plan_of(0.5), Slim()]
    run_passes(coupled(model, inputs), steps, lambda step, module, seconds: seen.append((step, seconds)))
    assert [name for name, _ in seen] == ["Plan", "Slim"] and all(seconds > 0 for _, seconds in seen)


def test_a_policy_error_reaches_the_user_through_compress() -> None:
    model, inputs, _ = carrier_of()
    with pytest.raises(PolicyError, match="stem"):
        fxprune.compress(model, {"stem.0:in": 0.5}, inputs)


def test_analysis_is_reused_and_never_grows_stale() -> None:
    """From a coupling graph, ``compress`` slices the weights that the model holds now."""
    model, inputs, _ = carrier_of()
    graph = fxprune.analyze(model, inputs)
    first = fxprune.compress(graph, {"a.0": 0.5})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    second = fxprune.compress(graph, {"a.0": 0.5})
    kept = fxprune.record(second).kept
    for (name, old), new in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(2 * old, new), name
    assert {n: sorted(d) for n, d in kept.items()} == {n: sorted(d) for n, d in fxprune.record(first).kept.items()}


def test_keep_counts_never_empties_a_group() -> None:
    model, inputs, _ = carrier_of()
    graph = fxprune.analyze(model, inputs)
    group = graph.by_name["a.0"]
    keep = keep_counts(graph, {"a.0": 10**6}, {"a.0": range(group.size)})
    low, high = graph.starts[group.number], graph.starts[group.number + 1]
    assert keep[low:high].tolist() == [False] * (group.size - 1) + [True]
    assert keep[:low].all() and keep[high:].all()


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
@pytest.mark.parametrize("shape", [(7, 4), (7, 3, 4)])
def test_a_recurrent_layer_has_the_shapes_of_a_real_run(kind: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    real = kind(4, 5, **options)(torch.randn(shape))
    found = shapes.recurrent(kind(4, 5, device="meta", **options), (torch.randn(shape, device="meta"),))
    assert [t.shape for t in tree_leaves(found)] == [t.shape for t in tree_leaves(real)]
