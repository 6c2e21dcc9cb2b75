"""Blocks without gradients in ``forward``: a graph cannot hold the block, but what leaves it can be detached, which is the same.

Nodes recorded in such a block are marked. What of them a gradient could flow into is detached where code outside reads it, and those that
write into a tensor are given it, and what they write, detached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.passes.compat import tree_leaves
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.ir.writes import written
from fxprune.passes.tracing.recorder import Recorder

MARK = "without gradients"


def detach(tracer: Recorder, graph: fx.Graph) -> None:
    """Detach what was computed without gradients. What leaves in another form is noted."""
    skeleton = tracer.skeleton
    learned: set[fx.Node] = set()
    for node in list(graph.nodes):
        if not _is_learned(node, learned, tracer):
            continue
        learned.add(node)
        if MARK not in node.meta:
            continue
        target = written(node, skeleton.module)
        outside = [user for user in node.users if MARK not in user.meta]
        if (target is not None or "out" in node.kwargs) and "body" not in node.meta:
            learned.discard(node)
            for source in node.all_input_nodes:  # the same memory, without a gradient: autograd lets no other be written so
                if source in learned:
                    node.replace_input_with(source, _detached(graph, source, node))
            if target in learned and MARK not in target.meta:  # what is given back is the tensor that was there, with its gradient
                for user in outside:
                    user.replace_input_with(node, target)
        elif target in learned:
            _say(tracer, node)
        elif isinstance(node.meta["val"], torch.Tensor):
            if outside:
                found = _detached(graph, node, node.next)
                for user in outside:
                    user.replace_input_with(node, found)
        elif outside:
            for user in outside:
                if target_name(user) == "getitem":
                    user.meta[MARK] = True
                elif user.op == "output" or _holds_floats(user.meta.get("val")):
                    _say(tracer, node)


def _detached(graph: fx.Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        found = graph.call_method("detach", (node,))
    found.meta.update({**node.meta, "val": node.meta["val"].detach()})
    return found


def _is_learned(node: fx.Node, learned: set[fx.Node], tracer: Recorder) -> bool:
    """Whether a gradient could flow into what ``node`` gives."""
    if node.op == "output" or target_name(node) == "detach" or not _holds_floats(node.meta.get("val")):
        return False
    if node.op == "placeholder":
        return True
    if node.op == "get_attr":
        return str(node.target) in tracer.skeleton.parameter_names
    if node.op == "call_module" and any(True for _ in tracer.skeleton.module(str(node.target)).parameters()):
        return True
    return any(source in learned for source in node.all_input_nodes)


def _holds_floats(value: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()) for t in tree_leaves(value))


def _say(tracer: Recorder, node: fx.Node) -> None:
    text = "a block without gradients cannot be kept in a graph here; the slim module computes without it"
    tracer.note(NoteKind.LOST, text, str(node.meta.get("where", "")))
