"""The zeroing oracle: a slim network computes what the original computes with the removed slices set to zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.errors import FAULTS, VerificationError, first_line
from fxprune.evaluation.copying import copied
from fxprune.evaluation.repeatable import cloned, same_random_numbers
from fxprune.evaluation.running import set_training
from fxprune.passes.compat import tree_leaves, tree_map_only
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph
from fxprune.passes.ir.nodes import CHOOSING, target_name
from fxprune.passes.ir.notes import NoteKind
from fxprune.passes.ir.outputs import chosen, returned_tensors
from fxprune.passes.labels.choices import Choice
from fxprune.passes.labels.values import Value, Vector, values
from fxprune.passes.planning.plan import Keep
from fxprune.passes.rewriting.blocks import with_zeroed_blocks
from fxprune.passes.rewriting.slimmer import Slimmer
from fxprune.passes.tracing.side_effects.history import KNOWN, past
from fxprune.passes.tracing.side_effects.isolation import standing_in

TOLERANCE = 1e-4  # relative to the largest magnitude of the output, in float32
Kept = Mapping[str, Mapping[int, torch.Tensor]]

# Operations that draw random numbers: fewer channels draw fewer of them, so the channels that stay would get others.
_DRAWING = frozenset(
    {
        *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli", "multinomial"),
        *("poisson", "normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_", "geometric_", "log_normal_"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "rrelu"),
        *("gumbel_softmax", "native_dropout", "fractional_max_pool2d", "fractional_max_pool3d"),
    }
)


def zeroed(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of ``model`` with every slice that is not kept set to zero; running variances and index buffers stay."""
    twin = copied(model)
    set_training(twin, False)
    tensors = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, dims in kept.items():
            if name.endswith("running_var") or not tensors[name].is_floating_point():
                continue
            if 0 in tensors[name].stride():  # expanded: its slices share their memory
                tensors[name].data = tensors[name].data.clone(memory_format=torch.contiguous_format)
            for dim, indices in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten().to(tensors[name].device), 0)
    return twin


def difference(reference: Any, other: Any) -> float:
    """Largest relative difference over all tensors of two nested outputs; infinite where shapes differ or a value is not finite."""
    worst = 0.0
    beside = {id(t) for t in returned_tensors(reference, objects=False)}
    for a, b in zip(returned_tensors(reference), returned_tensors(other), strict=True):
        if a.shape != b.shape:
            if id(a) in beside:
                return float("inf")
            continue  # a cache that the next call takes back (``made_state``); other objects keep their widths
        if a.numel():
            gap = ((a.double() - b.double()).abs().max() / (a.double().abs().max() + 1e-6)).item()
            worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def verify(graph: CouplingGraph, keep: Keep, slim: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], norms: str = "plain") -> float:
    """Run the oracle on the given inputs, on the groups for which it is defined, and return the relative difference.

    Groups whose channels share a statistic (layer norm or a reduction over channels) are put back for the comparison; the whole slim
    network is then only run. In a softmax over channels, and where the best of them are chosen (a router's experts), those that went are
    minus infinity in the original: nobody chooses them, and they have no share. Everything is run on copies, with the same random numbers:
    modules, inputs and generators come out as they were. Where the numbers differ because of scores that are next to equal before a choice
    among them (top-k, sorting, thresholds), or because fewer channels draw fewer random numbers, the slim network is run again with the
    choices and draws of the original. Where the original also takes another batch size, or another resolution or length, these are compared
    as well, unless a note already says that the network was specialised to the example.

    Raises:
        VerificationError: names the first node that differs, and its line; or the size at which the slim network fails.
    """
    with torch.no_grad():
        _run(copied(slim).eval(), args, kwargs)
        defined = keep.copy()
        masks = [choice for choice in graph.choices if norms in choice.norms and choice.mode in graph.traced.eval_modes]
        unseen = {g for choice in masks if choice.mode != "eval" or graph.traced.in_parts for g in graph.groups_along(choice.vector)}
        for group in graph.groups:
            if norms not in group.proved or group.number in unseen:
                defined[graph.starts[group.number] : graph.starts[group.number + 1]] = True
        slimmer = Slimmer(graph, defined, norms)
        names = graph.traced.skeleton
        kept = {alias: dims for n in names.names if (dims := slimmer.kept_dims(n)) for alias in names.aliases[n]}
        part = copied(slim).eval() if (defined == keep).all() else Slimmer(graph, defined, norms).run().eval()
        masks = [choice for choice in masks if slimmer.kept_of(choice.vector) is not None]
        pair = _Pair(graph, slimmer, zeroed(graph.model, kept), part, masks)
        gap = pair.difference(args, kwargs)
        if not gap < TOLERANCE:
            raw, gap = gap, pair.same_choices(args, kwargs)
            if not gap < TOLERANCE:
                raise VerificationError(pair.report(args, kwargs, raw))
        if not any(note.kind is NoteKind.SIZE for note in graph.notes):
            for what, (others, keywords) in _other_sizes(args, kwargs):
                pair.check_size(what, others, keywords)
        return gap


