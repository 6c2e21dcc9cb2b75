"""Residual branches, and the layers made of them: what a network can do without because its input and output have the same form.

A branch is everything between a tensor and the addition that adds its result to that tensor. Left out, the addition gives the tensor
itself, which is what the original computes with the branch's output multiplied by zero. Branches of one module (the attention and the
feed-forward half of a transformer layer) are a block each, and one together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os.path import commonprefix

import torch
from torch import fx, nn

from fxprune.passes.coupling.walk import Walk
from fxprune.passes.ir.nested import has_tensor
from fxprune.passes.ir.skeleton import Skeleton, below
from fxprune.passes.ir.traced import TracedModel
from fxprune.passes.ir.writes import is_rewritten_later, memory, written
from fxprune.passes.labels.values import Value

_ADDS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})


@dataclass(frozen=True, eq=False)
class Branch:
    """One branch in one graph: ``add`` adds what comes out of ``nodes`` to ``skip``.

    ``copied``: whether the memory of one of them is written later, so that without the branch the addition has to give a copy of ``skip``.
    """

    add: fx.Node
    skip: fx.Node
    nodes: frozenset[fx.Node]
    copied: bool


@dataclass(frozen=True)
class Block:
    """A part of the network that can be left out by a policy entry of its name with sparsity 1.

    ``name``: the module that it is, or the largest within it. ``macs``: multiply-accumulates on the example inputs; ``params``: parameter
    elements that nothing else reads. ``removable``, ``reason``: whether it can go, and if not, why. ``tensors``: names of the parameters
    and buffers that go with it.
    """

    name: str
    macs: int
    params: int
    removable: bool
    reason: str
    tensors: tuple[str, ...] = field(repr=False)
    branches: Mapping[str, tuple[Branch, ...]] = field(repr=False, compare=False)


def find_blocks(walk: Walk) -> tuple[Block, ...]:
    """The residual branches of an analysed network, in the order of execution, each before the layer that it is a part of.

    A branch has to be there in evaluation and in training mode; networks that were traced in parts have no blocks.
    """
    traced = walk.traced
    if traced.in_parts:
        return ()
    found: dict[str, dict[str, list[Branch]]] = {}
    refused: dict[str, str] = {}
    for mode, graph in traced.of_root.items():
        alone: dict[str, list[tuple[str, Branch]]] = {}
        for node in graph.nodes:
            made = _branch(walk, mode, node)
            if made is None:
                continue
            branch, why = made
            home, largest = _place(walk, branch)
            alone.setdefault(home, []).append((largest, branch))
            if why:
                refused.setdefault(home, why)
                refused.setdefault(largest, why)
        for home, members in _together(alone).items():
            if len(members) == 1:
                found.setdefault(home or members[0][0], {}).setdefault(mode, []).append(members[0][1])
                continue
            for largest, branch in members:
                found.setdefault(largest, {}).setdefault(mode, []).append(branch)
            if home:
                found.setdefault(home, {})[mode] = [branch for _, branch in members]
    return tuple(_block(walk, name, branches, refused.get(name, "")) for name, branches in found.items())


def _together(alone: Mapping[str, list[tuple[str, Branch]]]) -> dict[str, list[tuple[str, Branch]]]:
    """Branches by the module that holds them: where one holds a branch of its own and modules with branches, they are all its halves."""
    found: dict[str, list[tuple[str, Branch]]] = {}
    for home in alone:
        around = next((h for h in sorted(alone, key=len) if h and below(home, h)), home)
        nested = around != home and any(branch.add in outer.nodes for _, outer in alone[around] for _, branch in alone[home])
        for largest, branch in alone[home]:
            found.setdefault(home if nested else around, []).append((home if around != home and not nested else largest, branch))
    order = {node: i for members in alone.values() for _, branch in members[:1] for i, node in enumerate(branch.add.graph.nodes)}
    return {home: sorted(members, key=lambda m: order[m[1].add]) for home, members in found.items()}


def survivors(graph: fx.Graph, branches: Iterable[Branch], module: Callable[[str], nn.Module]) -> set[fx.Node]:
    """The nodes that are still of use once the additions of ``branches`` give their ``skip``. ``module`` finds the modules called."""
    skips = {branch.add: branch.skip for branch in branches}
    gone = {memory(node) for branch in branches for node in branch.nodes} - {None}
    gone -= {memory(skip) for skip in skips.values()}  # a view of what goes in
    alive: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.op in ("placeholder", "output") or _has_effect(node, gone, module)]
    while todo:
        node = todo.pop()
        if node not in alive:
            alive.add(node)
            todo += [skips[node]] if node in skips else node.all_input_nodes
    return alive


def _has_effect(node: fx.Node, gone: set[int | None], module: Callable[[str], nn.Module]) -> bool:
    """Whether a node does something beside its result that lasts: it checks something, or writes where nothing of ``gone`` is held."""
    if getattr(node.target, "__name__", "") in ("_assert", "_assert_async"):
        return True
    target = written(node, module)
    return target is not None and isinstance(target.meta.get("val"), torch.Tensor) and memory(target) not in gone


def _branch(walk: Walk, mode: str, node: fx.Node) -> tuple[Branch, str] | None:
    """The branch that ``node`` adds to what it started from, and why it cannot go (empty where it can)."""
    target = node.target if node.op in ("call_function", "call_method") else None
    if target not in _ADDS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
        return None
    values = [value for one in (first, second, node) if isinstance(value := walk.env[mode].get(one), Value)]
    if len(values) < 3 or len({value.shape for value in values}) > 1 or values[0].ndim < 2:
        return None
    module = walk.traced.skeleton.module
    for skip, end in ((first, second), (second, first)):
        inside = _between(skip, end)
        if inside is None:
            continue
        copied = any(is_rewritten_later(one, module) for one in (node, skip)) or written(node) is skip
        branch = Branch(node, skip, inside, copied)
        return branch, _why_not(walk, branch)
    return None


def _between(skip: fx.Node, end: fx.Node) -> frozenset[fx.Node] | None:
    """The tensors on the ways from ``skip`` to ``end``, ``end`` included; None where ``end`` does not depend on the values of ``skip``.

    Sizes, dtypes and devices are no way: a table of positions that is made as long as its input does not depend on it.
    """
    above: set[fx.Node] = set()
    todo = [end]
    while todo:
        one = todo.pop()
        if one not in above and one is not skip:
            above.add(one)
            todo += one.all_input_nodes
    below: set[fx.Node] = set()
    todo = [skip]
    while todo:
        for user in todo.pop().users:
            if user in above and user not in below and has_tensor(user.meta.get("val")):
                below.add(user)
                todo.append(user)
    return frozenset(below) if end in below else None


def _why_not(walk: Walk, branch: Branch) -> str:
    module = walk.traced.skeleton.module
    alive = survivors(branch.add.graph, [branch], module)
    for node in sorted(branch.nodes, key=lambda n: n.name):
        target = written(node, module)
        where = node.meta.get("where", node.name)
        if target is not None and memory(target) is not None and memory(target) == memory(branch.skip):
            return f"its branch writes into its input ({where})"
        if node in alive:
            reader = next((user for user in node.users if user in alive and user not in branch.nodes), node)
            return f"what it computes is read outside it as well ({reader.meta.get('where', reader.name)})"
        if any(n.op == "get_attr" and any(written(user) is n for user in n.users) for n in node.all_input_nodes):
            return f"it writes into a buffer ({where})"
    return ""


def _place(walk: Walk, branch: Branch) -> tuple[str, str]:
    """The innermost module that holds all of a branch, and the module below it with most of the branch's parameters."""
    read = {n for node in branch.nodes for n in (node, *(i for i in node.all_input_nodes if i.op == "get_attr"))}
    sizes = dict(_parameters(walk.traced.skeleton, read))
    paths = [name.rpartition(".")[0].split(".") if "." in name else [] for name in sizes]
    called = [str(n.target).split(".") for n in branch.nodes if n.op == "call_module"]
    home = list(commonprefix([*paths, *called])) if paths or called else []
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        parts = name.split(".")
        below = ".".join(parts[: len(home) + 1]) if len(parts) > len(home) + 1 else ".".join(parts[:-1])
        totals[below] = totals.get(below, 0) + size
    largest = max(totals, key=lambda path: totals[path], default=".".join(home) or branch.add.name)
    return ".".join(home), largest or branch.add.name


