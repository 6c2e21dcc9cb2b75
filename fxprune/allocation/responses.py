"""The original network run on calibration inputs with the gradients of its output at every layer that reads a group.

The output is projected on random directions, drawn again for every sample, so that the mean square of what a change of the weights does
along them is the squared change of the output: for a change D of a layer's weights it is the mean over samples of <D, G>^2, G being the
sample's own gradient of that weight. No labels are needed, positions count with their correlation, and so do layers with each other.
(Gauss-Newton by random projection; with directions from the output's own distribution this would be its Fisher information, which says
next to nothing on images that the network is sure of.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxprune.allocation.readers import Reader, readers_of
from fxprune.errors import EvaluationError, InputError, in_a_line
from fxprune.evaluation.batches import inputs_of
from fxprune.evaluation.running import call, device_of, modes_kept, to_device
from fxprune.passes.compat import tree_leaves
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.repair.matrices import Form

INSTEAD = "an error table needs gradients; search without one"
Seen = Callable[[Reader, Tensor, Tensor], None]
"""(reader, its inputs, its output or the gradient there)"""


class Responses:
    """Runs a copy of the original on calibration batches; layers are told apart by their weight's qualified name.

    ``wanted``: weights that read a group. ``readers``: those that can be refitted. ``rest``: the others, and ``whole``, those that make a
    group which nothing reads through a weight (queries and keys); their gradients are kept whole.
    ``batches``: (inputs, labels) or inputs alone.
    """

    def __init__(self, graph: CouplingGraph, batches: Iterable[Any], wanted: set[str], whole: set[str]) -> None:
        self.batches = [inputs_of(batch, graph.inputs) for batch in batches]
        if not self.batches:
            raise InputError("an error table needs calibration data: pass calibration=[inputs, ...], a few hundred inputs or more")
        everything = np.ones(int(graph.starts[-1]), dtype=bool)
        self.root: Any = Slimmer(graph, everything).run().eval()
        self.device = device_of(self.root)
        for parameter in self.root.parameters():
            parameter.requires_grad_(False)
        self._watching: Seen | None = None
        self._hearing: Seen | None = None
        self.readers: dict[str, Reader] = {}
        for part in graph.traced.sections:
            module = self.root.get_submodule(part) if part else self.root
            found = readers_of(module, module.eval_graph, f"{part}." if part else "", wanted)
            self.readers.update((one.name, one) for one in found)
            self._attend(module, {call.node: (one, call.source) for one in found for call in one.calls})
        own = dict(self.root.named_parameters(remove_duplicate=False))
        self.rest = {name: own[name] for name in sorted((wanted - set(self.readers)) | whole) if name in own}

    def forward(self, batch: int, seen: Seen) -> None:
        """Run a batch; ``seen`` gets every reader's inputs and output."""
        self._watching, self._hearing = seen, None
        with torch.no_grad():
            self._called(batch)

    def backward(self, batch: int, seed: int, heard: Seen, seen: Seen | None = None) -> dict[str, Tensor]:
        """Run a batch, there and back; ``heard`` gets every reader's inputs and the gradient at its output, of the output projected.

        Returns the gradients of ``rest``, summed over the batch. What is drawn depends on ``seed`` and ``batch`` alone.
        """
        self._watching, self._hearing = seen, heard
        for parameter in self.rest.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        try:
            with torch.enable_grad():
                projected = _projected(self._called(batch), torch.Generator().manual_seed(seed * 1_000_003 + batch))
                if projected.requires_grad:
                    projected.backward()
                elif self.readers or self.rest:
                    raise EvaluationError(f"no gradient of the network's output reaches its weights (forward detaches them); {INSTEAD}")
            return {name: p.grad for name, p in self.rest.items() if p.grad is not None}
        except (RuntimeError, NotImplementedError) as error:
            raise EvaluationError(f"the network cannot be differentiated on the calibration data: {in_a_line(error)}; {INSTEAD}") from error
        finally:
            for parameter in self.rest.values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def _called(self, batch: int) -> Any:
        with modes_kept(self.root):
            return call(self.root, to_device(self.batches[batch], self.device))

    def _attend(self, module: Any, readers: dict[fx.Node, tuple[Reader, fx.Node]]) -> None:
        signature = inspect.signature(module.forward)
        runner = _Attending(module, module.eval_graph, readers, self)

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return runner.run(*bound.args, *bound.kwargs.values())

        module.forward = forward

    def met(self, reader: Reader, inputs: Tensor, output: Tensor) -> Tensor:
        """A reader has run; returns what is to be taken for its output."""
        if self._watching is not None:
            with torch.no_grad():
                self._watching(reader, inputs.detach(), output.detach())
        if self._hearing is None:
            return output
        hearing, held = self._hearing, inputs.detach()
        # The first layers depend on nothing that needs a gradient; what comes next may write into the output.
        watched = output if output.requires_grad else output.detach().requires_grad_(True)

        def hear(gradient: Tensor) -> None:
            with torch.no_grad():
                hearing(reader, held, gradient.detach())

        watched.register_hook(hear)
        return watched.clone()


