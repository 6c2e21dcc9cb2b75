"""The slim module: a ``GraphModule`` that keeps every name, holds both modes' graphs, and survives copies and pickles."""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxprune.errors import FAULTS, UnsupportedError, first_line
from fxprune.passes import compat
from fxprune.passes.compat import OpOverload, OpOverloadPacket, forward_from_source
from fxprune.passes.ir.detaching import Again, replayable

_FX = frozenset(
    {
        "_graph",
        "_code",
        "_lineno_map",
        "_prologue_start",
        "_tracer_cls",
        "_tracer_extras",
        "meta",
        "_replace_hooks",
        "_create_node_hooks",
        "_erase_node_hooks",
        "_deepcopy_hooks",
        "graphs",
        "_compiled",
        "_borrowed",
        "_numbers",
        "_filled",
    }
)


MODES = "_held_modes"  # attribute: mode of the whole, "train" or "eval" -> the submodules in another one, by name, and their flag
ASKING = "_asking_modes"  # attribute: the submodules whose own code does something else in training, each as the names that lead to it
_COPIED = "_user_preserved_attributes"  # where torch.fx looks for the attributes that a copy of a graph module has
FOLLOWING = "_following"  # attribute that names the plain tensors of a module that move with it


class Blank:
    """A number in a shared graph that every module has one of its own for: in its ``_numbers``, at ``place``."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __repr__(self) -> str:  # as it stands in the code
        return f"self._numbers[{self.place}]"


class SlimModule(fx.GraphModule):
    """A pruned network as an ordinary ``torch.fx.GraphModule``.

    ``graphs``: "eval", and "train" where the original computes something else in training mode; ``forward`` picks by
    ``self.training``. ``graph`` is the one of evaluation. Copies and pickles keep both graphs and the record: they store the nodes
    rather than trace again, which would lose what plain proxies cannot follow.
    """

    def __init__(self, tree: nn.Module, graphs: dict[str, fx.Graph]) -> None:
        names = {*tree._modules, *tree._parameters, *tree._buffers}
        if taken := sorted(names & (_FX | {*dir(SlimModule)}) - {*dir(nn.Module)}):
            raise UnsupportedError(
                f"the model calls one of its modules or tensors {taken[0]!r}, which torch.fx.GraphModule has for something of its own;"
                " rename it, or give keep_class=True"
            )
        super().__init__(nn.Module(), fx.Graph())
        self.__dict__.update(tree.__dict__)
        self._adopt(graphs)

    def _adopt(self, graphs: dict[str, fx.Graph]) -> None:
        self.__dict__["graphs"] = graphs
        self.graph = graphs["eval"]
        for graph in graphs.values():
            graph.owning_module = self

    def standing_for(self, kind: type) -> SlimModule:
        """This module, which computes what one of class ``kind`` did, as one of that class: code around it may ask for its attributes,
        methods and properties. The attributes come with the tree; where the class allows no heirs there is no more than they."""
        if issubclass(kind, fx.GraphModule):  # which may stand for another in turn; two such classes would call each other for ever
            own = (one for one in kind.__mro__ if not issubclass(one, fx.GraphModule) and not issubclass(fx.GraphModule, one))
            kind = next(own, nn.Module)
        self.__dict__["_stands_for"] = kind
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):  # the graph has what they do
            self.__dict__[hooks] = OrderedDict()
        self.__dict__.pop("forward", None)
        if kind is nn.Module:
            return self
        with contextlib.suppress(TypeError):
            self.__class__ = type("GraphModuleImpl", (type(self), kind), {})
        return self

    def _standing(self) -> SlimModule:
        kind = self.__dict__.get("_stands_for")
        return self if kind is None else self.standing_for(kind)

    def sibling(self, tree: nn.Module, numbers: Sequence[int] | None = None) -> SlimModule:
        """A module with other tensors and the same graphs: these and their code are shared until somebody asks for ``graph``.

        ``numbers``: what stands in the graphs' blanks, None where they have none.
        """
        twin: SlimModule = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.__dict__.update(tree.__dict__)
        twin.__dict__["_borrowed"] = True
        if numbers is not None:
            twin.__dict__["_numbers"] = tuple(numbers)
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> SlimModule:
        """Indices that the graph reads are plain attributes, which ``nn.Module`` would leave on their device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self.modules() if recurse else (self,):
            for key in module.__dict__.get(FOLLOWING, ()):
                module.__dict__[key] = fn(module.__dict__[key])
        return self

    def train(self, mode: bool = True) -> SlimModule:
        """Training or evaluation mode; what the original's code holds in one mode (frozen batch norms) stays in that."""
        super().train(mode)
        if held := self.__dict__.get(MODES, {}).get("train" if mode else "eval"):
            modules = dict(self.named_modules(remove_duplicate=False))
            for name in held.keys() & modules.keys():
                modules[name].training = held[name]
        return self

    def _say_other_modes(self) -> None:
        """Warn of submodules that are in another mode than the graph has their code in: their layers follow, their code does not."""
        held = self.__dict__.get(MODES, {}).get("train" if self.training else "eval", {})
        for names in self.__dict__.get(ASKING, ()):
            module: Any = self
            for name in names:
                module = module._modules.get(name) if module is not None else None
            path = ".".join(names)
            if module is not None and module.training != held.get(path, self.training):
                own, whole = ("training" if flag else "evaluation" for flag in (module.training, self.training))
                text = (
                    f"{path!r} is in {own} mode and the network in {whole} mode: its layers follow, but what its own code does by "
                    f"self.training is part of the graph, and done as in {whole}"
                )
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    @property
    def borrowed(self) -> bool:
        """Whether the graphs are still shared with siblings."""
        return "_borrowed" in self.__dict__

    def _own(self) -> None:
        """Copies of shared graphs, and a class of its own for the code, which fx keeps on the class: they may now be edited."""
        if self.borrowed:
            del self.__dict__["_borrowed"]
            self.__class__ = type("GraphModuleImpl", (SlimModule,), {})
            graphs = {m: _thaw(g) for m, g in self._frozen().items()}
            for key in ("_numbers", "_filled"):
                self.__dict__.pop(key, None)
            self._adopt(graphs)

    @property
    def code(self) -> str:
        self._own_code()
        return super().code

    def __str__(self) -> str:
        self._own_code()
        return str(super().__str__())

    def print_readable(self, *args: Any, **named: Any) -> str:
        self._own_code()
        return str(super().print_readable(*args, **named))

    def _own_code(self) -> None:
        """Shared code is not to be read where it has blanks."""
        if "_numbers" in self.__dict__:
            self._own()

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        self._own()
        found: dict[str, fx.Graph] = self.__dict__["graphs"]
        return found

    @property
    def eval_graph(self) -> fx.Graph:
        """The graph of evaluation to read, not to edit: it may be shared with siblings."""
        return self.to_read["eval"]

    @property
    def to_read(self) -> dict[str, fx.Graph]:
        """The graphs of the modes to read, not to edit."""
        found: dict[str, fx.Graph] = self.__dict__["graphs"]
        if "_numbers" not in self.__dict__:
            return found
        if "_filled" not in self.__dict__:
            self.__dict__["_filled"] = {m: _thaw(g) for m, g in self._frozen().items()}
        filled: dict[str, fx.Graph] = self.__dict__["_filled"]
        return filled

    @property
    def graph(self) -> fx.Graph:
        self._own()
        return self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._own()
        if "graphs" in self.__dict__:
            self.__dict__["graphs"]["eval"] = graph
        set_graph: Any = fx.GraphModule.graph.fset  # type: ignore[attr-defined]
        set_graph(self, graph)

    def recompile(self) -> Any:
        if self.borrowed:
            return None
        graphs = self.__dict__.get("graphs")
        if graphs is None:  # fx's own constructor, before there is anything to compile
            return None
        state = [(n, n.target, n.args, n.kwargs) for g in graphs.values() for n in g.nodes]
        known = self.__dict__.get("_compiled")
        # A PassManager recompiles after every pass; the arguments of an unchanged node are the same objects.
        if (
            known is not None
            and len(known[0]) == len(state)
            and all(a is b for x, y in zip(known[0], state, strict=True) for a, b in zip(x, y, strict=True))
        ):
            return known[1]
        for graph in graphs.values():
            compat.quote_keywords(graph)
        code = super().recompile()
        self.__dict__["_compiled"] = (state, code)
        if "train" in graphs:
            cls: Any = type(self)
            cls._forward_eval = cls.forward
            train = graphs["train"].python_code(root_module="self")
            cls._forward_train = forward_from_source(train.src, train.globals)
            given = [n for n in graphs["eval"].nodes if n.op == "placeholder"]
            call = ", ".join(str(n.target) for n in given)
            formal = ["self", *(f"{n.target}={n.args[0]!r}" if n.args else str(n.target) for n in given)]
            source = (
                f"def forward({', '.join(formal)}):\n    self._say_other_modes()\n"
                f"    if self.training:\n        return self._forward_train({call})\n    return self._forward_eval({call})\n"
            )
            cls.forward = forward_from_source(source, {})
        return code

    def detached(self) -> fx.GraphModule:
        """A plain ``torch.fx.GraphModule`` that computes the same and needs no fxprune: not to run, to pickle, to load or to script.

        It shares no storage with this module and carries no pruning record; it has the one graph of the mode, training or evaluation, that
        this module is in, and the parameters and buffers that the graph reads. Modules that could not be traced stay as they are, of the
        user's class; their parts that were traced by themselves become plain graph modules too, which have the attributes but not the class
        of what they were. When fx loads such a module from a pickle it traces the
        module's code again. Calls that this would lose (``torch.zeros(n, 3)`` of a size, ``x[i] = y``, numbers that are drawn, objects
        such as a cache) are calls of plain modules below ``_calls``; a network with such calls pickles, but does not script.

        Returns:
            The module, in the same mode, on the same device, with the same ``requires_grad`` flags.

        Raises:
            UnsupportedError: the graph calls a function or module of fxprune's own that nothing of torch stands for, or fx cannot trace its
                code again; says what instead.
        """
        mode = "train" if self.training and "train" in self.__dict__["graphs"] else "eval"
        graph = _thaw(self._frozen()[mode])
        if (name := compat.unwritable(graph)) is not None:
            raise UnsupportedError(
                f"plain torch.fx cannot write code that calls {name!r}; rename it, or keep the slim network with fxprune.save"
            )
        twin = copy.deepcopy(self)
        _detach_parts(twin, {})
        replayable(twin, graph)
        for node in graph.nodes:
            node.meta = {}
        plain = fx.GraphModule(twin, graph, "GraphModule")
        modes = {name: module.training for name, module in self.named_modules()}
        for name, module in plain.named_modules():
            module.training = modes.get(name, self.training)
        try:
            fx.graph_module.GraphModule(plain, Again().trace(plain))
        except FAULTS as error:
            raise UnsupportedError(
                f"fx cannot trace the slim network's code again, as it does when a pickle is loaded ({first_line(error)}); "
                "export it with torch.export.export(slim, inputs), or keep it with fxprune.save"
            ) from error
        return plain

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _FX}

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimModule:
        twin = SlimModule(nn.Module(), {m: _thaw(g) for m, g in self._frozen().items()})
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self._state().items()})
        return twin._standing()

    def __copy__(self) -> SlimModule:
        return _restore(self._state(), self._frozen())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._state(), self._frozen())

    def _frozen(self) -> dict[str, Frozen]:
        numbers = self.__dict__.get("_numbers", ())
        return {m: _freeze(g, numbers) for m, g in self.__dict__["graphs"].items()}


