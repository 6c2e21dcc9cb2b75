"""Units that are zero already: what masks and sparse training left of them, and whether the network computes the same without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune.errors import InputError, kind_of
from fxprune.evaluation.copying import copied
from fxprune.evaluation.repeatable import cloned, same_random_numbers
from fxprune.evaluation.running import call, device_of, evaluating
from fxprune.example_inputs import build
from fxprune.passes.compat import ConvTransposeNd, NormBase, tree_leaves

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
_STEPS = 6  # operations between a layer and the norm before or after it
_PRUNED, _NORMED = ("_orig", "_mask"), ("_g", "_v")  # what torch.nn.utils.prune and the old weight_norm make of a parameter's name
_ENDINGS, _COMPUTED = (*_PRUNED, *_NORMED), "parametrizations."


class _Graph(Protocol):
    """What is asked of a ``CouplingGraph``, which this module must not import."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def inputs(self) -> Any: ...
    @property
    def traced(self) -> Any: ...
    @property
    def keys(self) -> Sequence[tuple[str, int]]: ...
    @property
    def unit_of(self) -> Mapping[tuple[str, int], Any]: ...
    @property
    def starts(self) -> Any: ...
    @property
    def prunable_unit(self) -> Bools: ...
    @property
    def groups(self) -> tuple[Any, ...]: ...
    def is_output(self, key: tuple[str, int]) -> bool: ...


@dataclass(frozen=True)
class Zeros:
    """Which units are zero, one boolean for each unit of the graph.

    ``dead``: nothing but zeros comes out of the layers that produce the unit, or nothing that reads it has another weight than zero.
    ``places``: layer -> units that are zero there; likewise ``layer.weight``, where a bias is all that is left of them.
    """

    dead: Bools
    places: dict[str, Bools]


def zero_units(graph: _Graph) -> Zeros:
    """The units that are zero by the weights the model holds now; nothing is run.

    A layer's unit is zero where its weights and bias are (masked weights count as zero), or where the BatchNorm that alone reads it scales
    and shifts it to zero. A unit is dead where it is zero in every layer that adds to it, or in every layer that reads it.
    """
    count = int(graph.starts[-1]) if len(graph.starts) else 0
    facts = _Facts(graph, count)
    sources, loud = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    has_source, has_reader, read = (np.zeros(count, dtype=bool) for _ in range(3))
    following: set[str] = set()
    for path, layer in facts.layers.items():
        if layer.makes is None:
            continue
        norms = facts.norms_after(path)
        following.update(norms)
        has_source |= layer.makes
        if norms:
            for norm in norms:
                one = facts.layers[norm]
                sources |= layer.makes & ~(one.silent | (layer.silent & one.centred))
        else:
            sources |= layer.makes & ~layer.silent
    for path, layer in facts.layers.items():
        if layer.is_norm and path not in following:
            loud |= layer.own & ~(layer.silent | layer.centred)
        if layer.reads is not None:
            before = facts.layers.get(facts.norm_before(path) or "")
            has_reader |= layer.reads
            read |= layer.reads & ~(layer.unread if before is None else layer.unread | before.own & before.silent)
    dead = graph.prunable_unit & ((has_source & ~sources & ~loud) | (has_reader & ~read))
    places = {}
    for path, layer in facts.layers.items():
        zero = layer.own & layer.silent if layer.makes is not None or layer.is_norm else np.zeros(count, dtype=bool)
        if layer.reads is not None:
            zero = zero | (layer.reads & layer.unread)
        if zero.any():
            places[path] = zero
        if layer.makes is not None and (biased := layer.makes & layer.weightless & ~layer.silent).any():
            places[f"{path}.weight"] = biased
    return Zeros(dead, places)


def check_graph(given: Any, what: str) -> None:
    """Raise ``InputError`` where ``given`` is no ``CouplingGraph``; ``what`` is the name of the argument."""
    if not isinstance(getattr(given, "groups", None), tuple) or not hasattr(given, "prunable_unit"):
        raise InputError(f"{what} is {kind_of(given)}; pass what fxprune.analyze(model, inputs) returns")


