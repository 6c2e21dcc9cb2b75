"""The keys of a policy: group names, module names, and globs over both, resolved to groups of one network."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxprune.errors import PolicyError
from fxprune.passes.coupling.blocks import Block
from fxprune.passes.coupling.graph import CouplingGraph, Group
from fxprune.passes.ir.skeleton import at_or_below
from fxprune.policies import units_removed

_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Wanted:
    """A policy in terms of groups.

    ``sparsity``: group name -> share of its units to remove, for prunable groups. ``locked``: likewise for groups that a uniform policy, a
    module name or a glob asks for and that cannot be pruned.
    """

    sparsity: dict[str, float]
    locked: dict[str, float]


def resolved(graph: CouplingGraph, policy: Mapping[str, float] | float) -> Wanted:
    """The groups that a policy means.

    Args:
        graph: the analysed network.
        policy: one share for every group, or a mapping. Its keys are, in the order in which they are tried: names of groups; names of
            modules, for every group that a layer of the module produces (or, where it produces none, that its parameters belong to); globs
            over the names of both. Where several keys name one group the most exact counts: its own name, then the innermost module, then
            the glob written last. Of experts as many stay as are chosen at a time.

    Raises:
        PolicyError: for a key that names nothing, with the groups and modules that are near; for a locked group named by itself; for
            experts named by themselves of which fewer would stay than are chosen at a time.
    """
    if isinstance(policy, (int, float)):
        shares = {g.name: float(policy) for g in graph.groups}
    else:
        shares = _by_group(graph, policy)
    by_name = graph.by_name
    named = () if isinstance(policy, (int, float)) else policy
    shares = {name: p if name in named else min(p, by_name[name].most) for name, p in shares.items()}
    return Wanted(
        {name: p for name, p in shares.items() if by_name[name].prunable},
        {name: p for name, p in shares.items() if p > 0 and not by_name[name].prunable},
    )


def left_out(graph: CouplingGraph, policy: Mapping[str, float]) -> tuple[list[Block], dict[str, float]]:
    """The blocks that a policy leaves out, and its other entries.

    An entry with a block's name and sparsity 1 leaves the block out; 0 keeps it. A name that is also that of a group means the block only
    where the network was analysed with ``blocks=True``.
    """
    if not graph.blocks and not any(p == 1 for p in policy.values()):
        return [], dict(policy)
    blocks = {block.name: block for block in graph.all_blocks if graph.blocks or block.name not in graph.by_name}
    gone = [blocks[name] for name, p in policy.items() if p == 1 and name in blocks]
    rest = {name: p for name, p in policy.items() if not (name in blocks and (p == 1 or (p == 0 and name not in graph.by_name)))}
    return gone, rest


def twin_units(graph: CouplingGraph, cut: CouplingGraph) -> npt.NDArray[np.int64]:
    """For every unit of ``cut``, a network that is ``graph``'s with parts left out, the unit of ``graph`` that it is, -1 for none."""
    found = np.full(int(cut.starts[-1]) if len(cut.starts) else 0, -1, dtype=np.int64)
    for key, units in cut.unit_of.items():
        whole = graph.unit_of.get(key)
        if whole is not None and len(whole) == len(units):
            found[units] = whole
    return found


def carried_over(graph: CouplingGraph, cut: CouplingGraph, sparsity: Mapping[str, float]) -> dict[str, float]:
    """Sparsities of the groups of ``graph`` as those of ``cut``, the same network with parts left out: a group goes by what it holds."""
    found: dict[str, float] = {}
    for name, p in sparsity.items():
        for parameter, dim, indices in graph.by_name[name].members if p > 0 else ():
            units = cut.unit_of.get((parameter, dim))
            if units is None:
                continue
            for number in np.unique(cut.group_of_unit[units[indices.numpy()]]).tolist():
                if number in cut.by_number and cut.by_number[number].prunable:
                    found.setdefault(cut.by_number[number].name, p)
            break
    return found


def _groups_limited(graph: CouplingGraph, key: str) -> list[Group]:
    """The groups that one key of ``most`` means, read as the keys of a policy are. Raises ``PolicyError`` where there are none."""
    if key in graph.by_name:
        return [graph.by_name[key]]
    names = _Names(graph)
    found = names.of_module(key) or names.of_glob(key)
    if not found:
        raise PolicyError(_unknown(graph, key, names, f"the key {key!r} of most"))
    return found


def sparsities(graph: CouplingGraph, policy: Mapping[str, float] | float) -> dict[str, float]:
    """Sparsity by group name for the prunable groups that a policy means; see ``resolved``."""
    return resolved(graph, policy).sparsity