def _parameters(skeleton: Skeleton, nodes: Iterable[fx.Node]) -> list[tuple[str, int]]:
    """Names (first ones) and sizes of the parameters and buffers that nodes read, themselves or through the modules that they call."""
    found: dict[str, int] = {}
    for node in sorted(nodes, key=lambda n: n.name):
        if node.op == "get_attr" and str(node.target) in skeleton.aliases:
            found[str(node.target)] = skeleton.tensor(str(node.target)).numel()
        elif node.op == "call_module":
            module = skeleton.module(str(node.target))
            for _, tensor in (*module.named_parameters(), *module.named_buffers()):
                name = skeleton.tensor_names.get(id(tensor))
                if name is not None:
                    found[name] = tensor.numel()
    return list(found.items())


def finest(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Those of ``blocks`` that can go and hold no other that can: the halves of a layer rather than the layer."""
    removable = [block for block in blocks if block.removable]
    adds = {block.name: {branch.add for found in block.branches.values() for branch in found} for block in removable}
    inner = {block.name: {node for found in block.branches.values() for branch in found for node in branch.nodes} for block in removable}

    def holds(block: Block, other: Block) -> bool:
        return other is not block and (adds[other.name] < adds[block.name] or adds[other.name] <= inner[block.name])

    return tuple(block for block in removable if not any(holds(block, other) for other in removable))


def dead_nodes(traced: TracedModel, block: Block) -> dict[str, set[str]]:
    """By graph, the names of the nodes that are of no use without ``block``; all of a part that only such nodes call."""
    found: dict[str, set[str]] = {}
    for mode, graph in traced.of_root.items():
        alive = survivors(graph, block.branches.get(mode, ()), traced.skeleton.module)
        found[mode] = {node.name for node in graph.nodes if node not in alive}
        gone = _called_alone(graph, alive)
        for part in traced.parts:
            inner = traced.graphs.get(f"{part}:{mode}")
            if inner is not None:
                dead = any(below(part, outer) for outer in gone)
                found[f"{part}:{mode}"] = {node.name for node in inner.nodes} if dead else set()
    return found


def _called_alone(graph: fx.Graph, alive: set[fx.Node]) -> set[str]:
    """The modules that no node of ``alive`` calls, of those that the graph calls."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    return {str(node.target) for node in calls} - {str(node.target) for node in calls if node in alive}


def lost_tensors(traced: TracedModel, branches: Mapping[str, Iterable[Branch]]) -> dict[str, int]:
    """Names (first ones) and sizes of the tensors that nothing reads any more without ``branches``, given by graph."""
    lost: dict[str, int] = {}
    left: set[str] = set()
    for mode, graph in traced.of_root.items():
        alive = survivors(graph, branches.get(mode, ()), traced.skeleton.module)
        lost.update(_parameters(traced.skeleton, [node for node in graph.nodes if node not in alive]))
        left.update(name for name, _ in _parameters(traced.skeleton, alive))
    return {name: size for name, size in lost.items() if name not in left}


def _block(walk: Walk, name: str, branches: Mapping[str, list[Branch]], why: str) -> Block:
    traced = walk.traced
    if not why and branches.keys() != traced.of_root.keys():
        missing = next(mode for mode in traced.of_root if mode not in branches)
        why = f"the graph of {'training' if missing == 'train' else 'evaluation'} has no such branch"
    if not why and len({len(found) for found in branches.values()}) > 1:
        why = "evaluation and training have different numbers of such branches"
    lost = lost_tensors(traced, branches)
    first = next(iter(branches))
    alive = survivors(traced.graphs[first], branches[first], traced.skeleton.module)
    names = {node.name for node in traced.graphs[first].nodes if node not in alive}
    macs = sum(cost.macs for cost in walk.costs[first] if cost.node in names)
    gone = _called_alone(traced.graphs[first], alive)
    macs += sum(cost.macs for part in traced.parts if any(below(part, o) for o in gone) for cost in walk.costs.get(f"{part}:{first}", ()))
    parameters = sum(size for tensor, size in lost.items() if tensor in traced.skeleton.parameter_names)
    kept = {mode: tuple(found) for mode, found in branches.items()}
    return Block(name, macs, parameters, not why, why, tuple(sorted(lost)), kept)