class _Attending(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, readers: dict[fx.Node, tuple[Reader, fx.Node]], responses: Responses) -> None:
        super().__init__(module, graph=graph)
        self.readers, self.responses = readers, responses

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.readers:
            return super().run_node(n)
        reader, source = self.readers[n]
        inputs = self.env[source]
        if any(_writes(user, self.module) for user in source.users):
            inputs = inputs.detach().clone()
        return self.responses.met(reader, inputs, super().run_node(n))


def _writes(node: fx.Node, module: Any) -> bool:
    """Whether a node may write into what it is given."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__")) or name.startswith(("iadd", "imul", "isub"))


def _projected(output: Any, drawn: torch.Generator) -> Tensor:
    """The output's floating tensors along random directions of unit variance; of class scores, (samples, classes), without their mean."""
    terms = directed(output, drawn)
    found = terms[0].sum()
    for term in terms[1:]:
        found = found + term.sum()
    return found


def directed(output: Any, drawn: torch.Generator) -> list[Tensor]:
    """The output's floating tensors times random directions, entry by entry."""
    found: list[Tensor] = []
    for tensor in tree_leaves(_plain(output)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        value = tensor.float()
        if not torch.isfinite(value).all():
            raise EvaluationError("the network's output on the calibration data is not finite; check the data and the weights")
        direction = torch.randn(value.shape, generator=drawn).to(value.device)
        if value.ndim == 2 and value.shape[1] > 2:
            direction = direction - direction.mean(1, keepdim=True)
        found.append(value * direction)
    if not found:
        raise InputError(f"the network's output, a {type(output).__name__}, holds no floating tensor to measure errors by")
    return found


def _plain(output: Any) -> Any:
    """Dataclasses and mappings of the user's own as dictionaries."""
    if isinstance(output, (Tensor, tuple, list, dict)):
        return output
    return dict(output.items()) if hasattr(output, "items") else dict(vars(output)) if hasattr(output, "__dict__") else output


def per_sample(reader: Reader, inputs: Tensor, gradient: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Each sample's gradient of the weights, (samples, outputs * features), and of a constant at the output, (samples, outputs).

    Where rows cannot be told apart by sample, all of them are one, given back as many times as there are samples, each with its share:
    summed squares then mean the same.
    """
    form, weight = reader.layer.form, reader.layer.weight
    if not form.space:
        weights, constants = _of_rows(inputs, gradient)
    else:
        x, g = (t.unsqueeze(0) if t.ndim == weight.ndim - 1 else t for t in (inputs, gradient))
        weights, constants = _of_windows(form, weight, x, g)
    if len(weights) == samples:
        return weights, constants
    if len(weights) % samples == 0:
        return weights.unflatten(0, (samples, -1)).sum(1), constants.unflatten(0, (samples, -1)).sum(1)
    share = samples**-0.5
    return share * weights.sum(0, keepdim=True).expand(samples, -1), share * constants.sum(0, keepdim=True).expand(samples, -1)


def _of_rows(inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, g = (t.float().reshape(t.shape[0], -1, t.shape[-1]) if t.ndim > 1 else t.float().reshape(1, 1, -1) for t in (inputs, gradient))
    return torch.bmm(g.transpose(1, 2), x).flatten(1), g.sum(1)


def _of_windows(form: Form, weight: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's weight gradient with every sample as a group of its own: one call for the batch."""
    padded = F.pad(x.float(), form.pads, mode=form.mode)
    count, outputs = g.shape[:2]
    shape = (count * outputs, padded.shape[1], *weight.shape[2:])
    found = torch.ops.aten.convolution_backward(
        g.float().reshape(1, count * outputs, *g.shape[2:]),
        padded.reshape(1, -1, *padded.shape[2:]),
        padded.new_empty(1).expand(shape),
        None,
        list(form.stride),
        [0] * form.space,
        list(form.dilation),
        False,
        [0] * form.space,
        count,
        [False, True, False],
    )[1]
    return found.reshape(count, -1), g.float().flatten(2).sum(2)
