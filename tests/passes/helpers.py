"""What every sound compression keeps, as checks that any network can be put through."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.records import PruningRecord

TOLERANCE = 1e-4
SPARSITIES = (0.25, 0.34, 0.5, 0.6)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def leaves(nested: Any) -> list[Tensor]:
    """All tensors of a nested output, in a fixed order."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, Mapping):
        return [t for k in sorted(nested, key=str) for t in leaves(nested[k])]
    if isinstance(nested, (list, tuple)):
        return [t for v in nested for t in leaves(v)]
    if is_dataclass(nested):
        return [t for f in fields(nested) for t in leaves(getattr(nested, f.name))]
    return []


def skeleton(nested: Any) -> Any:
    """The structure of a nested output: types, keys and plain values, with "T" for tensors."""
    if isinstance(nested, Tensor):
        return "T"
    if isinstance(nested, Mapping):
        return type(nested).__name__, tuple((str(k), skeleton(v)) for k, v in nested.items())
    if isinstance(nested, (list, tuple)):
        return type(nested).__name__, tuple(skeleton(v) for v in nested)
    if is_dataclass(nested):
        return type(nested).__name__, tuple((f.name, skeleton(getattr(nested, f.name))) for f in fields(nested))
    return nested


def stacked(inputs: Any, times: int = 2) -> Any:
    """The same inputs ``times`` over along the batch; None where some input has no batch."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs] * times)
    if isinstance(inputs, dict):
        return {k: stacked(v, times) for k, v in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(stacked(v, times) for v in inputs)
    return inputs


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def gap(a: Any, b: Any) -> float:
    """Largest difference of two nested outputs, relative to the largest magnitude of each tensor of the first."""
    pairs = [(x.double(), y.double()) for x, y in zip(leaves(a), leaves(b), strict=True) if x.numel()]
    worst = [((x - y).abs().max() / (x.abs().max() + 1e-6)).item() for x, y in pairs if not torch.equal(x, y)]
    return max((w if w == w else math.inf for w in worst), default=0.0)


def prime(model: nn.Module, inputs: Any) -> nn.Module:
    """Give constant parameters variety and running statistics life, so that a wrong index shows in the output. Leaves eval mode."""
    generator = torch.Generator().manual_seed(7)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None]
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        model.eval()
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.train()
            m.momentum = 1.0
        call(model, inputs)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.add_(torch.randn(m.running_mean.shape, generator=generator) * 0.1)
            m.running_var.mul_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
    return model.eval()


def zeroed(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    """A copy of ``model`` with every slice that was removed set to zero; running variances stay."""
    twin = copy.deepcopy(model)
    named = tensors(twin)
    with torch.no_grad():
        for name, dims in kept.items():
            if name.endswith("running_var") or not named[name].is_floating_point():
                continue
            for dim, keep in dims.items():
                gone = torch.ones(named[name].shape[dim], dtype=torch.bool)
                gone[keep] = False
                named[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return twin


def assert_accounted(model: nn.Module, graph: CouplingGraph) -> None:
    """Unique names, reasons, and every index of every channel dimension of every layer in exactly one group."""
    names = [g.name for g in graph.groups]
    assert len(names) == len(set(names)), names
    assert all(g.reason for g in graph.groups if not g.prunable)
    seen: dict[tuple[str, int], list[Tensor]] = {}
    for group in graph.groups:
        for (name, dim, indices), units in zip(group.members, group.units, strict=True):
            seen.setdefault((name, dim), []).append(indices)
            assert len(units) == len(indices) and int(units.min()) >= 0 and int(units.max()) < group.size
    aliases: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)) or not isinstance(module.weight, nn.Parameter):
            continue
        for dim in (0, 1):
            size = module.weight.shape[dim]
            if size == 1:
                continue
            found = next((seen[a, dim] for a in aliases.get(id(module.weight), []) if (a, dim) in seen), None)
            assert found is not None, f"{path}.weight dimension {dim} is in no group"
            assert torch.equal(torch.cat(found).sort().values, torch.arange(size)), f"{path}.weight dimension {dim}"


def pruned(model: nn.Module, graph: CouplingGraph, policy: Mapping[str, float], inputs: Any) -> tuple[nn.Module, PruningRecord]:
    """Compress and check counts, names, slices and storage. Returns (slim in eval mode, its record)."""
    slim = fxprune.compress(model, dict(policy), inputs, attention=graph.options["attention"])
    rec = fxprune.record(slim)
    for group in graph.groups:
        p = policy.get(group.name, 0.0)
        want = min(math.floor(p * group.size + 1e-6), group.size - 1) if group.prunable else 0
        assert len(rec.removed_units.get(group.name, ())) == want, group.name
    mine, theirs = tensors(model), tensors(slim)
    assert set(mine) == set(theirs)
    for name, whole in mine.items():
        if name in rec.renumbered:
            continue
        for dim, keep in rec.kept.get(name, {}).items():
            whole = whole.index_select(dim, keep)
        assert torch.equal(whole, theirs[name]), f"{name} is not the kept slice of the original"
    flags = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    assert flags == {n: p.requires_grad for n, p in slim.named_parameters(remove_duplicate=False)}
    storages = {t.untyped_storage().data_ptr() for t in mine.values() if t.numel()}
    assert not any(t.untyped_storage().data_ptr() in storages for t in theirs.values() if t.numel())
    return slim.eval(), rec


def assert_oracle(
    model: nn.Module, graph: CouplingGraph, policy: Mapping[str, float], inputs: Any, slim: nn.Module, rec: PruningRecord
) -> float:
    """The zeroing oracle, on all groups where it is defined for all, else on those without notes (compressed apart)."""
    noted = {g.name for g in graph.groups if g.notes}
    if noted:
        policy = {n: p for n, p in policy.items() if n not in noted}
        slim, rec = pruned(model, graph, policy, inputs)
    with torch.no_grad():
        found = gap(call(zeroed(model, rec.kept), inputs), call(slim, inputs))
    assert found < TOLERANCE, f"oracle: relative error {found:.1e}"
    return found


def assert_sound(model: nn.Module, inputs: Any, *, exact: bool, seed: int, locked: bool = False) -> CouplingGraph:
    """Compress at uneven random sparsities and check everything; ``model`` must be primed. Returns the coupling graph."""
    draw = random.Random(seed)
    before = {n: t.clone() for n, t in tensors(model).items()}
    attributes = {n: (sorted(vars(m)), sorted(m._buffers), m.training) for n, m in model.named_modules()}
    graph = fxprune.analyze(model, inputs)
    assert_accounted(model, graph)
    free = [g for g in graph.groups if g.prunable]
    assert bool(free) != locked, [(g.name, g.reason) for g in graph.groups]
    if exact:
        assert not any(g.notes for g in free), [(g.name, g.notes) for g in free if g.notes]
    policy = {g.name: draw.choice(SPARSITIES) for g in free}
    slim, rec = pruned(model, graph, policy, inputs)
    with torch.no_grad():
        want, got = call(model, inputs), call(slim, inputs)
    assert skeleton(want) == skeleton(got)
    assert [t.shape for t in leaves(want)] == [t.shape for t in leaves(got)]
    assert all(torch.isfinite(t).all() for t in leaves(got))
    assert_oracle(model, graph, policy, inputs, slim, rec)
    _assert_other_batch(model, slim, inputs, want, got)
    _assert_copies(slim, inputs, got)
    assert_keep_all(model, inputs)
    _assert_trains(slim, inputs)
    after = tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    assert attributes == {n: (sorted(vars(m)), sorted(m._buffers), m.training) for n, m in model.named_modules()}
    return graph


def _assert_other_batch(model: nn.Module, slim: nn.Module, inputs: Any, want: Any, got: Any) -> None:
    with torch.no_grad():
        try:
            whole = call(model, stacked(inputs))
        except RuntimeError:
            return  # not every input's first axis is the batch
        part = call(slim, stacked(inputs))
    assert [t.shape for t in leaves(whole)] == [t.shape for t in leaves(part)], "batch size was baked in"
    for small, large, reference, big in zip(leaves(got), leaves(part), leaves(want), leaves(whole), strict=True):
        if big.ndim and big.shape[0] == 2 * reference.shape[0] and big.shape[1:] == reference.shape[1:]:
            assert gap(small, large[: len(small)]) < 1e-4, "rows differ at another batch size"


def _assert_copies(slim: nn.Module, inputs: Any, got: Any) -> None:
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        with torch.no_grad():
            assert gap(got, call(twin, inputs)) == 0.0
        assert fxprune.record(twin).kept.keys() == fxprune.record(slim).kept.keys()
        assert set(tensors(twin)) == set(tensors(slim))


def assert_keep_all(model: nn.Module, inputs: Any) -> None:
    """At sparsity 0 the slim module computes bit for bit what the model does, in both modes."""
    keep, twin = fxprune.compress(model, 0.0, inputs), copy.deepcopy(model)
    for mode in (False, True):
        keep.train(mode)
        twin.train(mode)
        torch.manual_seed(1)
        a = call(twin, inputs)
        torch.manual_seed(1)
        b = call(keep, inputs)
        assert skeleton(a) == skeleton(b)
        assert all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True)), (
            f"keep-all differs by {gap(a, b):.1e}, training={mode}"
        )


def _assert_trains(slim: nn.Module, inputs: Any) -> None:
    slim.train()
    optimizer = torch.optim.SGD(slim.parameters(), 0.01)
    loss = torch.stack([t.float().mean() for t in leaves(call(slim, inputs)) if t.is_floating_point()]).sum()
    loss.backward()
    optimizer.step()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in slim.parameters())
    slim.eval()


def assert_edits_stay_apart(graph: CouplingGraph, x: Tensor) -> None:
    """Of two candidates of ``graph``, which has been compressed before, one is edited; the other and the next are as they were."""
    first, second = fxprune.compress(graph, 0.5), fxprune.compress(graph, 0.5)
    before = second(x)
    output = next(n for n in first.graph.nodes if n.op == "output")
    with first.graph.inserting_before(output):
        output.args = (first.graph.call_function(torch.neg, (output.args[0],)),)
    first.recompile()
    assert torch.equal(first(x), -before)
    assert torch.equal(second(x), before)
    assert torch.equal(fxprune.compress(graph, 0.5)(x), before)
    assert all(n.graph is second.graph for n in second.graph.nodes)


def without_fxprune(code: str, *arguments: str, folder: Path) -> str:
    """What ``code`` prints in a process of its own that cannot import fxprune, but what lies in ``folder``."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", _WITHOUT_FXPRUNE + code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


_WITHOUT_FXPRUNE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fxprune":
            raise ImportError("fxprune is not installed here")
sys.meta_path.insert(0, Blocked())
"""
