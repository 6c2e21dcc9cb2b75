"""An optimiser goes on after its network was pruned: the same settings, its state sliced as the parameters were."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from fxprune.attached import Sources, record_of, sources_of
from fxprune.errors import InputError, UnsupportedError
from fxprune.passes.compat import tree_leaves, tree_map_only
from fxprune.passes.rewriting.slicing import cut
from fxprune.records import PruningRecord

Dims = Mapping[int, Tensor]


def rebind(
    optimizer: Optimizer, slim: nn.Module, *, model: nn.Module | None = None, reset: bool = False, schedulers: Sequence[Any] = ()
) -> Optimizer:
    """Carry an optimizer over to a slim module: a new one of the same class on the parameters of ``slim``, with the state of ``optimizer``.

    Parameter groups keep their settings and their order. Every state tensor of a parameter's shape (momentum, first and second moments) is
    sliced by the record's kept indices, as is one that has size 1 where the parameter has more (Adafactor's rows and columns); step counts
    and the state of parameters that did not change are copied. Parameters that are not the network's, as those of a loss, stay as they are.
    Call it between a step and the next forward pass: gradients are not carried over.

    Args:
        optimizer: built on the original, or on the slim module that was pruned again. It is left as it was.
        slim: what ``compress`` returned for the optimizer's model, or for a slim module of it.
        model: the optimizer's model, where ``slim`` went through a file or a pickle and no longer knows it.
        reset: what to do where a parameter's state holds a tensor of another shape, which cannot be sliced. True: drop that parameter's
            state and name it in a warning; False: raise. LBFGS keeps one history for all parameters, so there all of it is dropped.
        schedulers: the optimizer's learning rate schedulers, which from then on set the new one's rates.

    Returns:
        The new optimizer.

    Raises:
        InputError: the two do not belong together, or the optimizer is a wrapper.
        UnsupportedError: a state cannot be sliced, or the class cannot be made again from its defaults.
    """
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's
        raise InputError(f"{type(optimizer).__name__} wraps an optimizer; rebind the one inside, its .optimizer, and prepare the result")
    record = record_of(slim)
    if record is None:
        raise InputError(f"this {type(slim).__name__} carries no pruning record; pass what compress returned")
    following = _followers(schedulers, optimizer)
    names, kept = _names(optimizer, slim, model, record)
    made: dict[int, nn.Parameter] = {}
    own = dict(slim.named_parameters(remove_duplicate=False))
    for old in _parameters(optimizer):
        if id(old) not in names:
            continue
        name = names[id(old)]
        left = [len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(old.shape)]
        if name not in own or list(own[name].shape) != left:
            raise InputError(f"the slim module does not fit the optimizer: {name!r} should be {left} after pruning, of {list(old.shape)}")
        made[id(old)] = own[name]
    groups = [{**_settings(group), "params": [made.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups]
    new = _built(type(optimizer), groups, optimizer.defaults)
    for key, hooks in vars(optimizer).items():
        if key.endswith("_hooks"):
            setattr(new, key, copy.copy(hooks))
    new.state.clear()  # some classes begin theirs when they are made
    anew: list[str] = []
    for old, state in optimizer.state.items():
        if not isinstance(old, Tensor) or id(old) not in made:
            new.state[old] = copy.deepcopy(state)
            continue
        name, parameter = names[id(old)], made[id(old)]
        strange = _flat(optimizer, kept) or (_strange(state, old) if kept.get(name) else None)
        if strange is None:
            new.state[parameter] = _sliced(state, old, parameter, kept.get(name, {}))
        elif reset:
            anew.append(f"{name!r} ({strange})")
        else:
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps {strange} for {name!r}, which cannot be sliced; pass reset=True to begin again there"
            )
    if anew:
        warnings.warn(f"{type(optimizer).__name__} begins again with what cannot be sliced: {', '.join(anew)}", stacklevel=2)
    _follow(following, optimizer, new)
    return new


def _followers(schedulers: Iterable[Any], optimizer: Optimizer) -> list[Any]:
    """The schedulers and those inside them. Raises ``InputError`` for one of another optimiser."""
    found = []
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is not optimizer:
            raise InputError(f"{type(scheduler).__name__} is no scheduler of this optimizer; pass those that were made with it")
        found += [scheduler, *_followers(getattr(scheduler, "_schedulers", ()), optimizer)]
    return found


def _follow(schedulers: list[Any], optimizer: Optimizer, new: Optimizer) -> None:
    for scheduler in schedulers:
        scheduler.optimizer = new
    if not schedulers or hasattr(new.step, "_wrapped_by_lr_sched"):
        return
    # By these marks a scheduler sees whether the optimiser has made a step; it warns in vain without them.
    step = new.step

    @functools.wraps(step)
    def marked(*args: Any, **kwargs: Any) -> Any:
        new._opt_called = True  # type: ignore[attr-defined]
        return step(*args, **kwargs)

    marked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    new._opt_called = getattr(optimizer, "_opt_called", False)  # type: ignore[attr-defined]
    new.step = marked  # type: ignore[method-assign]


def _names(
    optimizer: Optimizer, slim: nn.Module, model: nn.Module | None, record: PruningRecord
) -> tuple[dict[int, str], Mapping[str, Dims]]:
    """Names of the optimiser's parameters by their ids, and what was kept of the module they belong to."""
    last = record.steps[-1].kept if record.steps else record.kept
    if model is None:
        sources = sources_of(slim)
        ways = [(sources.pruned, last), (sources.original, record.kept)]
    else:
        is_original = sum(parameter.numel() for parameter in model.parameters()) == record.before.params
        ways = [(Sources(model).pruned, record.kept if is_original else last)]
    mine = {id(parameter) for parameter in _parameters(optimizer)}
    for references, kept in ways:
        alive = ((name, reference()) for name, reference in references.items())
        found = {id(parameter): name for name, parameter in alive if id(parameter) in mine}
        if found:
            return found, kept
    raise InputError(
        "no parameter of the optimizer is known as one that the slim module was sliced from; "
        "pass model=, the network that the optimizer was built on"
    )


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key != "params"})


