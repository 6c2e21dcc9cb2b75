"""One network of the third table: run, pruned, judged, and every use of the slim one that the original itself allows.

A check has one of three outcomes: ``ok``; ``original fails``, where the network as its package built it does not pass either, so nothing is
asked; or what went wrong, in a line.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.packages.network import NOT_ASKED, OK, Inputs, Network
from benchmarks.tools import SEED, Row, costs, described, in_the_way, saved, with_statistics
from benchmarks.zeroing import TOLERANCE, Kept, difference, judged, leaves, outputs, prime, zeroed

SAME = 1e-5  # relative difference that two runs of the same weights may have: other shapes take other kernels
Defined = tuple[nn.Module, Kept] | None  # a slim network for which the oracle is defined, and what it kept


def package_row(network: Network, sparsity: float) -> Row:
    """Prune ``network``, which has run once, and put the result through every check."""
    import fxprune

    model = _built(network)
    inputs = network.inputs(network.batch, network.size)
    prime(model, inputs)
    before = outputs(model, inputs)  # the run before: what a model remembers of it must not reach the slim one
    state = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    row: Row = {"input": described(inputs), "size": sum(p.numel() for p in model.parameters())}

    start = time.process_time()
    graph = fxprune.analyze(model, inputs)
    prunable = {g.name: sparsity for g in graph.groups if g.prunable}
    traced = graph.traced
    row |= {"traced": "parts" if traced.parts else "whole", "parts": list(traced.parts), "opaque": dict(sorted(traced.opaque.items()))}
    row |= {"prunable": len(prunable), "locked": len(graph.groups) - len(prunable), "in_the_way": in_the_way(graph, model)}
    if not prunable:
        return row | {"verdict": "fails", "why": "no prunable group", "advised": _advised(graph)}
    slim, kept = _pruned(graph, prunable, inputs)
    row["seconds"] = time.process_time() - start
    row |= saved(costs(model, inputs), costs(slim, inputs))
    if row["params"] < 0.4:
        row["advised"] = _advised(graph)

    left = set(with_statistics(graph, model))
    free = {g.name: sparsity for g in graph.groups if g.prunable and not g.notes and not left & _ends(g)}
    defined: list[Defined] = [(slim, kept)]

    def again() -> tuple[int, nn.Module, Kept] | None:
        if len(free) == len(prunable):
            return None
        defined[0] = _pruned(graph, free, inputs) if free else None
        return (len(free), *defined[0]) if defined[0] else (0, slim, kept)

    row |= judged(model, inputs, slim, kept, again, len(prunable), lambda: copied(network, model))
    if row["verdict"] in ("fails",):
        defined[0] = None
    twin = copied(network, model)  # what the original does at other sizes is asked of a copy, which may remember them
    other = {"other batch": network.inputs(network.batch + 1, network.size), "other size": network.inputs(network.batch, network.other)}
    references = {"example": (inputs, before)}
    for check, given in other.items():
        try:
            references[check] = (given, outputs(twin, given))
        except Exception:  # noqa: BLE001 - whatever the original raises, it does not take this
            row[check] = NOT_ASKED
            continue
        row[check] = _checked(partial(_other, network, model, slim, defined[0], *references[check]))
    if network.other == network.size:
        row["other size"] = NOT_ASKED
        references.pop("other size", None)
    row["backward"] = _backward(network, model, slim, inputs)
    row["file"] = _checked(lambda: _file(network, slim, inputs, references))
    row["intact"] = _checked(lambda: _intact(model, state, attributes, references))
    return row


def _built(network: Network) -> nn.Module:
    torch.manual_seed(SEED)
    return network.build().eval()


def copied(network: Network, model: nn.Module) -> nn.Module:
    """A copy of ``model``; one that does not deep-copy (weights computed by hooks) is built again with its weights."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        twin = _built(network)
        twin.load_state_dict(model.state_dict())
        return twin


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _ends(group: Any) -> set[str]:
    return {f"{name.rpartition('.')[0]}:{'out' if dim == 0 else 'in'}" for name, dim, _ in group.members}