def may_be_dead(graph: _Graph) -> bool:
    """Whether the first elements of the slices leave room for a dead unit: a quick look, which tells that most networks have none.

    What makes or reads a unit is zero there only where its weight is, and a norm only where it scales to zero.
    """
    skeleton, firsts = graph.traced.skeleton, []
    for name, dim in graph.keys:
        if name not in skeleton.aliases:  # a tensor that is a plain attribute
            continue
        tensor, (path, _, key) = skeleton.real(name), name.rpartition(".")
        if _COMPUTED in name or key.endswith(_ENDINGS) or tensor.layout is not torch.strided or not tensor.numel():
            return True  # computed of several tensors, or nothing that has a first element
        module = skeleton.original_module(path)
        is_norm = isinstance(module, NormBase)
        if is_norm and getattr(module, "weight", None) is None:
            return True
        if key == "weight" if is_norm else tensor.ndim > 1 or graph.is_output((name, dim)):
            firsts.append(first_elements(tensor, dim))
    kinds = {(one.dtype, one.device) for one in firsts}
    return any(bool((torch.cat([one for one in firsts if (one.dtype, one.device) == kind]) == 0).any()) for kind in kinds)


def first_elements(tensor: Tensor, dim: int) -> Tensor:
    """A view of the first element of every slice along ``dim``, shape ``(slices,)``."""
    return tensor.detach().as_strided((tensor.shape[dim],), (tensor.stride(dim),), tensor.storage_offset())


def removable(graph: _Graph) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, str]]:
    """The zero units that can go without a change to what the network computes.

    The model is copied, what is zero is set to zero wherever else it occurs, and both are run on two random inputs of the analysed form:
    they must give the same numbers, bit for bit on a CPU. Units for which they do not, as behind a sigmoid, stay.

    Returns:
        Group -> LongTensor of its units to remove; group -> layer -> LongTensor of units that are zero there and stay; group -> why units
        that are zero in every layer stay.

    Raises:
        InputError: the model is on the meta device and has no values.
    """
    check_graph(graph, "graph")
    if any(p.device.type == "meta" for p in graph.model.parameters()):
        raise InputError("the model is on the meta device and has no values to find zeros among; load its weights first")
    found = zero_units(graph)
    dead, why = found.dead.copy(), {}
    inside = {g.name: slice(int(graph.starts[g.number]), int(graph.starts[g.number + 1])) for g in graph.groups if g.prunable}
    for group in graph.groups:
        if group.prunable and group.notes and dead[inside[group.name]].any():
            why[group.name] = f"removing them may change what the others compute: {group.notes[0]}"
            dead[inside[group.name]] = False
    if dead.any():
        trial = _Trial(graph)
        if not trial.same(dead):
            for name, units in inside.items():
                mine = np.zeros_like(dead)
                mine[units] = dead[units]
                good = trial.harmless(mine)
                if (mine & ~good).any():
                    why[name] = "the network computes something else without them: what reads them does not turn zero into zero"
                dead[units] = good[units]
            while dead.any() and not trial.same(dead):  # single units were harmless and all together are not: give up the last group
                last = next(name for name in reversed(inside) if dead[inside[name]].any())
                why[last], dead[inside[last]] = "without them and the zero units of other groups the network computes something else", False
    gone, partly = {}, {}
    for name, units in inside.items():
        own = dead[units]
        if own.all():  # one unit always stays
            own[-1] = False
        if own.any():
            gone[name] = torch.from_numpy(np.flatnonzero(own))
        left = {path: np.flatnonzero(zero[units] & ~own) for path, zero in found.places.items()}
        some = {path: torch.from_numpy(numbers) for path, numbers in left.items() if len(numbers)}
        if some:
            partly[name] = some
    return gone, partly, why


@dataclass
class _Layer:
    """What one module holds of the units, each an array over all units, or None where it has no such role.

    ``own``: those of its output channels. ``makes``, ``reads``: those it produces, and those among its inputs. ``silent``: output channels
    that are zero whatever comes in (true elsewhere). ``weightless``: those with no weight but zero (true elsewhere). ``unread``: inputs
    with no weight but zero (true elsewhere). ``centred``: of a BatchNorm, those whose zero stays zero (true elsewhere).
    """

    own: Bools
    silent: Bools
    weightless: Bools
    unread: Bools
    centred: Bools
    makes: Bools | None = None
    reads: Bools | None = None
    is_norm: bool = False