def limits(graph: CouplingGraph, most: Mapping[str, float] | float | None) -> dict[str, int]:
    """The most units that groups may lose, by group name: never all; groups without a limit of their own are left out.

    ``most``: one share (0 to 1) for every group, or a mapping with the keys that a policy has; where several keys name one group, the
    lowest counts. Raises ``PolicyError`` for a share out of range or a key that names nothing.
    """
    if most is None:
        return {}
    pairs = [("every group", most)] if isinstance(most, (int, float)) else [(repr(key), share) for key, share in most.items()]
    for where, share in pairs:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise PolicyError(f"most of {where} is {share!r}; it must be a share from 0 (nothing goes) to 1 (all but one unit may go)")
    named = [graph.groups] if isinstance(most, (int, float)) else [_groups_limited(graph, str(key)) for key in most]
    found: dict[str, int] = {}
    for (_, share), groups in zip(pairs, named, strict=True):
        for group in groups:
            allowed = units_removed(share, group.size)
            found[group.name] = min(found.get(group.name, allowed), allowed)
    return found


def _by_group(graph: CouplingGraph, policy: Mapping[str, float]) -> dict[str, float]:
    names: _Names | None = None
    globs: dict[str, float] = {}
    modules: dict[str, tuple[int, float]] = {}
    own: dict[str, float] = {}
    for key, p in policy.items():
        group = graph.by_name.get(key)
        if group is not None:
            if p > 0 and not group.prunable:
                raise PolicyError(f"group {key!r} cannot be pruned: {group.reason}; set its sparsity to 0 or leave it out")
            if (left := group.size - units_removed(p, group.size)) < group.least and group.experts and group.least > 1:
                raise PolicyError(
                    f"group {key!r} would keep {left} of {group.size} experts, and {group.least} are chosen for each token; "
                    f"its sparsity may be {group.most:g} at most"
                )
            own[key] = p
            continue
        names = names or _Names(graph)
        found = names.of_module(key)
        if found:
            if p > 0 and not any(g.prunable for g in found):
                raise PolicyError(f"no group of module {key!r} can be pruned: {found[0].reason}; set its sparsity to 0 or leave it out")
            depth = key.count(".") + 1 if key else 0
            for g in found:
                if depth >= modules.get(g.name, (-1, 0.0))[0]:
                    modules[g.name] = depth, p
            continue
        found = names.of_glob(key)
        if not found:
            raise PolicyError(_unknown(graph, key, names, f"the policy's key {key!r}"))
        globs.update((g.name, p) for g in found)
    shares = {**globs, **{name: p for name, (_, p) in modules.items()}, **own}
    return {g.name: shares[g.name] for g in graph.groups if g.name in shares}


class _Names:
    """The modules of a network and the groups that belong to each."""

    def __init__(self, graph: CouplingGraph) -> None:
        self.graph = graph
        self.modules = [path for path, _ in graph.model.named_modules(remove_duplicate=False) if path]
        self._produced: dict[str, dict[int, None]] = {}
        self._held: dict[str, dict[int, None]] = {}
        aliases = graph.traced.skeleton.aliases
        for key in graph.keys:
            numbers = [g for g in np.unique(graph.group_of_unit[graph.unit_of[key]]).tolist() if g in graph.by_number]
            table = self._produced if graph.is_output(key) else self._held
            for name in aliases.get(key[0], [key[0]]):
                path = name.rpartition(".")[0]
                # The tensors of parametrizations and of torch.nn.utils.prune lie where the layer is or below it.
                table.setdefault(path.partition(".parametrizations.")[0], {}).update(dict.fromkeys(numbers))

    def of_module(self, path: str) -> list[Group]:
        """The groups that the layers in a module produce; where there are none, those that its parameters belong to."""
        if path not in self.modules:
            return []
        for table in (self._produced, self._held):
            numbers = {n for owner, held in table.items() if at_or_below(owner, path) for n in held}
            if numbers:
                return [self.graph.by_number[n] for n in sorted(numbers)]
        return []

    def of_glob(self, pattern: str) -> list[Group]:
        if not _GLOB & set(pattern):
            return []
        found = {g.number for g in self.graph.groups if fnmatch.fnmatchcase(g.name, pattern)}
        for path in self.modules:
            if fnmatch.fnmatchcase(path, pattern):
                found.update(g.number for g in self.of_module(path))
        return [self.graph.by_number[n] for n in sorted(found)]


def _unknown(graph: CouplingGraph, key: str, names: _Names, called: str) -> str:
    groups = _near(key, (g.name for g in graph.groups if g.prunable))[:3]
    modules = [path for path in _near(key, names.modules) if path not in groups and any(g.prunable for g in names.of_module(path))][:3]
    near = [f"{kind} {', '.join(map(repr, found))}" for kind, found in (("group", groups), ("module", modules)) if found]
    advice = f"did you mean {' or '.join(near)}?" if near else "fxprune.visualize(model, inputs) prints the groups"
    what = "matches no group or module" if _GLOB & set(key) else "names no group or module"
    return f"{called} {what} of this model; {advice}"


def _near(key: str, names: Iterable[str]) -> list[str]:
    bare = key.strip("*?[].") or key
    return difflib.get_close_matches(bare, list(dict.fromkeys(names)), 8, 0.4)
