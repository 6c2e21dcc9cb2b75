"""What the parts of the tracer may ask of it: proxies, patches, functions with a backward, graphs as input and module state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.ir.skeleton import Skeleton
from fxprune.passes.tracing.sizes.specialisation import Asked


class Recorder(Protocol):
    """The tracer at work, as seen by the helpers that it calls.

    ``graph``: what is being recorded. ``read``: names of tensors whose values
    Python code has read. ``constants``: attribute name -> tensor that the graph holds beside parameters and buffers. ``busy``: an
    operation runs for its shape, and nothing is recorded meanwhile. ``gradients``: whether the code at work is in no block without them.
    ``own_backward``: the code at work is that of a function with a backward of its own, which has no gradients in it anyway.
    ``source``: the node being traced, where the module is a graph already. ``devices``: those of the blocks at
    work (``with x.device``), and which torch made tensors on around each.
    """

    graph: fx.Graph
    skeleton: Skeleton
    read: set[str]
    constants: dict[str, torch.Tensor]
    asked: Asked
    busy: bool
    gradients: bool
    own_backward: bool
    source: fx.Node | None
    device: torch.device
    devices: list[tuple[Any, torch.device]]

    @property
    def recording(self) -> bool:
        """Whether the caller runs on the tracing thread, and not within an operation that runs for its shape."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """A proxy for a new node."""

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None) -> fx.Node:
        """A new node, with its value and its place in the user's source."""

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The proxy of a parameter or buffer; anything else as it is."""

    def aside(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Graph:
        """``function(*args)`` traced into a graph of its own, with an input for every proxy in the order in which fx meets them."""

    def default_device(self) -> torch.device:
        """Where torch makes tensors: in a block of a device, there."""

    def shape_of(self, proxy: Any) -> Any:
        """The shape of a tensor's proxy, as a tuple of size proxies."""

    def actual(self, node: fx.Node) -> Any:
        """The values of a tensor (or of several) that does not depend on the inputs, or None."""

    def note(self, kind: NoteKind, text: str, where: str = "") -> None:
        """Note something that a user should know of the trace."""

    def specialised(self, proxy: Any, what: str) -> None:
        """Code asked ``proxy`` for a number."""

    def moves(self, value: Any) -> bool:
        """Whether ``value`` is the proxy of a number that a size of the input enters, or that is an input."""

    def follows(self, value: Any) -> bool:
        """Whether a number that code reads from ``value``, a tensor of one element, is recorded rather than known."""

    def lists(self, proxy: Any) -> bool:
        """Whether ``tolist()`` gives numbers that are recorded."""

    def unrolled(self, proxy: Any) -> None:
        """Code loops over a tensor, or over the parts of one."""

    def mapped(self, given: Any, axis: int) -> int:
        """How often ``torch.vmap`` calls its function for ``given`` along ``axis``."""

    def refuse_block(self, what: str) -> None:
        """Raise ``TraceError`` where the module at work is better kept whole than traced without its ``what`` block."""

    def here(self) -> str:
        """file:line in the user's source."""