def verify_blocks(graph: CouplingGraph, blocks: Sequence[Block], slim: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The oracle for blocks left out: ``slim`` computes what the original computes with the branches' outputs multiplied by zero.

    Raises:
        VerificationError: names the blocks, and how far the two differ.
    """
    with torch.no_grad():
        reference = with_zeroed_blocks(graph, blocks).eval()
        gap = difference(_run(reference, args, kwargs), _run(copied(slim).eval(), args, kwargs))
    if not gap < TOLERANCE:
        names = ", ".join(repr(block.name) for block in blocks)
        raise VerificationError(f"without {names} the network differs by {gap:.1e} from the original with them at zero; please report it")
    return gap


def _run(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with same_random_numbers():
        return module(*cloned(args), **cloned(dict(kwargs)))


class _Pair:
    """The zeroed original and the slim network. Each question runs copies of both, since what ran once may keep something of it."""

    def __init__(self, graph: CouplingGraph, slimmer: Slimmer, reference: nn.Module, slim: Any, masks: Sequence[Choice] = ()) -> None:
        self.graph, self.slimmer, self.reference, self.slim, self.masks = graph, slimmer, reference, slim, masks

    def difference(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        return self._gap(self._wanted(args, kwargs), _run(copied(self.slim), args, kwargs))

    def _gap(self, wanted: Any, found: Any) -> float:
        """The difference of two results; what is returned beside the outputs that were asked for is compared as far as it is kept."""
        outputs = self.graph.options.get("outputs")
        if outputs is None or self.graph.traced.in_parts:
            return difference(wanted, found)
        last = next(iter(reversed(self.graph.traced.graphs["eval"].nodes)))
        known = list(values(map_arg(last.args[0], self.graph.values["eval"].get)))
        tensors = returned_tensors(wanted)
        if len(known) != len(tensors):  # objects, whose parts the graph does not see
            return difference(chosen(wanted, outputs), chosen(found, outputs))
        cut = [_cut(self.slimmer, value, tensor) for value, tensor in zip(known, tensors, strict=True)]
        return difference(cut, returned_tensors(found))

    def _wanted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the zeroed original computes: tables that know the user's modules know those of the copy meanwhile."""
        if self.masks:
            with same_random_numbers():
                return self._original().run(*cloned([*args, *kwargs.values()]))
        model, twin = self.graph.model, copied(self.reference)
        with standing_in(past(self.graph.traced.skeleton, KNOWN)[-1].reach, dict(zip(model.modules(), twin.modules(), strict=True))):
            return _run(twin, args, kwargs)

    def check_size(self, what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        try:
            wanted = self._wanted(args, kwargs)
        except FAULTS:
            return  # the original does not take this size
        try:
            found = _run(copied(self.slim), args, kwargs)
        except FAULTS as error:
            raise VerificationError(
                f"at {what} the original runs and the slim network fails: {first_line(error)}; report it, or analyse with that size"
            ) from error
        gap = self._gap(wanted, found)
        if not gap < TOLERANCE and not self.same_choices(args, kwargs) < TOLERANCE:
            raise VerificationError(
                f"at {what} the outputs differ from the zeroed original by {gap:.1e}; report it, or analyse with that size"
            )

    def same_choices(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The difference of the outputs where the slim network takes the choices and the random numbers of the original.

        A choice is taken over only where both chose from numbers that agree within the tolerance.
        """
        if self.graph.traced.in_parts:
            return float("inf")
        traced = self.graph.traced.graphs["eval"]
        if not any(target_name(node) in CHOOSING | _DRAWING or _drawing_module(self.reference, node) for node in traced.nodes):
            return float("inf")
        slim: Any = copied(self.slim)
        if not hasattr(slim, "graphs"):  # the user's class: its graph stands for it, if both compute the same
            slim = Slimmer(self.graph, self.slimmer.keep, self.slimmer.norms).run().eval()
            if not difference(_run(slim, args, kwargs), _run(copied(self.slim), args, kwargs)) < TOLERANCE:
                return float("inf")
        first = self._original()
        second = _Follower(slim, slim.graphs["eval"], self.graph, self.slimmer, first.seen, traced)
        flat = [*args, *kwargs.values()]
        with same_random_numbers():
            wanted = first.run(*cloned(flat))
        with same_random_numbers():
            return self._gap(wanted, second.run(*cloned(flat)))

    def report(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], gap: float) -> str:
        """Which node is wrong first: both graphs run node by node, the original's values cut to what is kept."""
        if self.graph.traced.in_parts or not hasattr(self.slim, "graphs"):
            return f"the outputs differ from the zeroed original by {gap:.1e}; report it"
        traced = self.graph.traced.graphs["eval"]
        slim: Any = copied(self.slim)
        flat = [*args, *kwargs.values()]
        first, second = self._original(), _Recorder(slim, slim.graphs["eval"])
        with same_random_numbers():
            first.run(*cloned(flat))
        with same_random_numbers():
            second.run(*cloned(flat))
        for node in traced.nodes:
            mine, theirs = first.seen.get(node.name), second.seen.get(node.name)
            value = self.graph.values["eval"].get(node)
            if not isinstance(mine, torch.Tensor) or not isinstance(theirs, torch.Tensor) or not isinstance(value, Value):
                continue
            if (found := difference(_cut(self.slimmer, value, mine), theirs)) >= TOLERANCE:
                what = f"node {node.name!r} differs from the zeroed original by {found:.1e} (outputs by {gap:.1e})"
                return f"{node.meta.get('where', '')}: {what}; report it, and pass its layer to ignore= meanwhile"
        return f"the outputs differ from the zeroed original by {gap:.1e}, no single node does; report it"

    def _original(self) -> _Recorder:
        """Runs the graph of the zeroed original, with what went at minus infinity where the best are chosen."""
        masks = {choice.node: (choice.axis, kept) for choice in self.masks if (kept := self.slimmer.kept_of(choice.vector)) is not None}
        return _Recorder(self._with_constants(), self.graph.traced.graphs["eval"], masks)

    def _with_constants(self) -> nn.Module:
        """A copy of the zeroed original that has the constants of the traced graph as well."""
        twin = copied(self.reference)
        for name, tensor in self.graph.traced.constants.items():
            path, _, key = name.rpartition(".")
            setattr(twin.get_submodule(path), key, tensor)
        return twin


def _other_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Inputs of another batch size, and of another resolution or length, in words and as they are passed."""
    given = (args, dict(kwargs))
    tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor) and t.ndim > 1]
    if not tensors:
        return
    batch = tensors[0].shape[0]

    def more(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor[:1]]) if tensor.ndim and tensor.shape[0] == batch else tensor

    if batch:
        yield f"batch size {batch + 1}", tree_map_only(torch.Tensor, more, given)
    first = tensors[0]
    spatial = first.ndim > 3 and first.is_floating_point()
    last, length = first.shape[-1], first.shape[1]
    if spatial and last > 1:
        # Half as wide again suits networks that halve the resolution some times; the original says which it takes.
        wider = last + max(last // 2, 1)

        def wide(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim != first.ndim or tensor.shape[-1] != last:
                return tensor
            return torch.cat([tensor, tensor[..., : wider - last]], -1)

        yield f"width {wider}", tree_map_only(torch.Tensor, wide, given)
    elif not spatial and length > 2 and (first.ndim == 3 or not first.is_floating_point()):

        def short(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:, :-1] if tensor.ndim > 1 and tensor.shape[:2] == first.shape[:2] else tensor

        yield f"length {length - 1}", tree_map_only(torch.Tensor, short, given)


def _drawing_module(root: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(root.get_submodule(str(node.target)), (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))


def _cut(slimmer: Slimmer, value: Value, tensor: torch.Tensor) -> torch.Tensor:
    """What is kept of a tensor that the original computed."""
    for axis in value.axes:
        kept = slimmer.kept(value, axis)
        tensor = tensor if kept is None else tensor.index_select(axis, torch.from_numpy(kept).to(tensor.device))
    left = None if value.picks is None else slimmer.kept_of(value.picks)
    if left is not None:  # positions among what is left
        tensor = torch.searchsorted(torch.from_numpy(left).to(tensor.device), tensor.long()).to(tensor.dtype)
    return tensor


class _Recorder(fx.Interpreter):
    """Runs a graph on a module and keeps what every node gave.

    ``masks``: nodes whose first input is minus infinity but for these positions along an axis.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, masks: Mapping[fx.Node, tuple[int, Vector]] | None = None) -> None:
        super().__init__(module, graph=graph)
        self.seen: dict[str, Any] = {}
        self.masks = masks or {}

    def run_node(self, n: fx.Node) -> Any:
        result = self._masked(n) if n in self.masks else super().run_node(n)
        self.seen[n.name] = tree_map_only(torch.Tensor, torch.clone, result)
        return result

    def _masked(self, n: fx.Node) -> Any:
        axis, kept = self.masks[n]
        source: Any = n.args[0] if n.args else n.kwargs["input"]
        given = self.env[source]
        masked = torch.full_like(given, float("-inf"))
        places = torch.from_numpy(kept).to(given.device)
        self.env[source] = masked.index_copy_(axis, places, given.index_select(axis, places))
        result = super().run_node(n)
        self.env[source] = given
        return result


class _Follower(fx.Interpreter):
    """Runs a slim graph; what the original drew or chose, from numbers that agree, takes the place of the slim network's own.

    ``seen``: what every node of the original gave, by name.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, coupling: CouplingGraph, slimmer: Slimmer, seen: Mapping[str, Any], traced: fx.Graph
    ) -> None:
        super().__init__(module, graph=graph)
        self.values, self.slimmer, self.seen = coupling.values["eval"], slimmer, seen
        self.nodes = {node.name: node for node in traced.nodes}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        node = self.nodes.get(n.name)
        name = "" if node is None else target_name(node)
        if node is None or node.name not in self.seen:
            return result
        if name in _DRAWING or _drawing_module(self.module, n) or (name in CHOOSING and self._agree(node, n)):
            return self._taken(node, result)
        return result

    def _agree(self, node: fx.Node, mine: fx.Node) -> bool:
        """Whether both chose from the same numbers, within the tolerance."""
        if len(node.all_input_nodes) != len(mine.all_input_nodes):
            return False
        for theirs, own in zip(node.all_input_nodes, mine.all_input_nodes, strict=True):
            wanted, found = self._known(theirs), self.env.get(own)
            if isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor) and difference(wanted, found) >= TOLERANCE:
                return False
        return True

    def _known(self, node: fx.Node) -> Any:
        value, seen = self.values.get(node), self.seen.get(node.name)
        return _cut(self.slimmer, value, seen) if isinstance(value, Value) and isinstance(seen, torch.Tensor) else seen

    def _taken(self, node: fx.Node, result: Any) -> Any:
        """The original's result in place of ``result``, where the two have the same form."""
        value, seen = self.values.get(node), self.seen[node.name]
        if isinstance(seen, torch.Tensor):
            cut = _cut(self.slimmer, value, seen) if isinstance(value, Value) else seen
            same = isinstance(result, torch.Tensor) and cut.shape == result.shape
            if same and node.op == "call_method" and target_name(node).endswith("_"):
                return result.copy_(cut)
            return cut if same else result
        if isinstance(seen, tuple) and isinstance(result, tuple) and len(seen) == len(result):
            values = value if isinstance(value, (tuple, list)) and len(value) == len(seen) else [None] * len(seen)
            parts = [
                _cut(self.slimmer, v, s) if isinstance(v, Value) and isinstance(s, torch.Tensor) else s
                for v, s in zip(values, seen, strict=True)
            ]
            fits = all(getattr(a, "shape", None) == getattr(b, "shape", None) for a, b in zip(parts, result, strict=True))
            return type(result)(parts) if fits else result
        return result
