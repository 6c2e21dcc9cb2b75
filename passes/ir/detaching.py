"""A graph in a form that fx traces again as it is. Loading a pickled ``GraphModule`` means that, with its modules as leaves.

A call that another trace would lose stays where it is the call of a module: one whose code raises given proxies (``torch.zeros(n, 3)``),
one of fxprune's own, and one that depends on no input (a buffer that is written, numbers that are drawn), which would run once, at
loading. Such a module is a plain ``nn.Module`` whose ``forward`` is a function of torch or of the standard library, so it pickles by name.
"""

from __future__ import annotations

import functools
import keyword
import operator
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from fxprune.errors import FAULTS, UnsupportedError
from fxprune.passes.ir.factories import DETERMINED
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.objects import found_class, made_object, made_state
from fxprune.passes.ir.writes import is_rewritten_later

HOME = "_calls"  # the module that holds the calls that became modules


class Again(fx.Tracer):
    """The tracer that fx uses when it loads a graph module from a pickle: every submodule stays a call."""

    def is_leaf_module(self, _: nn.Module, __: str) -> bool:
        return True


def replayable(tree: nn.Module, graph: fx.Graph) -> None:
    """Change ``graph`` so that a trace of its code gives the same calls; modules that this takes are added to ``tree``.

    Raises:
        UnsupportedError: it calls a function of fxprune that nothing else can stand for.
    """
    calls = _Calls(tree, graph)
    for node in list(graph.nodes):
        calls.visit(node)
    graph.lint()


class _Calls:
    """One walk over a graph: ``stand`` has for each node what another trace would have for it, a proxy or a value."""

    def __init__(self, tree: nn.Module, graph: fx.Graph) -> None:
        self.tree, self.graph = tree, graph
        self.tracer = Again()
        self.tracer.root, self.tracer.graph, self.tracer.tensor_attrs = nn.Module(), fx.Graph(tracer_cls=Again), {}
        self.home, self.home_name = nn.Module(), HOME
        self.paths: dict[Any, str] = {}
        self.kept: list[Any] = []  # so that no identity in ``paths`` is given twice
        self.stand: dict[fx.Node, Any] = {}
        self.parameters = dict(tree.named_parameters(remove_duplicate=False))
        while hasattr(tree, self.home_name):
            self.home_name += "_"
        tree.add_module(self.home_name, self.home)
        self.fixed = {
            node
            for node in graph.nodes
            if node.op == "call_function" and target_name(node) in DETERMINED and not is_rewritten_later(node, tree.get_submodule)
        }

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        if node.op == "get_attr" and node.target not in self.parameters:
            self.stand[node] = functools.reduce(getattr, str(node.target).split("."), self.tree)
            return
        self.stand[node] = self._proxy(node)
        if node.op not in ("call_function", "call_method"):
            return
        given: list[Any] = []
        args, kwargs = map_arg((node.args, node.kwargs), self.stand.__getitem__)
        map_aggregate((args, kwargs), given.append)
        if node.target in (made_object, made_state):
            self._object(node)
        elif node.target is found_class:
            self._through(node, functools.partial(operator.getitem, (found_class(*node.args),), 0), only_nodes=True)
        elif _own(node.target):
            self._through(node, self._function(node))
        elif any(isinstance(one, fx.Proxy) for one in given):
            if not self._stays(node, args, kwargs):
                self._through(node, self._function(node))
        elif node in self.fixed and not node.all_input_nodes:
            self.stand[node] = cast(Any, node.target)(*args, **kwargs)
        else:
            small = self._small(node)
            self._through(node, self._function(node) if small is None else small, only_nodes=small is not None)

    def _proxy(self, node: fx.Node) -> fx.Proxy:
        return self.tracer.create_proxy("placeholder", node.name, (), {})

    def _stays(self, node: fx.Node, args: Any, kwargs: Any) -> bool:
        """Whether the call, with proxies, is recorded."""
        if getattr(node.target, "__module__", "") == "math":  # fx replaces these in the code that it traces
            return True
        try:
            target: Any = node.target
            method = isinstance(target, str)
            called = getattr(args[0], target) if method else target
            return isinstance(called(*args[method:], **kwargs), fx.Proxy)
        except FAULTS:
            return False

    def _small(self, node: fx.Node) -> fx.GraphModule | None:
        """The call alone, as a graph module of the tensors that it takes, which scripts; None where that would not be traced again."""
        graph = fx.Graph()
        inputs = {one: graph.placeholder(f"x{i}") for i, one in enumerate(node.all_input_nodes)}
        graph.output(graph.node_copy(node, inputs.__getitem__))
        proxies: Any = self._proxy
        args, kwargs = map_arg((node.args, node.kwargs), proxies)
        return fx.GraphModule(nn.Module(), graph) if inputs and self._stays(node, args, kwargs) else None

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        """What the node calls, as a function that pickles where fxprune is not installed."""
        if isinstance(node.target, str):  # of a tensor: methods of proxies stay
            method: Callable[..., Any] = getattr(torch.Tensor, node.target)
            return method
        target: Any = node.target
        plain: Callable[..., Any] = getattr(target, "plain", target)
        if _own(plain):
            raise UnsupportedError(
                f"the slim network calls {getattr(target, '__name__', target)!r} of fxprune at {node.name!r}, so it cannot be detached; "
                "export it with torch.export.export(slim, inputs)"
            )
        return plain

    def _object(self, node: fx.Node) -> None:
        """An object without its constructor, then what it holds."""
        kind, held = cast("tuple[str, dict[str, Any]]", node.args)
        cls = found_class(kind)
        create = self._module(functools.partial(cls.__new__, cls), cls.__name__)
        keep = self._module(object.__setattr__, "setattr")
        with self.graph.inserting_before(node):
            made = self.graph.call_module(create)
            for key, value in held.items():
                self.graph.call_module(keep, (made, key, value))
        self._replace(node, made)

    def _through(self, node: fx.Node, called: Any, only_nodes: bool = False) -> None:
        path = self._module(called, target_name(node))
        with self.graph.inserting_before(node):
            made = self.graph.call_module(path, *((tuple(node.all_input_nodes), {}) if only_nodes else (node.args, node.kwargs)))
        self._replace(node, made)

    def _replace(self, node: fx.Node, made: fx.Node) -> None:
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        self.stand[made] = self.stand.pop(node)

    def _module(self, called: Any, name: str) -> str:
        """The path of the module that calls ``called``."""
        key = called if not isinstance(called, (functools.partial, nn.Module)) else id(called)
        if key not in self.paths:
            module: Any = called if isinstance(called, nn.Module) else nn.Module()
            if module is not called:
                module.forward = called
            module._is_impure = True  # it may write, or draw numbers: never dead code
            path = name = re.sub(r"\W", "_", name).lstrip("_") or "call"
            while hasattr(self.home, path) or keyword.iskeyword(path):
                path = f"{name}_{len(self.paths)}"
            self.home.add_module(path, module)
            self.paths[key] = f"{self.home_name}.{path}"
            self.kept.append(called)
        return self.paths[key]


def _own(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).startswith("fxprune.")
