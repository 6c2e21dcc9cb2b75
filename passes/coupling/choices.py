"""Which choices among channels are among experts: those whose channels are slices of matrices that the positions pick."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fxprune.passes.coupling.gates import settle_gates
from fxprune.passes.ir.nodes import target_name
from fxprune.passes.ir.reasons import Reason, ReasonKind
from fxprune.passes.labels.choices import BOTH
from fxprune.passes.labels.context import LabelContext
from fxprune.passes.labels.values import Vector
from fxprune.passes.rules.layer_specs import is_layer

_WHOLE = "whole experts stay, as experts=True was not given"
_MIXED, _USED = "the largest of its channels are chosen", "the index of a maximum over it is used"


def settle_choices(walk: LabelContext, experts: bool) -> None:
    """Note what a choice among experts changes, or where ``experts`` may not go let them stay; channels that something else is chosen
    among stay."""
    choices = [choice for choice in walk.choices_among if choice.count]
    gated = settle_gates(walk)
    if gated is not None and not experts:
        walk.labels.pin(np.array(sorted(gated.labels), dtype=np.int64), Reason(ReasonKind.EXPERTS, _WHOLE))
    walk.gated = gated if experts else None
    modules = np.array(sorted(gated.labels) if gated else [], dtype=np.int64)
    stacked = np.concatenate([_roots(walk, _stacked(walk)), modules])
    for choice in choices:
        before = len(walk.labels.pins)
        walk.node, walk.mode = choice.node, choice.mode
        found = walk.labels.find(choice.vector)
        if len(set(np.unique(found, return_counts=True)[1].tolist())) > 1:
            walk.pin(choice.vector, "of those that are chosen among, some go together", ReasonKind.CHOICE)
        elif not np.isin(found, stacked).all():
            walk.pin(choice.vector, _MIXED if target_name(choice.node) == "topk" else _USED)
        elif not experts:
            walk.pin(choice.vector, _WHOLE, ReasonKind.EXPERTS)
        else:
            text = f"experts, the best {choice.count} of those that are left are chosen"
            reason = Reason(ReasonKind.STATISTIC, text, operation=walk.op_name(), masked=BOTH)
            walk.labels.inexact.insert(0, (choice.vector, reason))  # said first, as it says what they are
        if len(walk.labels.pins) > before:
            walk.choices_among.remove(choice)
    chosen = _roots(walk, [choice.vector for choice in walk.choices_among if choice.count])
    _without_a_share(walk, np.concatenate([chosen, modules]))
    walk.node = None


def _without_a_share(walk: LabelContext, chosen: Vector) -> None:
    """Experts that went have no share of any softmax, whatever the norms."""
    for i, choice in enumerate(walk.choices_among):
        if choice.count or choice.norms == BOTH or not np.isin(walk.labels.find(choice.vector), chosen).all():
            continue
        walk.choices_among[i] = replace(choice, norms=BOTH)
        walk.statistics.get(choice.node, set()).discard(choice.axis)
        for place, (vector, reason) in enumerate(walk.labels.inexact):
            if vector is choice.vector and reason.masked and reason.masked != BOTH:
                walk.labels.inexact[place] = vector, Reason(reason.kind, reason.detail, operation=reason.operation, masked=BOTH)


def _roots(walk: LabelContext, vectors: list[Vector]) -> Vector:
    return np.unique(walk.labels.find(np.concatenate(vectors))) if vectors else np.zeros(0, dtype=np.int64)


def _stacked(walk: LabelContext) -> list[Vector]:
    """The labels along parameters of several matrices that lie in no layer."""
    skeleton = walk.traced.skeleton
    found = [(name, vector) for (name, _), vector in walk.parameters.items() if name in skeleton.parameter_names]
    stacked = [(name, vector) for name, vector in found if skeleton.tensor(name).ndim > 2]
    return [vector for name, vector in stacked if not is_layer(skeleton.original_module(name.rpartition(".")[0]))]
