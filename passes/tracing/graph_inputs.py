"""A module that is a graph already is traced node by node, so that what each node knows of its origin is kept.

Its generated ``forward`` would do as well, but its lines are nobody's source. Nodes of an exported program know the user's line and
the module they come from; those of a slim module what fxprune noted. Submodules that an exported graph keeps for a ``no_grad`` or
``autocast`` block are written out in place.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from fxprune.errors import TraceError
from fxprune.passes.compat import HigherOrderOperator, OpOverload, OpOverloadPacket, PyTreeCodeGen, find_proxy, fx_pytree, tree_unflatten
from fxprune.passes.ir.factories import FACTORIES, RANDOM_FACTORIES
from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.ir.slim_module import SlimModule
from fxprune.passes.tracing.recorder import Recorder
from fxprune.passes.tracing.sizes.arithmetic import RECORDED

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_BLOCKS = {"wrap_with_set_grad_enabled": ("no_grad", 1), "wrap_with_autocast": ("autocast", 4)}
_FACTORIES = frozenset(getattr(torch, name) for name in FACTORIES + RANDOM_FACTORIES)
_LIMITS = frozenset((torch.finfo, torch.iinfo))


def graph_of(module: nn.Module) -> fx.Graph | None:
    """The graph that ``module`` runs, or None where it is no graph module, or one with a ``forward`` of its own."""
    if not isinstance(module, fx.GraphModule) or "forward" in module.__dict__:
        return None
    if isinstance(module, SlimModule):
        graphs = module.to_read
        return graphs["train" if "train" in graphs and module.training else "eval"]
    graph: fx.Graph = module.graph
    return graph if type(graph._codegen) in (CodeGen, PyTreeCodeGen) else None


def interpret(tracer: Recorder, module: Any, graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run ``graph`` of ``module`` on proxies and return what the module would."""
    env: dict[fx.Node, Any] = {}
    given = _inputs(module, graph, args, kwargs)
    outer = tracer.source
    try:
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
                continue
            tracer.source = node
            a, k = map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "output":
                out = a[0]
                break
            env[node] = _run(tracer, module, node, a, k)
    finally:
        tracer.source = outer
    spec = graph._codegen.pytree_info.out_spec if isinstance(graph._codegen, PyTreeCodeGen) else None
    return out if spec is None else tree_unflatten(out if isinstance(out, (list, tuple)) else [out], spec)


def _inputs(module: Any, graph: fx.Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What each placeholder receives: arguments in the order of ``forward``, taken apart where the graph was made of nested ones."""
    codegen = graph._codegen
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    flat: list[Any] = []
    for parameter in bound.signature.parameters.values():
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            flat += value
        elif parameter.kind is parameter.VAR_KEYWORD:
            flat += value.values()
        else:
            flat.append(value)
    if not isinstance(codegen, PyTreeCodeGen):
        return iter(flat)
    spec = codegen.pytree_info.in_spec
    children = spec.children() if hasattr(spec, "children") else spec.children_specs  # the second is that of older versions of torch
    if spec.type is tuple and len(children) == 2 and children[0].type is tuple and children[1].type is dict:
        count = children[0].num_children
        return iter(fx_pytree.tree_flatten_spec((flat[:count], dict(zip(children[1].context, flat[count:], strict=True))), spec))
    return iter(fx_pytree.tree_flatten_spec(flat, spec))


def _run(tracer: Recorder, module: Any, node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "get_attr":
        return _attribute(module, target)
    if node.op == "call_module":
        return _attribute(module, target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if isinstance(target, HigherOrderOperator):
        return _block(tracer, target, args)
    if isinstance(target, (OpOverload, OpOverloadPacket)) or target in _FACTORIES:
        return tracer.create_proxy("call_function", target, args, kwargs)
    read = target in (int, float) and any(map(tracer.follows, args))
    moved = target in RECORDED and any(map(tracer.moves, args))
    if read or moved or (target in _LIMITS and find_proxy(args, kwargs) is not None):
        return tracer.create_proxy("call_function", target, args, kwargs)  # called, they would give the numbers of the example
    return target(*args, **kwargs)


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _block(tracer: Recorder, target: Any, args: tuple[Any, ...]) -> Any:
    """A block of an exported graph, written out. What a graph cannot keep of it is said where it would matter."""
    name = target.name() if callable(getattr(target, "name", None)) else str(target)
    if name not in _BLOCKS:
        raise TraceError(f"{tracer.here()}: the exported operation {name} holds graphs of its own and cannot be pruned through")
    what, place = _BLOCKS[name]
    body, inner = args[place], args[place + 1 :]
    if what == "autocast":
        tracer.note(NoteKind.LOST, f"a {what} block cannot be kept in a graph; the slim module computes without it", tracer.here())
        return body(*inner)
    before, tracer.gradients = tracer.gradients, bool(args[0])
    try:
        return body(*inner)
    finally:
        tracer.gradients = before


def origin(node: fx.Node, skip: Callable[[str], bool]) -> tuple[str, str]:
    """(file:line in the user's source, qualified name of the module) that a node of a graph module remembers; "" where it does not."""
    where = str(node.meta.get("where") or "")
    if not where:
        frames = [f for f in _FRAME.findall(str(node.meta.get("stack_trace") or "")) if not skip(f[0])]
        where = ":".join(frames[-1]) if frames else ""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else node.meta.get("owner")
    return where, str(path or "").removeprefix("L['self'].")