def _detach_parts(module: nn.Module, known: dict[nn.Module, nn.Module]) -> None:
    """Plain graph modules in place of the slim modules within ``module``, with the attributes that code around them may ask for."""
    for name, child in module._modules.items():
        if not isinstance(child, SlimModule):
            if child is not None:
                _detach_parts(child, known)
            continue
        if child not in known:
            plain = known[child] = child.detached()
            own = {key: value for key, value in child._state().items() if not key.startswith("_") and key not in plain.__dict__}
            plain.__dict__.update(own)
            plain.meta[_COPIED] = own  # else a copy of it would be without
        module._modules[name] = known[child]


class _Ref:
    """A reference to a node by name, in a frozen graph."""

    def __init__(self, name: str) -> None:
        self.name = name


def _named(node: fx.Node) -> Any:
    return _Ref(node.name)


Frozen = list[tuple[str, str, Any, Any, Any, dict[str, Any]]]


def _freeze(graph: fx.Graph, numbers: Sequence[int] = ()) -> Frozen:
    """``numbers``: what stands in the blanks."""
    nodes = []
    for node in graph.nodes:
        args: Any = map_arg(node.args, _named)
        kwargs: Any = map_arg(node.kwargs, _named)
        nodes.append((node.name, node.op, _target(node.target), _plain(args, numbers), _plain(kwargs, numbers), dict(node.meta)))
    return nodes