class _Facts:
    """The layers of an analysed model by their paths, and which norms stand beside them."""

    def __init__(self, graph: _Graph, count: int) -> None:
        self.graph = graph
        self.modules = dict(graph.model.named_modules(remove_duplicate=False))
        self.layers: dict[str, _Layer] = {}
        tensors = {**dict(graph.model.named_parameters(remove_duplicate=False)), **dict(graph.model.named_buffers(remove_duplicate=False))}
        with torch.no_grad():
            for name, dim in graph.keys:
                path, key = _place(name)
                units = graph.unit_of[name, dim]
                if name not in tensors or path not in self.modules or not graph.prunable_unit[units].any():
                    continue
                layer = self.layers.setdefault(path, self._blank(path, count))
                self._add(layer, self.modules[path], name, key, dim, units, tensors)
        self._norms: tuple[dict[str, set[str]], dict[str, str]] | None = None

    def _blank(self, path: str, count: int) -> _Layer:
        true = np.ones(count, dtype=bool)
        return _Layer(~true, true.copy(), true.copy(), true.copy(), true.copy(), is_norm=isinstance(self.modules[path], NormBase))

    def _add(self, layer: _Layer, module: nn.Module, name: str, key: str, dim: int, units: Ints, tensors: Mapping[str, Tensor]) -> None:
        owner = name.rpartition(".")[0]
        nonzero = units[~_zero_slices(_factors(module, owner, name, key, tensors), dim)]
        if layer.is_norm:
            layer.own[units] = True
            if getattr(module, "weight", None) is None:
                layer.silent[units] = False
            if key in ("weight", "bias"):
                layer.silent[nonzero] = False
            if key in ("bias", "running_mean"):
                layer.centred[nonzero] = False
            return
        computed = ".parametrizations." in f".{owner}." and dim == (1 if isinstance(module, ConvTransposeNd) else 0)
        if self.graph.is_output((name, dim)) or computed:
            layer.makes = np.zeros(len(layer.own), dtype=bool) if layer.makes is None else layer.makes
            layer.makes[units] = layer.own[units] = True
            layer.silent[nonzero] = layer.weightless[nonzero] = False
        elif tensors[name].ndim == 1:
            layer.own[units] = True
            layer.silent[nonzero] = False
        else:
            layer.reads = np.zeros(len(layer.own), dtype=bool) if layer.reads is None else layer.reads
            layer.reads[units] = True
            layer.unread[nonzero] = False

    def norms_after(self, path: str) -> set[str]:
        """The BatchNorms that alone read what a layer gives; empty where anything else does."""
        return self._beside()[0].get(path, set())

    def norm_before(self, path: str) -> str | None:
        """The BatchNorm whose result a layer reads, through operations with one input that keep zero."""
        return self._beside()[1].get(path)

    def _beside(self) -> tuple[dict[str, set[str]], dict[str, str]]:
        if self._norms is None:
            after: dict[str, set[str]] = {}
            before: dict[str, str] = {}
            mixed: set[str] = set()
            traced = self.graph.traced
            for mode in traced.eval_modes:
                for node in traced.graphs[mode].nodes:
                    path = self._layer_of(node)
                    if path is None or self.layers[path].is_norm:
                        continue
                    norms = {str(user.target) if user.op == "call_module" else "" for user in node.users}
                    if norms and all(n in self.layers and self.layers[n].is_norm for n in norms):
                        after.setdefault(path, set()).update(norms)
                    else:
                        mixed.add(path)
                    source = self._norm_feeding(node)
                    if source is None or before.get(path, source) != source:
                        before[path] = ""
                    else:
                        before[path] = source
            self._norms = {p: n for p, n in after.items() if p not in mixed}, {p: n for p, n in before.items() if n}
        return self._norms

    def _layer_of(self, node: Any) -> str | None:
        """The layer that a node calls: as a module, or as a function of a parameter that the module holds."""
        if node.op == "call_module":
            return str(node.target) if str(node.target) in self.layers else None
        weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
        for _ in range(_STEPS):
            if weight is None or not hasattr(weight, "op"):
                return None
            if weight.op == "get_attr":
                path = _place(str(weight.target))[0]
                return path if path in self.layers and self.layers[path].makes is not None else None
            weight = next((a for a in reversed(weight.args) if hasattr(a, "op")), None)
        return None

    def _norm_feeding(self, node: Any) -> str | None:
        source = node.args[0] if node.args else None
        for _ in range(_STEPS):
            if source is None or not hasattr(source, "op"):
                return None
            if source.op == "call_module" and str(source.target) in self.layers:
                path = str(source.target)
                return path if self.layers[path].is_norm else None
            inputs = source.all_input_nodes
            source = inputs[0] if len(inputs) == 1 and source.op in ("call_module", "call_function", "call_method") else None
        return None


