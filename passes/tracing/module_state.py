"""What ``forward`` keeps on its modules: a buffer that it binds anew is written in the graph, anything else is named in a note."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.compat import tree_leaves
from fxprune.passes.ir.contents import OF_EVERY_MODULE, is_foreign
from fxprune.passes.ir.notes import Note, NoteKind
from fxprune.passes.ir.skeleton import Skeleton, Snapshot
from fxprune.passes.ir.slim_module import MODES
from fxprune.passes.tracing.proxies import ShapeProxy
from fxprune.passes.tracing.recorder import Recorder

_NUMBERS = (bool, int, float, str)


def keep_state(tracer: Recorder, graph: fx.Graph, before: Snapshot) -> None:
    """``before``: what every module held when the trace began, as ``Skeleton.snapshot`` gives it."""
    bound: dict[str, ShapeProxy] = {}
    for module, state, registered in before.modules:
        path = tracer.skeleton.module_names[module]
        for key, held in registered["_buffers"].items():
            now = module.__dict__["_buffers"].get(key)
            if not isinstance(now, ShapeProxy):
                continue
            if (
                held is not None
                and id(held) in tracer.skeleton.tensor_names
                and held.shape == now.value.shape
                and held.dtype == now.value.dtype
            ):
                bound[tracer.skeleton.tensor_names[id(held)]] = now
            else:
                _note(tracer, path, key, now)
        for key in sorted(module.__dict__.keys() - OF_EVERY_MODULE):
            now = module.__dict__[key]
            proxies = [leaf for leaf in tree_leaves(now) if isinstance(leaf, ShapeProxy)]
            if proxies or (isinstance(now, _NUMBERS) and state.get(key) != now):
                _note(tracer, path, key, proxies[0] if proxies else None)
    if bound:
        _write(tracer, graph, bound)


def _is_torchs(hook: Any) -> bool:
    """Whether a hook is one of torch's own: those that compute a weight keep nothing."""
    return str(getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def lost(skeleton: Skeleton, path: str) -> list[Note]:
    """What the modules at ``path`` and below have that a graph does not keep, a note each."""
    notes: list[Note] = []
    for name, module in skeleton.modules_below(path):
        called = f"{name!r}" if name else f"the {type(module).__name__}"
        cls = type(module)
        if module._backward_hooks or module._backward_pre_hooks:
            notes.append(Note(NoteKind.LOST, f"the backward hooks of {called} are not kept, and nothing calls them in the slim module"))
        if any(not _is_torchs(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())):
            text = f"the slim module keeps what the forward hooks of {called} do to inputs and outputs, but not what they store elsewhere"
            notes.append(Note(NoteKind.LOST, text))
        weights = [p for p in module._parameters.values() if p is not None]
        if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in weights):
            notes.append(Note(NoteKind.LOST, f"the hooks on parameters of {called} are not kept"))
        if cls.get_extra_state is not nn.Module.get_extra_state:
            notes.append(Note(NoteKind.LOST, f"the extra state of {called} (get_extra_state) is not in the slim module's state_dict()"))
        if path == "" and _has_train(cls) and not skeleton.train_is_known:
            text = f"the slim module does not have the train() of {called}: set what it keeps in evaluation mode yourself"
            notes.append(Note(NoteKind.LOST, text))
    root = skeleton.original
    if root.training and path == "":
        held = skeleton.held["train"]
        still = [n for n, m in skeleton.modules_below("") if not m.training and not n.startswith("_") and held.get(n, True)]
        first = [n for n in still if n.rpartition(".")[0] not in still]
        if first:
            text = f"in evaluation mode inside a model that trains: {', '.join(first)}; in training mode the slim module trains all of it"
            notes.append(Note(NoteKind.MODE, text))
    return notes


