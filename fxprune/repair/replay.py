"""A graph run node by node over many batches, as far as asked for, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import InputError
from fxprune.example_inputs import call_form

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class Playback:
    """Runs ``graph`` on ``module`` for a number of batches, each up to the same node.

    What a batch's nodes gave stays while it is needed, as long as all batches together keep within ``room`` bytes; a batch that does not
    fit is run again from its inputs whenever it is asked for. So memory does not grow with the set, and a small set is run once.
    ``calls(i)``: the calls of the module that batch ``i`` makes; more than one where a part of a network is used repeatedly.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, calls: Callable[[int], list[Call]], room: int) -> None:
        self.calls, self.room = calls, room
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.last = {source: i for i, node in enumerate(self.nodes) for source in node.all_input_nodes}
        self.interpreter = fx.Interpreter(module, graph=graph)
        self.interpreter.garbage_collect_values = False
        self._held: dict[int, tuple[int, list[dict[fx.Node, Any]]]] = {}
        self._bytes: dict[int, int] = {}

    def before(self, batch: int, node: fx.Node) -> list[dict[fx.Node, Any]]:
        """The values alive when ``node`` is about to run, one mapping a call. Nodes must be asked for in their order in the graph."""
        at, values = self._held.pop(batch, (0, []))
        self._bytes.pop(batch, None)
        if not values:
            values = [self._bound(call) for call in self.calls(batch)]
        stop = self.place[node]
        for one in values:
            self._run(one, at, stop)
        size = sum(t.untyped_storage().nbytes() for one in values for t in tree_leaves(list(one.values())) if isinstance(t, torch.Tensor))
        if size + sum(self._bytes.values()) <= self.room:
            self._held[batch], self._bytes[batch] = (stop, values), size
        return values

    def after(self, node: fx.Node) -> fx.Node:
        """The node that runs next."""
        found: fx.Node = self.nodes[self.place[node] + 1]
        return found

    def _run(self, values: dict[fx.Node, Any], start: int, stop: int) -> None:
        self.interpreter.env = values
        for i in range(start, stop):
            node = self.nodes[i]
            if node.op != "placeholder":
                values[node] = self.interpreter.run_node(node)
            for source in node.all_input_nodes:
                if self.last[source] == i:
                    values.pop(source, None)

    def _bound(self, call: Call) -> dict[fx.Node, Any]:
        args, kwargs = call
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        given = dict(zip(inputs, args, strict=False))
        for node in inputs[len(args) :]:
            if str(node.target) not in kwargs and not node.args:
                raise InputError(
                    f"a calibration batch lacks the input {node.target!r}; a pair is (inputs, labels), so pass several inputs as a dict"
                )
            given[node] = kwargs[str(node.target)] if str(node.target) in kwargs else node.args[0]
        return given


def whole_calls(inputs_of: Callable[[int], Any]) -> Callable[[int], list[Call]]:
    """The calls of a whole network: one a batch."""
    return lambda batch: [call_form(inputs_of(batch))]


def calls_of_part(root: nn.Module, part: nn.Module, inputs_of: Callable[[int], Any]) -> Callable[[int], list[Call]]:
    """The calls of ``part`` that ``root`` makes when it runs on a batch."""

    def captured(batch: int) -> list[Call]:
        found: list[Call] = []
        handle = part.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
        try:
            args, kwargs = call_form(inputs_of(batch))
            root(*args, **kwargs)
        finally:
            handle.remove()
        return found

    return captured