def _target(target: Any) -> Any:
    """A call's target in a form that pickles: some functions are made inside others and are known only by where they can be found."""
    if isinstance(target, OpOverload):
        return _Op(target)
    if isinstance(target, OpOverloadPacket):
        return _Packet(target)
    if "<locals>" in getattr(target, "__qualname__", ""):
        for home in (torch.nn.functional, torch):
            name = str(target.__name__)
            if getattr(home, name, None) is target:
                return _Found(home.__name__, name)
    return target


class _Packet:
    """An operator without a chosen overload, by name."""

    def __init__(self, packet: OpOverloadPacket) -> None:
        self.namespace, self.name = packet._qualified_op_name.split("::")

    def get(self) -> Any:
        return getattr(getattr(torch.ops, self.namespace), self.name)


class _Found:
    """A function by the module that offers it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def get(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


class _Op:
    """An ATen operator, by name: the operator object itself does not pickle."""

    def __init__(self, op: OpOverload) -> None:
        self.parts = (op.namespace, op._schema.name.split("::")[-1], op._overloadname)

    def get(self) -> Any:
        namespace, name, overload = self.parts
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _plain(value: Any, numbers: Sequence[int]) -> Any:
    """fx's immutable lists and dicts as ordinary ones (they do not pickle in every torch version), and blanks filled in."""
    if isinstance(value, Blank):
        return numbers[value.place]
    if isinstance(value, dict):
        return {k: _plain(v, numbers) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, numbers) for v in value]
    if isinstance(value, tuple):
        made = [_plain(v, numbers) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    if isinstance(value, slice):
        return slice(*(_plain(v, numbers) for v in (value.start, value.stop, value.step)))
    return value


def _thaw(nodes: Frozen) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def refs(value: Any) -> Any:
        if isinstance(value, _Ref):
            return made[value.name]
        if isinstance(value, dict):
            return {k: refs(v) for k, v in value.items()}
        if isinstance(value, list):
            return [refs(v) for v in value]
        if isinstance(value, tuple):
            parts = [refs(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, slice):
            return slice(refs(value.start), refs(value.stop), refs(value.step))
        return value

    for name, op, target, args, kwargs, meta in nodes:
        node = graph.create_node(op, target.get() if isinstance(target, (_Op, _Packet, _Found)) else target, refs(args), refs(kwargs), name)
        node.meta = dict(meta)
        made[name] = node
    return graph


def _restore(state: dict[str, Any], graphs: dict[str, Frozen]) -> SlimModule:
    twin = SlimModule(nn.Module(), {m: _thaw(g) for m, g in graphs.items()})
    twin.__dict__.update(state)
    return twin._standing()
