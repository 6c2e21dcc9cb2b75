"""A graph run node by node over many batches, each node once a batch, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import InputError
from fxprune.example_inputs import call_form
from fxprune.passes.compat import tree_leaves, tree_map_only

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
_PLAIN = (Tensor, int, float, bool, complex, str, torch.Size, torch.dtype, torch.device)
_VIEWS = ("t", "transpose", "permute", "swapaxes", "swapdims", "view", "reshape", "T", "mT")


class Room:
    """A bound on the bytes of activations held in memory, shared by the playbacks of one repair; what is beyond it lies in a folder.

    Use it as a context: the folder goes when the block is left.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def path(self) -> Path:
        """A new file's path."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fxprune-")
        self._files += 1
        return Path(self._folder.name) / f"{self._files}.pt"


class Playback:
    """Runs ``graph`` on ``module`` for a number of batches, each from where it was left to the node that is asked for.

    So every node runs once a batch, whatever the number of stops. What a batch's nodes gave is held while it is needed: in memory within
    ``room``, beyond it in a file. Parameters are read when they are used, so that a repair shows from then on.
    ``calls(i)``: the calls of the module that batch ``i`` makes; more than one where a part of a network is used repeatedly.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, calls: Callable[[int], list[Call]], room: Room) -> None:
        self.calls, self.room = calls, room
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.last = {source: i for i, node in enumerate(self.nodes) for source in node.all_input_nodes}
        self.interpreter = fx.Interpreter(module, graph=graph)
        self.interpreter.garbage_collect_values = False
        self._constant = self._constants()
        self._held: dict[int, tuple[int, list[dict[fx.Node, Any]] | Path, int]] = {}

    def before(self, batch: int, node: fx.Node) -> list[dict[fx.Node, Any]]:
        """The values alive when ``node`` is about to run, one mapping a call. Nodes must be asked for in their order in the graph.

        What is returned is not kept; ``leave`` puts it where the next stop finds it.
        """
        at, values, size = self._held.pop(batch, (0, [], 0))
        if isinstance(values, Path):
            values = self._read(values)
        else:
            self.room.held -= size
        if at == 0:
            values = [self._bound(call) for call in self.calls(batch)]
        stop = self.place[node]
        for one in values:
            self._run(one, at, stop)
        self._at = stop
        return values

    def leave(self, batch: int, values: list[dict[fx.Node, Any]]) -> None:
        """Hold what ``before`` returned last, for this batch's next stop."""
        tensors = {t.untyped_storage().data_ptr(): t for one in values for t in tree_leaves(list(one.values())) if isinstance(t, Tensor)}
        size = sum(t.untyped_storage().nbytes() for t in tensors.values())
        if self.room.held + size <= self.room.limit or not _plain(values):
            self.room.held += size
            self._held[batch] = (self._at, values, size)
            return
        path = self.room.path()
        torch.save([[(self.place[node], value) for node, value in one.items()] for one in values], path)
        self._held[batch] = (self._at, path, 0)

    def drop(self, batch: int) -> None:
        """Forget what is held for ``batch``: it starts from its inputs when it is asked for again."""
        _, values, size = self._held.pop(batch, (0, None, 0))
        if isinstance(values, Path):
            values.unlink()
        else:
            self.room.held -= size

    def through(self, values: list[dict[fx.Node, Any]], node: fx.Node) -> list[Any]:
        """What ``node``, which is about to run, gives in each call."""
        at = self.place[node]
        found = []
        for one in values:
            self._fetch(one, node.all_input_nodes)
            one[node] = result = self.interpreter.run_node(node)
            found.append(result)
            for source in node.all_input_nodes:
                if self.last[source] == at:
                    one.pop(source, None)
        self._at = at + 1
        return found

    def ahead(self, values: list[dict[fx.Node, Any]], node: fx.Node) -> list[Any]:
        """What ``node`` gives in each call, everything up to it run; it must have a reader."""
        start, self._at = self._at, self.place[node] + 1
        for one in values:
            self._run(one, start, self._at)
        return [one[node] for one in values]

    def everything(self, batch: int) -> tuple[dict[fx.Node, Any], fx.Interpreter]:
        """The values of all nodes in the first call of a batch, and what runs single nodes on them."""
        values = self._bound(self.calls(batch)[0])
        interpreter = fx.Interpreter(self.interpreter.module, graph=self.interpreter.graph)
        interpreter.env = values
        for node in self.nodes[:-1]:
            if node.op != "placeholder":
                values[node] = interpreter.run_node(node)
        return values, interpreter

    def arguments(self, values: dict[fx.Node, Any], node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What ``node``, which is about to run, is called with."""
        self._fetch(values, node.all_input_nodes)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return args, kwargs

    def rest(self, batch: int) -> list[Any]:
        """The output of every call, the rest of the graph run."""
        end = self.nodes[-1]
        found = []
        for one in self.before(batch, end):
            self._fetch(one, end.all_input_nodes)
            found.append(fx.node.map_arg(end.args[0], one.__getitem__))
        return found

    def after(self, node: fx.Node) -> fx.Node:
        """The node that runs next."""
        found: fx.Node = self.nodes[self.place[node] + 1]
        return found

    def _read(self, path: Path) -> list[dict[fx.Node, Any]]:
        found = torch.load(path, weights_only=True)
        path.unlink()
        return [{self.nodes[place]: value for place, value in one} for one in found]

    def _constants(self) -> set[fx.Node]:
        """Parameters and views of them."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            sources = node.all_input_nodes
            name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
            view = node.op in ("call_method", "call_function") and (name in _VIEWS or (node.target is getattr and node.args[1] in _VIEWS))
            if node.op == "get_attr" or (view and len(sources) == 1 and sources[0] in found):
                found.add(node)
        return found

    def _fetch(self, values: dict[fx.Node, Any], nodes: list[fx.Node]) -> None:
        self.interpreter.env = values
        for node in nodes:
            if node in self._constant:
                self._fetch(values, node.all_input_nodes)
                values[node] = self.interpreter.run_node(node)

    def _run(self, values: dict[fx.Node, Any], start: int, stop: int) -> None:
        self.interpreter.env = values
        for i in range(start, stop):
            node = self.nodes[i]
            if node.op == "placeholder" or node in self._constant:
                continue
            self._fetch(values, node.all_input_nodes)
            result = self.interpreter.run_node(node)
            if node in self.last:
                values[node] = result
            for source in node.all_input_nodes:
                if self.last[source] == i:
                    values.pop(source, None)
            for source in [source for source in values if source in self._constant]:
                del values[source]

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
        # A graph may write into its inputs; those are the user's.
        return {node: tree_map_only(Tensor, Tensor.clone, value) for node, value in given.items() if node in self.last}


def _plain(values: Any) -> bool:
    """Whether ``values`` can be read from a file again without running anything that is in it."""
    if isinstance(values, dict):
        return all(isinstance(key, (str, int, fx.Node)) and _plain(value) for key, value in values.items())
    if type(values) in (tuple, list):
        return all(_plain(value) for value in values)
    return values is None or type(values) in _PLAIN


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