def hold_modes(skeleton: Skeleton) -> None:
    """Find what the user's own ``train()`` keeps in which mode. Where it does more than set modes, or fails, ``lost`` says so."""
    skeleton.train_is_known = True
    for path, module in skeleton.modules_below(""):  # slim modules remember what they hold
        for mode, named in module.__dict__.get(MODES, {}).items():
            skeleton.held[mode].update({f"{path}.{name}" if path else name: flag for name, flag in named.items()})
    if not any(_has_train(type(module)) for _, module in skeleton.modules_below("")):
        return
    skeleton.train_is_known = False
    if skeleton.is_scripted:  # it would meet modules of the user's
        return
    before, found = skeleton.snapshot(), {}
    tensors = [(t, t.requires_grad, t._version) for name in skeleton.names for t in [skeleton.tensor(name)]]
    try:
        for mode in (False, True):
            skeleton.set_training(mode)
            skeleton.root.train(mode)
            found["train" if mode else "eval"] = {
                name: bool(module.training)
                for name, module in skeleton.root.named_modules(remove_duplicate=False)
                if module.training != mode
            }
        same = all(t.requires_grad == flag and t._version == version for t, flag, version in tensors)
        skeleton.train_is_known = same and skeleton.is_as(before)
    except Exception:  # noqa: BLE001 - the user's code, on modules without values
        found = {}
    finally:
        skeleton.restore(before)
        for tensor, flag, _ in tensors:
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)
    for mode, named in found.items():
        skeleton.held[mode].update(named)


def _has_train(cls: type[nn.Module]) -> bool:
    """Whether a class of the user's says itself what ``train()`` does."""
    return cls.train is not nn.Module.train and not is_foreign(cls.train)


def _write(tracer: Recorder, graph: fx.Graph, bound: dict[str, ShapeProxy]) -> None:
    """``self.steps = self.steps + 1`` as a write into ``steps`` at the end. Reads of what is written read a copy, as a tensor that autograd
    kept must not change, and two buffers may change places."""
    copies: dict[fx.Node, fx.Node] = {}
    for read in [n for n in graph.nodes if n.op == "get_attr" and n.target in bound]:
        with graph.inserting_after(read):
            copies[read] = _made(tracer, "clone", (read,), read)
        read.replace_all_uses_with(copies[read], lambda user, made=copies[read]: user is not made)
    with graph.inserting_before(next(iter(reversed(graph.nodes)))):
        for name, proxy in bound.items():
            buffer = tracer.create_node("get_attr", name, (), {})
            buffer.meta["where"] = proxy.node.meta["where"]
            _made(tracer, "copy_", (buffer, copies.get(proxy.node, proxy.node)), proxy.node)


def _made(tracer: Recorder, method: str, args: tuple[fx.Node, ...], at: fx.Node) -> fx.Node:
    node = tracer.create_node("call_method", method, args, {})
    node.meta["where"] = at.meta["where"]
    return node


@torch.no_grad()
def written_back(tracer: Recorder, before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put the values back that forward wrote into plain tensors of modules while it was traced. ``before``: tensor and a copy of it."""
    for tensor, values in before:
        if torch.equal(tensor, values) or torch.equal(tensor.nan_to_num(), values.nan_to_num()):
            continue
        name = tracer.skeleton.attribute_names.get(id(tensor), "")
        storage = tensor.untyped_storage().data_ptr()
        shared = {n: c.clone() for n, c in tracer.constants.items() if not c.is_meta and c.untyped_storage().data_ptr() == storage}
        tracer.constants.update(shared)  # views of it as well: the graph has what they were
        tensor.copy_(values)
        tracer.note(NoteKind.STATE, f"forward writes into {name!r}, which is no buffer; the slim module does not do it again")


def _note(tracer: Recorder, path: str, key: str, proxy: ShapeProxy | None) -> None:
    where = "" if proxy is None else str(proxy.node.meta["where"])
    name = f"{path}.{key}" if path else key
    tracer.note(NoteKind.STATE, f"forward sets {name!r}, which the slim module does not do", where)
