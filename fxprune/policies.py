"""Policies: how much to remove from each group, and the file they live in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from fxprune.atomic import replace_text
from fxprune.errors import PolicyError, first_line, shown
from fxprune.imports import suggestion
from fxprune.index_lists import ranges
from fxprune.zeros import check_graph, removable

FORMAT = "fxprune-policy/1"
# On these the group names and the choice of units depend. ``units``: group name -> the units that go (``fxprune.index_lists``).
OPTIONS = ("attention", "blocks", "experts", "ignore", "importance", "norms", "outputs", "parts", "past", "round_to", "units")


class _Group(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def prunable(self) -> bool: ...
    @property
    def most(self) -> float: ...


class _Graph(Protocol):
    """What ``Policy.uniform`` needs of a ``CouplingGraph`` (policies do not import the passes)."""

    @property
    def groups(self) -> tuple[Any, ...]: ...
    @property
    def inputs(self) -> Any: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


def units_removed(sparsity: float, units: int) -> int:
    """How many of ``units`` a sparsity removes: ``floor(p*n + 1e-6)``, never all of them.

    The epsilon keeps ``p = k / n`` from losing a unit to rounding, as it would for (61, 112).
    """
    return max(0, min(math.floor(sparsity * units + 1e-6), units - 1))


def checked_sparsity(value: Any, where: str) -> float:
    """Return ``value`` as a float in [0, 1]; raise ``PolicyError`` naming ``where`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PolicyError(f"sparsity of {where} is {shown(value)}; it must be a number from 0 (keep all) to 1")
    if not 0 <= float(value) <= 1:
        raise PolicyError(f"sparsity of {where} is {value}; it must lie from 0 (keep all) to 1 (all but one unit)")
    return float(value)


@dataclass(frozen=True)
class Policy:
    """A sparsity for each group, with what is needed to apply it again.

    ``sparsity``: group name -> share of its units to remove, 0 to 1; groups left out keep all.
    ``inputs``: the recorded form of the example inputs (see ``fxprune.example_inputs``), or None.
    ``options``: attention, ignore, round_to and importance, on which the group names and the choice of units depend.
    ``meta``: anything else; written by a search (target, reward, seed), never read back by ``compress``.
    """

    sparsity: Mapping[str, float]
    inputs: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sparsity", "options", "meta"):
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                instead = "; for one sparsity everywhere: Policy.uniform(graph, sparsity)" if isinstance(given, Real) else ""
                raise PolicyError(f"{name} of the policy is {shown(given)}; it must be a mapping, as in Policy({{'conv1': 0.5}}){instead}")
        checked = {str(name): checked_sparsity(p, f"group {name!r}") for name, p in self.sparsity.items()}
        object.__setattr__(self, "sparsity", checked)
        object.__setattr__(self, "options", dict(self.options))
        object.__setattr__(self, "meta", dict(self.meta))

    @classmethod
    def uniform(cls, graph: _Graph, sparsity: float) -> Policy:
        """The same ``sparsity`` for every prunable group of ``graph``; of experts as many stay as are chosen at a time.

        Args:
            graph: what ``analyze`` returned.
            sparsity: the share of its units that each group loses, 0 to 1.

        Returns:
            The policy, which records the example inputs and the options of ``graph``.

        Raises:
            InputError: ``graph`` is none.
            PolicyError: ``sparsity`` is out of range.
        """
        check_graph(graph, "graph")
        p = checked_sparsity(sparsity, "a uniform policy")
        return cls({g.name: min(p, g.most) for g in graph.groups if g.prunable}, graph.inputs, dict(graph.options))

    @classmethod
    def from_zeros(cls, graph: Any) -> Policy:
        """The units that are zero already: those that masks or sparse training left without effect.

        A unit goes where every layer that adds to it gives zero for it (weights and bias, masks of ``torch.nn.utils.prune``, the scale and
        shift of the BatchNorm behind), or where every layer that reads it has weights of zero there; and only where the network then
        computes the same: the original and a copy with all of the unit's weights at zero are run on random inputs and must agree bit for
        bit (on a CPU).

        Args:
            graph: what ``analyze`` returned; the weights that its model holds now count.

        Returns:
            A policy that names these units, for ``compress``. Its ``meta`` says what is zero in one place and not in another
            (``partly_zero``: group -> layer -> units that are zero there and stay) and why dead units stay (``kept``: group -> reason).

        Raises:
            InputError: ``graph`` is none, or its model is on the meta device and has no values.
        """
        gone, partly, why = removable(graph)
        sizes = {g.name: g.size for g in graph.groups}
        units = {name: ranges(found) for name, found in gone.items()}
        options = {**graph.options, "round_to": 1, "importance": "l2", "units": units}
        meta: dict[str, Any] = {"made_by": "from_zeros"}
        if partly:
            meta["partly_zero"] = {name: {path: ranges(found) for path, found in places.items()} for name, places in partly.items()}
        if why:
            meta["kept"] = why
        return cls({name: len(found) / sizes[name] for name, found in gone.items()}, graph.inputs, options, meta)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON, fit to be edited by hand; an existing file is replaced only when the new one is whole.

        Args:
            path: of the file; its folder is made where it is missing.

        Raises:
            PolicyError: the file cannot be written, or ``inputs``, ``options`` or ``meta`` hold what JSON has not.
        """
        data = {
            "format": FORMAT,
            "sparsity": dict(self.sparsity),
            "inputs": self.inputs,
            "options": dict(self.options),
            "meta": dict(self.meta),
        }
        target = Path(path)
        try:
            text = json.dumps(data, indent=2) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise PolicyError(
                f"cannot write the policy to {target}: its inputs, options and meta must hold only what JSON has "
                f"(numbers, texts, lists, mappings, None): {first_line(error)}"
            ) from error
        replace_text(target, text, "the policy", PolicyError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file.

        Args:
            path: of the file, JSON as ``save`` writes it; only ``sparsity`` has to be there.

        Returns:
            The policy.

        Raises:
            PolicyError: says what is wrong with the file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"cannot read the policy file {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise PolicyError(f"the policy file {path} is not JSON: {error}") from error
        except RecursionError as error:
            raise PolicyError(f"the policy file {path} is nested too deeply; write it again with Policy.save") from error
        if not isinstance(data, dict) or not isinstance(data.get("sparsity"), dict):
            raise PolicyError(f"the policy file {path} has no 'sparsity' object: group name -> share to remove")
        if data.get("format", FORMAT) != FORMAT:
            raise PolicyError(f"the policy file {path} has format {data['format']!r}; this fxprune reads {FORMAT!r}")
        for key in ("options", "meta"):
            if not isinstance(data.get(key) or {}, dict):
                raise PolicyError(f"the policy file {path}: {key!r} must be an object")
        try:
            found = cls(data["sparsity"], data.get("inputs"), data.get("options") or {}, data.get("meta") or {})
            check_options(found)
        except PolicyError as error:
            raise PolicyError(f"the policy file {path}: {error}") from error
        return found


def check_options(policy: Policy) -> None:
    """Raise ``PolicyError`` for an option that nothing reads, which would be ignored in silence.

    A policy itself may have such options: those in the records of files may come from a later version.
    """
    unknown = next((name for name in policy.options if name not in OPTIONS), None)
    if unknown is not None:
        advice = suggestion(str(unknown), OPTIONS) or f"; there are {', '.join(OPTIONS)}"
        raise PolicyError(f"unknown option {shown(unknown)} in the policy{advice}")