def _built(cls: type[Optimizer], groups: list[dict[str, Any]], defaults: Mapping[str, Any]) -> Optimizer:
    """An optimiser of ``cls``; its defaults are what it was made with, some of them (AdamW's) fixed by the class itself."""
    known = inspect.signature(cls).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    try:
        return cls(groups, **{name: value for name, value in defaults.items() if open_ended or name in known})
    except TypeError as error:
        raise UnsupportedError(f"{cls.__name__} cannot be made again from its defaults ({error}); build it on slim.parameters()") from error


def _flat(optimizer: Optimizer, kept: Mapping[str, Dims]) -> str | None:
    """In words, a state that is one vector over all parameters, filed under the first, and no longer fits."""
    return "one history of all parameters" if isinstance(optimizer, LBFGS) and any(kept.values()) else None


def _fits(tensor: Tensor, parameter: Tensor) -> bool:
    same = tensor.ndim == parameter.ndim and all(a in (1, b) for a, b in zip(tensor.shape, parameter.shape, strict=True))
    return tensor.numel() == 1 or same


def _strange(state: Any, parameter: Tensor) -> str | None:
    """The first entry of a parameter's state that cannot be sliced, in words."""
    for key, value in state.items():
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not _fits(tensor, parameter):
                return f"{key!r} of shape {list(tensor.shape)}"
    return None


def _sliced(state: Any, old: Tensor, new: Tensor, dims: Dims) -> dict[str, Any]:
    def one(tensor: Tensor) -> Tensor:
        chosen = {dim: indices for dim, indices in dims.items() if tensor.numel() > 1 and tensor.shape[dim] == old.shape[dim]}
        made = cut(tensor, None, chosen)
        return made.to(new.device) if tensor.device == old.device else made

    return {key: tree_map_only(Tensor, one, value) if _has_tensor(value) else copy.deepcopy(value) for key, value in state.items()}


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