def _pruned(graph: Any, policy: Mapping[str, float], inputs: Inputs) -> tuple[nn.Module, Kept]:
    import fxprune

    slim = fxprune.compress(graph, policy, inputs)
    return slim.eval(), fxprune.record(slim).kept


def _advised(graph: Any) -> list[str]:
    """What ``explain`` says of the largest locks: the reason, which names the operation, and what to do."""
    import fxprune

    return [f"{lock.reason}: {lock.advice}" for lock in fxprune.explain(graph).locks if lock.advice][:3]


def _checked(check: Callable[[], str]) -> str:
    """The word of a check, or what it raised."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - what a slim network raises where the original does not is what the table reports
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first}"[:200]


def _other(network: Network, model: nn.Module, slim: nn.Module, defined: Defined, inputs: Inputs, whole: list[Tensor]) -> str:
    """At other inputs: the shapes of the original's outputs, and the zeroed original's values where the oracle is defined."""
    found = outputs(slim, inputs)
    if [t.shape for t in found] != [t.shape for t in whole]:
        return f"shapes {[tuple(t.shape) for t in whole][:2]} became {[tuple(t.shape) for t in found][:2]}"
    if defined is None:
        return OK
    part, kept = defined
    gap = difference(outputs(zeroed(model, kept, copied(network, model)), inputs), outputs(part, inputs))
    return OK if gap < TOLERANCE else f"differs by {gap:.1e}"


def _gradients(model: nn.Module, inputs: Inputs) -> set[str]:
    """The parameters that a training step reaches."""
    model.train()
    model.zero_grad()
    torch.manual_seed(SEED)
    given = copy.deepcopy(inputs)
    found = model(**given) if isinstance(given, dict) else model(*given)
    floats = [t.float().square().mean() for t in leaves(found) if t.is_floating_point() and t.grad_fn is not None]
    torch.stack(floats).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    bad = sorted(n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all()))
    if bad:
        raise ValueError(f"the gradient of {bad[0]} is not finite")
    return reached


def _backward(network: Network, model: nn.Module, slim: nn.Module, inputs: Inputs) -> str:
    try:
        wanted = _gradients(copied(network, model), inputs)
    except Exception:  # noqa: BLE001 - whatever the original raises, it does not train on this
        return NOT_ASKED

    def step() -> str:
        missing = sorted(wanted - _gradients(copy.deepcopy(slim), inputs))
        return f"no gradient for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "") if missing else OK

    return _checked(step)


def _file(network: Network, slim: nn.Module, inputs: Inputs, references: Mapping[str, tuple[Inputs, list[Tensor]]]) -> str:
    """Saved, and loaded into a network that was just built and never ran: the same outputs, at every size that is taken."""
    import fxprune

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slim.safetensors"
        fxprune.save(slim, path)
        torch.manual_seed(SEED + 1)
        loaded = fxprune.load(path, network.build().eval()).eval()
    for name, (given, _) in references.items():
        gap = difference(outputs(slim, given), outputs(loaded, given))
        if gap > SAME:
            return f"differs by {gap:.1e} at {name}"
    return OK


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to_dense(), b.to_dense()) if a.is_sparse and b.is_sparse else torch.equal(a, b)


def _intact(
    model: nn.Module,
    state: Mapping[str, Tensor],
    attributes: Mapping[str, list[str]],
    references: Mapping[str, tuple[Inputs, list[Tensor]]],
) -> str:
    """The original: tensors and attributes as they were, and the outputs it had, at every size that it takes."""
    now = _tensors(model)
    if changed := sorted(n for n in state.keys() | now.keys() if n not in now or n not in state or not _equal(state[n], now[n])):
        return f"{changed[0]} changed"
    names = {name: sorted(vars(module)) for name, module in model.named_modules()}
    if changed := sorted(n for n in attributes.keys() | names.keys() if attributes.get(n) != names.get(n)):
        return f"attributes of {changed[0] or 'the root'} changed"
    for name, (given, reference) in references.items():
        gap = difference(reference, outputs(model, given))
        if gap > SAME:
            return f"differs by {gap:.1e} at {name}"
    return OK
