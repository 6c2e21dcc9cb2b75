"""A structural copy of a module on the meta device: same classes and names, no weights, safe to trace."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from fxprune.errors import InputError
from fxprune.evaluation.copying import WEAK, weakly
from fxprune.evaluation.wrappers import BOUND, class_of_copy, is_compiled
from fxprune.passes.ir.contents import OF_EVERY_MODULE, CachedFunction, Contents, hooks_back, hooks_of

_SHARED = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type,
    torch.dtype,
    torch.device,
    torch.Size,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    fx.Graph,
)
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    }
)
_VALUES = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})
_PLAIN = frozenset({tuple, list, dict, set, OrderedDict})
_SEQUENCES = frozenset({tuple, list})


@dataclass(frozen=True)
class Snapshot:
    """What the modules of a skeleton hold: per module its attributes and what is registered, and what is in containers."""

    modules: list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]]
    contents: Contents
    hooks: list[tuple[dict[Any, Any], dict[Any, Any]]]


class Skeleton:
    """The copy (``root``) and the tables between its tensors and modules and the original's names.

    ``training_was_read``: whether traced code asked a module that is not kept whole for ``self.training``, or set a module's mode.
    ``held``: for the mode of the whole, "train" or "eval", the modules that the user's code holds in the other one: a name and its flag.
    ``as_in_evaluation``: the modules whose own code could not be traced in training, and is traced as it runs in evaluation: why.
    """

    def __init__(self, model: nn.Module, is_known: Callable[[nn.Module], bool]) -> None:
        self.original = model
        self.training_was_read = False
        self.held: dict[str, dict[str, bool]] = {"eval": {}, "train": {}}
        self.as_in_evaluation: dict[str, str] = {}
        self.train_is_known = True  # whether ``held`` is all that the user's own ``train()`` does
        self.past: list[Any] | None = None  # what a trace may start from; tracing finds and keeps it here
        self.started: Any = None  # the one of them that the graphs are of
        self.has_history = False  # whether earlier calls left something that the trace does without
        self.keep_alive: list[Any] = []
        memo: dict[int, Any] = {}
        self._real: dict[str, torch.Tensor] = {}
        self._meta: dict[str, torch.Tensor] = {}
        self.tensor_names: dict[int, str] = {}
        self.aliases: dict[str, list[str]] = {}
        self.parameter_names: set[str] = set()
        canonical: dict[int, str] = {}
        self._original_modules = dict(model.named_modules(remove_duplicate=False))
        _refuse_lazy(self._original_modules)
        _refuse_equal(self._original_modules)
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for kind in ("_parameters", "_buffers"):
            for prefix, module in self._original_modules.items():
                for key, tensor in list(getattr(module, kind).items()):
                    if tensor is None:
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    self._places[name] = module, key
                    if id(tensor) in canonical:
                        self.aliases[canonical[id(tensor)]].append(name)
                        continue
                    canonical[id(tensor)] = name
                    self.aliases[name] = [name]
                    if kind == "_parameters":
                        self.parameter_names.add(name)
                    meta = _meta_twin(tensor)
                    memo[id(tensor)] = meta
                    self._real[name], self._meta[name] = tensor, meta
                    self.tensor_names[id(meta)] = name
        originals = list(dict.fromkeys(self._original_modules.values()))
        scripted = [module for module in originals if isinstance(module, torch.jit.ScriptModule)]
        for module in originals:
            memo[id(module)] = module if module in scripted else object.__new__(class_of_copy(module))
        for module in originals:
            if module in scripted:  # it stays a call, and nothing of it is looked at
                continue
            fill(module, memo[id(module)], memo)
            if not is_known(module):  # whose reads of ``training`` count
                memo[id(module)].__dict__["_fxprune_skeleton"] = self
        self.keep_alive.append(memo)
        self.twins: dict[nn.Module, nn.Module] = {module: memo[id(module)] for module in originals}
        self.root: nn.Module = memo[id(model)]
        self._modules: dict[str, nn.Module] = {path: memo[id(m)] for path, m in self._original_modules.items()}
        self._own = [twin for module, twin in self.twins.items() if module is not twin]
        self._contents().exchange(self.twins)  # what a deep copy leaves: keys of weak dictionaries, and id() of a module as a key
        self.module_names: dict[nn.Module, str] = {}
        for name, module in self._modules.items():
            self.module_names.setdefault(module, name)
        # Tensors held as plain attributes keep the path they have; others get a name when the tracer meets them.
        self.attribute_names: dict[int, str] = {}
        self.taken: frozenset[str] = frozenset()  # names of the constants of the mode that was traced before
        for name, module in self._modules.items():
            for key, value in module.__dict__.items():
                if isinstance(value, torch.Tensor):
                    self.attribute_names.setdefault(id(value), f"{name}.{key}" if name else key)

    def module(self, name: str) -> nn.Module:
        return self._modules[name]

    def modules_below(self, path: str) -> list[tuple[str, nn.Module]]:
        """The user's modules at ``path`` and below, each once, by its first name."""
        found: dict[nn.Module, str] = {}
        for name, module in self._original_modules.items():
            if path == "" or at_or_below(name, path):
                found.setdefault(module, name)
        return [(name, module) for module, name in found.items()]

    def module_or_none(self, name: str) -> nn.Module | None:
        return self._modules.get(name) if name else None

    def module_aliases(self, name: str) -> list[str]:
        """All names of the module of that name."""
        module = self._modules[name]
        return [n for n, m in self._modules.items() if m is module]

    def all_names(self, paths: Iterable[str]) -> set[str]:
        """All names of the modules at ``paths``."""
        wanted = {self._modules[path] for path in paths}
        return {name for name, module in self._modules.items() if module in wanted} if wanted else set()

    def original_module(self, name: str) -> nn.Module:
        found: nn.Module = self._original_modules[name]
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """The meta twin of a parameter or buffer, by its first name."""
        return self._meta[name]

    def real(self, name: str) -> torch.Tensor:
        """The user's tensor of that name, as it is now."""
        module, key = self._places[name]
        held: Any
        for held in (module._parameters, module._buffers):
            if not isinstance(held, dict):  # those of a scripted module
                held = dict(held.items())
            found: torch.Tensor | None = held.get(key)
            if found is not None:
                return found
        return self._real[name]

    @property
    def names(self) -> list[str]:
        return list(self._meta)

    def snapshot(self) -> Snapshot:
        """What every module holds: a forward pass may keep things on its modules, and proxies must not outlive their trace."""
        kinds = ("_parameters", "_buffers", "_modules")
        held = [(m, dict(m.__dict__), {k: dict(m.__dict__[k]) for k in kinds}) for m in self._own]
        return Snapshot(held, self._contents(), [pair for m in self._own for pair in hooks_of(m)])

    def is_as(self, before: Snapshot) -> bool:
        """Whether every module holds what it held, apart from its mode."""
        return all(
            module.__dict__.keys() == state.keys()
            and all(value is state[key] for key, value in module.__dict__.items() if key != "training")
            and all(
                module.__dict__[kind].keys() == held.keys() and all(module.__dict__[kind][k] is v for k, v in held.items())
                for kind, held in registered.items()
            )
            for module, state, registered in before.modules
        )

    def _contents(self) -> Contents:
        contents = Contents()
        for module in self._own:
            contents.add(module._non_persistent_buffers_set)
            for key, value in module.__dict__.items():
                if key not in OF_EVERY_MODULE:
                    contents.add(value)
        return contents

    def restore(self, before: Snapshot) -> None:
        for module, state, registered in before.modules:
            module.__dict__.clear()
            module.__dict__.update(state)
            for kind, held in registered.items():
                module.__dict__[kind].clear()
                module.__dict__[kind].update(held)
        hooks_back(before.hooks)
        before.contents.restore()

    def volatile(self) -> set[str]:
        """The names of what the graphs do without, since forward makes it when it is first called."""
        first = self.started.first if self.started is not None else []
        names = ((self.module_names[m], key) for m, values in first if m in self.module_names for key in values)
        return {f"{name}.{key}" if name else key for name, key in names}

    def plain_tensors(self) -> list[torch.Tensor]:
        """The user's tensors that modules hold as plain attributes: the twins have the same."""
        held = (v for m in self._own for k, v in m.__dict__.items() if k not in OF_EVERY_MODULE and isinstance(v, torch.Tensor))
        return [t for t in dict.fromkeys(held) if not t.is_meta and t.layout is torch.strided and not t.is_quantized]

    def set_training(self, mode: bool) -> None:
        for module in self._own:
            module.__dict__["training"] = mode
        for name, flag in self.other_modes(mode).items():
            self._modules[name].__dict__["training"] = flag

    def other_modes(self, mode: bool) -> dict[str, bool]:
        """The modules that are not traced in the mode of the whole: a name and its flag."""
        return {**self.held["train"], **dict.fromkeys(self.as_in_evaluation, False)} if mode else self.held["eval"]

    @property
    def is_scripted(self) -> bool:
        """Whether a module of the user's own is among those of the skeleton: nothing may be changed through these."""
        return len(self._own) < len(self.twins)


