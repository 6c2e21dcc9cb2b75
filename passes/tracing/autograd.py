"""Functions with a backward of their own (``torch.autograd.Function``): they stay calls, so that the slim module trains as the original.

``forward`` is traced into a graph of its own, the *body*, which hangs on the call and is only read: the labels walk through it. Where an
argument in the body may have to change with the channels, or it reads a size or a tensor of the model, the call cannot stay: then
``forward`` is traced into the network's graph like any other code, and a note says that its backward is lost.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointFunction

from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.rules import registry
from fxprune.passes.tracing.recorder import Recorder

Function = type[torch.autograd.Function]


class AutogradCall:
    """``function.apply`` as a call's target: fx prints targets by their names, and all of those are called ``apply``."""

    _made: WeakValueDictionary[Function, AutogradCall] = WeakValueDictionary()
    function: Function
    __name__: str
    __qualname__: str

    def __new__(cls, function: Function) -> AutogradCall:
        """The one of this function: fx takes two targets of one name in a graph for a mistake."""
        made = cls._made.get(function)
        if made is None:
            made = cls._made[function] = super().__new__(cls)
            made.function = function
            made.__name__ = made.__qualname__ = function.__name__
        return made

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)

    @property
    def plain(self) -> Any:
        """The same, without a class of ours."""
        return self.function.apply

    def __reduce__(self) -> tuple[type[AutogradCall], tuple[Function]]:
        return AutogradCall, (self.function,)


class _Context:
    """What ``forward`` gets as ``ctx``; nothing that it keeps there is read."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("save_for_", "mark_", "set_")):
            return lambda *_: None
        raise AttributeError(name)


def traced_call(tracer: Recorder, function: Function, args: tuple[Any, ...]) -> Any:
    """What tracing makes of ``function.apply(*args)``."""
    forward = functools.partial(_forward, tracer, function)
    if function is CheckpointFunction:  # it saves memory; the gradient is that of what it runs
        run, _, *inputs = args
        return run(*inputs)
    body = tracer.aside(forward, args)
    if not any(_may_change(node) for node in body.nodes):
        made = tracer.create_proxy("call_function", AutogradCall(function), args, {})
        made.node.meta["body"] = body
        return made
    why = "because a number in it depends on the channels"
    text = f"the slim module computes the forward of {function.__name__} without its backward, {why}"
    tracer.note(NoteKind.LOST, text, tracer.here())
    return forward(*args)


def _forward(tracer: Recorder, function: Function, *args: Any) -> Any:
    own_setup = function.setup_context is not torch.autograd.Function.setup_context
    # Where it goes into the network's graph, gradients go through all of it, blocks without gradients too: a backward of its own does so.
    before, tracer.own_backward = tracer.own_backward, True
    try:
        forward = type.__getattribute__(function, "forward")  # rather than what stands in for it while tracing
        return forward(*args) if own_setup else forward(_Context(len(args)), *args)
    finally:
        tracer.own_backward = before


def _may_change(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return False
    if node.op == "call_function":
        rule = registry.function_rule(node.target)
    elif node.op == "call_method" and node.target != "size":
        rule = registry.METHODS.get(str(node.target))
    else:
        return True
    return rule is not None and rule.rewrite is not None and not _is_a_number(node)


def _is_a_number(node: fx.Node) -> bool:
    """Whether it makes a tensor without axes of what is none, as ``torch.tensor(torch.finfo(x.dtype).min)`` does."""
    value = node.meta.get("val")
    read = (n.meta.get("val") for n in node.all_input_nodes)
    return isinstance(value, torch.Tensor) and not value.ndim and not any(isinstance(v, torch.Tensor) for v in read)