def _place(name: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and the name that the layer's code knows it by."""
    path, _, key = name.rpartition(".")
    if ".parametrizations." in f".{path}.":
        head, _, key = f".{path}".rpartition(".parametrizations.")
        return head.removeprefix("."), key
    for ending in _ENDINGS:
        if key.endswith(ending):
            return path, key.removesuffix(ending)
    return path, key


def _factors(module: nn.Module, owner: str, name: str, key: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors whose product is what the layer computes with; where one is zero the weight is."""
    if parametrize.is_parametrized(module, key):
        made, own = getattr(module, key).detach(), tensors[name]
        fits = made.ndim == own.ndim and all(a in (b, 1) for a, b in zip(own.shape, made.shape, strict=True))
        return [made if fits else own]  # a factor of low rank has other axes
    dot = f"{owner}." if owner else ""
    for endings in (_PRUNED, _NORMED):
        parts = [tensors.get(f"{dot}{key}{ending}") for ending in endings]
        if all(part is not None for part in parts) and name.startswith(f"{dot}{key}_"):
            return [part for part in parts if part is not None]
    return [tensors[name]]


def _zero_slices(factors: Sequence[Tensor], dim: int) -> Bools:
    """At each index of ``dim``, whether the product of ``factors`` is zero throughout. Most slices are told by their first element."""
    size = max(f.shape[dim] if f.ndim > dim else 1 for f in factors)
    shape = torch.broadcast_shapes(*(f.shape for f in factors))
    spread = [f.expand(shape) for f in factors]
    first = torch.zeros(size, dtype=torch.bool, device=spread[0].device)
    if 0 in shape:  # a layer that is switched off has nothing to be zero
        spread = []
    for one in spread:
        first |= one.movedim(dim, 0).flatten(1)[:, 0] == 0 if one.ndim > 1 else one == 0
    chosen = first.nonzero().flatten()
    if len(chosen) and len(shape) > 1:
        zero = torch.stack([(one.index_select(dim, chosen) == 0) for one in spread]).any(0)
        first[chosen] = zero.movedim(dim, 0).flatten(1).all(1)
    found: Bools = first.cpu().numpy()
    return found


class _Trial:
    """The original on two random inputs, against copies in which the slices of some units are zero."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.device = device_of(graph.model)
        self.inputs = [build(graph.inputs, device=self.device, seed=seed) for seed in (1, 2)]
        self.twin = copied(graph.model)
        self.wanted = list(self._outputs())

    def _outputs(self) -> Iterator[list[Tensor]]:
        for inputs in self.inputs:
            with evaluating(self.twin), same_random_numbers():
                found = call(self.twin, cloned(inputs))
                yield [t.clone() for t in tree_leaves(found) if isinstance(t, Tensor)]

    def same(self, units: Bools) -> bool:
        """Whether the network computes the same with the slices of ``units`` set to zero."""
        tensors = {**dict(self.twin.named_parameters()), **dict(self.twin.named_buffers())}
        before: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, dim in self.graph.keys:
                gone = np.flatnonzero(units[self.graph.unit_of[name, dim]])
                if name in tensors and len(gone) and tensors[name].is_floating_point() and not name.endswith("running_var"):
                    before.setdefault(name, tensors[name].clone())
                    tensors[name].index_fill_(dim, torch.from_numpy(gone).to(tensors[name].device), 0)
            try:
                return all(self._equal(a, b) for a, b in zip(self.wanted, self._outputs(), strict=True))
            finally:
                for name, values in before.items():
                    tensors[name].copy_(values)

    def _equal(self, wanted: list[Tensor], found: list[Tensor]) -> bool:
        if self.device.type == "cpu":
            return all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(wanted, found, strict=True))

    def harmless(self, units: Bools) -> Bools:
        """The part of ``units`` that can be zero, found by halving."""
        if not units.any() or self.same(units):
            return units
        numbers = np.flatnonzero(units)
        found = np.zeros_like(units)
        if len(numbers) > 1:
            for half in np.array_split(numbers, 2):
                part = np.zeros_like(units)
                part[half] = True
                found |= self.harmless(part)
        return found