def _refuse_equal(modules: dict[str, nn.Module]) -> None:
    """PyTorch itself tells modules apart by ``==``: of equal ones it trains and saves the first."""
    names: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first = names.setdefault(module, name)
        if modules[first] is not module:
            kind = type(module).__name__
            text = f"{first} and {name} are two modules that {kind}.__eq__ calls equal, so PyTorch takes them for one; delete {kind}.__eq__"
            raise InputError(text)


def _refuse_lazy(modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        if any(t is not None and is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise InputError(f"{path or 'the model'} ({type(module).__name__}) has no weights yet: run the model once on real inputs first")


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    # The short form for plain layouts: empty_like asks about memory formats in Python.
    twin = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if tensor.is_contiguous()
        else torch.empty_like(tensor.detach(), device="meta")
    )
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def fill(source: nn.Module, twin: nn.Module, memo: dict[int, Any]) -> None:
    """Give ``twin`` the attributes of ``source``: modules and tensors by ``memo`` (id -> twin), the rest copied, hooks left behind."""
    state = source.__dict__.copy()
    object.__setattr__(twin, "__dict__", state)  # quicker than filling the one that it has
    if is_compiled(source) or state.get("_compiled_call_impl") is not None:
        for key in BOUND & state.keys():
            del state[key]
    for key, value in list(state.items()):
        kind = type(value)
        if kind in _VALUES:  # most are, and this is asked first for that
            continue
        if kind in _PLAIN and not value:  # most of the others: the hooks that nobody has registered
            state[key] = kind()
        elif kind in _SEQUENCES and _VALUES.issuperset(map(type, value)):  # the sizes of a layer
            if kind is list:
                state[key] = value.copy()
        elif key in _REGISTERED:
            state[key] = {k: None if v is None else memo[id(v)] for k, v in value.items()}
        elif key in _HOOKS:
            state[key] = kind()
        elif kind in WEAK:
            state[key] = weakly(value, memo)
        elif isinstance(value, tuple):
            if not all(isinstance(v, _SHARED) for v in value):
                state[key] = _copied(value, memo)
        elif isinstance(value, (torch.Tensor, *_SHARED)):
            continue
        elif type(value) is functools.partial and isinstance(value.func, CachedFunction):
            state[key] = functools.partial(value.func.__wrapped__, *value.args, **value.keywords)
        elif isinstance(value, CachedFunction):  # past its cache, which would keep what a trace computes
            state[key] = _copied(value.__wrapped__, memo)
        elif isinstance(value, (list, dict, set)) and not value:
            state[key] = copy.copy(value)
        else:
            state[key] = _copied(value, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - what cannot be copied raises what it likes
        return value  # locks, generators, handles, scripted functions: nothing the forward pass's structure depends on


def below(path: str, outer: str) -> bool:
    """Whether ``path`` names something in the module at ``outer``, and not that module itself. The root, "", has nothing below it here."""
    return path.startswith(f"{outer}.")


def at_or_below(path: str, outer: str) -> bool:
    """Whether ``path`` is ``outer`` or names something in it."""
    return path == outer or below(path, outer)
