"""What a graph cannot keep is named in a note, what it seemed unable to keep is kept, and questions about types are answered rightly."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, UnsupportedError
from fxprune.passes.ir.notes import NoteKind

torch.manual_seed(0)
X = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """``how`` is what happens between two convolutions."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.how(self, self.first(x)))
        assert isinstance(made, Tensor)
        return made


def with_gradients(_: Any, y: Tensor) -> Tensor:
    with torch.enable_grad():
        return y * 2


def by_python(_: Any, y: Tensor) -> Tensor:
    return y * random.random()


def by_numpy(_: Any, y: Tensor) -> Tensor:
    return y * float(np.random.rand())  # noqa: NPY002 - what users write


def by_dtype(_: Any, y: Tensor) -> Tensor:
    return y.clamp(-1, 1) if y.dtype == torch.bfloat16 else y


def by_dtype_in(_: Any, y: Tensor) -> Tensor:
    return y.clamp(-1, 1) if y.dtype in (torch.bfloat16, torch.float16) else y


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (with_gradients, "a enable_grad block cannot be kept"),
        (by_python, "forward draws from random;"),
        (by_numpy, "forward draws from numpy.random;"),
        (by_dtype, "a branch on the dtype was specialised"),
        (by_dtype_in, "a branch on the dtype was specialised"),
    ],
)
def test_it_is_said(how: Callable[[Any, Tensor], Tensor], said: str) -> None:
    model = Net(how)
    before = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"], torch.get_rng_state()  # noqa: NPY002
    notes = "\n".join(fxprune.analyze(model, X).notes)
    assert said in notes, notes
    after = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"], torch.get_rng_state()  # noqa: NPY002
    assert after[:2] == before[:2] and torch.equal(after[2], before[2]), "the user's generators do not move"


def skipped_in_training(net: Any, y: Tensor) -> Tensor:
    return y if net.training and np.random.rand() < 0.5 else y.relu()  # noqa: NPY002


def test_what_is_drawn_in_training_is_said_though_evaluation_computes_the_same() -> None:
    with_training = fxprune.analyze(Net(skipped_in_training), X)
    assert list(with_training.traced.graphs) == ["eval"], "the first number that is drawn skips nothing"
    assert any("forward draws from numpy.random;" in note for note in with_training.notes)


def no_grad_only(_: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * 2


def by_mask(_: Any, y: Tensor) -> Tensor:
    mask = y > 0
    return y * mask if mask.dtype == torch.bool and y.dtype != torch.bool else y


def test_it_is_not_said_without_need() -> None:
    assert not fxprune.analyze(Net(no_grad_only), X).notes, "what is computed there is detached"
    assert not fxprune.analyze(Net(by_mask), X).notes, "half() changes no mask"


class Extra(nn.Conv2d):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Merging(Net):
    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        with torch.no_grad():
            self.first.weight.mul_(2.0 if mode else 0.5)
        return self


def hooked() -> nn.Module:
    model = Net(lambda _, y: y)
    model.first.register_full_backward_hook(lambda *_: None)
    return model


def watched() -> nn.Module:
    model = Net(lambda _, y: y)
    model.first.register_forward_hook(lambda module, inputs, output: None)
    return model


def accumulating() -> nn.Module:
    model = Net(lambda _, y: y)
    model.last.weight.register_post_accumulate_grad_hook(lambda p: None)
    return model


def parameter_hooked() -> nn.Module:
    model = Net(lambda _, y: y)
    model.last.weight.register_hook(lambda g: g)
    return model


def with_extra() -> nn.Module:
    model = Net(lambda _, y: y)
    model.last = Extra(8, 4, 1)
    return model


def half_frozen() -> nn.Module:
    model = Net(lambda _, y: y).train()
    model.first.eval()
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (hooked, "the backward hooks of 'first' are not kept"),
        (watched, "the slim module keeps what the forward hooks of 'first' do to inputs and outputs, but not what they store"),
        (accumulating, "the hooks on parameters of 'last' are not kept"),
        (parameter_hooked, "the hooks on parameters of 'last' are not kept"),
        (with_extra, "the extra state of 'last'"),
        (lambda: Merging(lambda _, y: y), "the slim module does not have the train() of the Merging"),
        (half_frozen, "in evaluation mode inside a model that trains: first"),
    ],
)
def test_what_modules_have_beside_their_forward(make: Callable[[], nn.Module], said: str) -> None:
    assert said in "\n".join(fxprune.record(fxprune.compress(make(), 0.5, X)).notes)
    assert not fxprune.record(fxprune.compress(Net(lambda _, y: y).train(), 0.5, X)).notes


def exact(_: Any, y: Tensor) -> Tensor:
    return y * 2 if type(y) is Tensor else y * 0


def weight_type(m: Any, y: Tensor) -> Tensor:
    return y * 2 if type(m.first.weight) is nn.Parameter and isinstance(type(m), type) and issubclass(type(y), Tensor) else y * 0


def no_callable(_: Any, y: Tensor) -> Tensor:
    return y * 0 if callable(y) or not callable(nn.functional.relu) else y * 3


def type_name(_: Any, y: Tensor) -> Tensor:
    return y.type(y.dtype) * 3 if y.type() == "torch.FloatTensor" else y * 0


def by_dtype_table(_: Any, y: Tensor) -> Tensor:
    return y * {torch.float32: 2.0, torch.float16: 3.0}[y.dtype]


def no_dictionary(_: Any, y: Tensor) -> Tensor:
    return y * 0 if hasattr(y, "keys") or hasattr(y, "items") else y * 2


def on_its_device(_: Any, y: Tensor) -> Tensor:
    return y * 2 if y.is_cpu is True and y.is_cuda is False and y.is_meta is False else y * 0


OF_TYPES = (exact, weight_type, no_callable, type_name, by_dtype_table, no_dictionary, on_its_device)


@pytest.mark.parametrize("how", OF_TYPES)
def test_types_are_answered(how: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(how).eval()
    torch.testing.assert_close(fxprune.compress(model, 0.0, X)(X), model(X))
    assert "type" not in vars(__import__("sys").modules[__name__]), "the name is gone from the user's module again"


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale = weight.std((1, 2, 3), keepdim=True) + 1e-5
        made: Tensor = super()._conv_forward(input, (weight - weight.mean((1, 2, 3), keepdim=True)) / scale, bias)
        return made


class Doubled(nn.Linear):
    @property
    def doubled(self) -> Tensor:
        return self.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.doubled, self.bias)


class Plain(nn.Conv2d):
    """Only made and printed in its own way, which is no reason to look inside."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return "plain"


def test_layers_that_compute_in_their_own_way() -> None:
    first = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    second = nn.Sequential(nn.Flatten(), Doubled(108, 16), nn.ReLU(), Doubled(16, 4)).eval()
    for model in (first, second):
        slim = fxprune.compress(model, 0.0, X)
        torch.testing.assert_close(slim(X), model(X))
        fxprune.compress(model, 0.5, X, verify=True)
    slim = fxprune.compress(nn.Sequential(Plain(3, 8, 3), nn.ReLU(), Plain(8, 4, 1)), 0.5, X)
    assert type(slim.get_submodule("0")) is Plain


def test_modules_named_by_keywords() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.ModuleDict({"in": nn.Conv2d(3, 8, 1), "0": nn.ModuleDict({"class": nn.Conv2d(8, 8, 1)}), "in_": nn.Conv2d(8, 4, 1)})
            self.register_parameter("lambda", nn.Parameter(torch.rand(8, 1, 1)))

        def forward(self, x: Tensor) -> Tensor:
            y = self.d["in"](x).relu() * getattr(self, "lambda")
            inner = self.d["0"]
            assert isinstance(inner, nn.ModuleDict)
            made = self.d["in_"](nn.functional.dropout(inner["class"](y), 0.5, self.training))
            assert isinstance(made, Tensor)
            return made

    model = Keywords().eval()
    slim: Any = fxprune.compress(model, 0.0, X)
    for twin in (slim, copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        torch.testing.assert_close(twin(X), model(X))
        twin.train()(X)
    fxprune.compress(model, 0.5, X, verify=True)
    with pytest.raises(UnsupportedError, match=r"cannot write code that calls 'd.in'"):
        slim.detached()


def test_a_module_named_self() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.add_module("self", nn.Conv2d(8, 8, 1))

        def forward(this: Any, x: Tensor) -> Any:
            return this.last(this.self(this.first(x).relu()).relu())

    slim: Any = fxprune.compress(Block().eval(), 0.5, X, verify=True)
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        torch.testing.assert_close(twin(X), slim(X))
    with pytest.raises(UnsupportedError, match="cannot write code that calls 'self'"):
        slim.detached()


def test_scripted_parts_stay_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        part = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), part, nn.Conv2d(8, 4, 1)).eval()
    before = model[1].training
    slim = fxprune.compress(model, 0.5, X)
    torch.testing.assert_close(slim(X), model(X))
    assert set(slim.state_dict()) == set(model.state_dict()) and model[1].training == before


def test_modules_without_weights_yet_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.LazyConv2d(4, 1)))
    with pytest.raises(InputError, match=r"1\.0 \(LazyConv2d\) has no weights yet: run the model once on real inputs first"):
        fxprune.compress(model, 0.5, X)
    model(X)
    assert fxprune.compress(model, 0.5, X)(X).shape == (2, 4, 6, 6)


def test_indices_move_with_the_model() -> None:
    class Twice(Net):
        order: Tensor

        def __init__(self) -> None:
            super().__init__(lambda m, y: y.index_select(1, m.order) + y.index_select(1, m.order))
            self.register_buffer("order", torch.randperm(8))

    model = Twice().eval()
    slim = fxprune.compress(model, 0.5, X)
    assert set(slim.state_dict()) == set(model.state_dict())
    moved = slim.to("meta")
    assert moved(X.to("meta")).device.type == "meta"
    assert {v.device.type for v in vars(moved).values() if isinstance(v, Tensor)} == {"meta"}
    assert set(dict(moved.named_buffers())) == set(dict(model.named_buffers()))
    again = pickle.loads(pickle.dumps(copy.deepcopy(fxprune.compress(model, 0.5, X))))
    assert set(again.state_dict()) == set(model.state_dict()) and again(X).shape == (2, 4, 6, 6)


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, shift: float = 0.5, flip: bool = False) -> Any:
        y = self.first(x.flip(-1) if flip else x).relu()
        return self.last(y if mask is None else y * mask) * scale + shift


def test_optional_arguments_keep_their_defaults_and_those_left_out_are_said() -> None:
    model = Options().eval()
    for example, left_out in (
        ({"x": X, "scale": 2.0, "shift": 3.0}, "arguments mask, flip,"),
        ({"x": X, "mask": X[:, :1], "scale": 2.0}, "arguments shift, flip,"),
        ({"x": X, "mask": None, "scale": 2.0, "shift": 1.0, "flip": True}, ""),
    ):
        slim = fxprune.compress(model, 0.0, example)
        for name in ("scale", "shift"):
            given = {key: value for key, value in example.items() if key != name}
            torch.testing.assert_close(slim(**given), model(**given))
        said = [note for note in fxprune.record(slim).notes if "does not take forward's optional" in note]
        assert len(said) == bool(left_out) and all(left_out in note and "test_lost.py:" in note for note in said)


def test_vmap_over_the_batch_takes_one_batch_alone() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(10, 16), nn.Linear(16, 4)
            self.weights = nn.Parameter(torch.randn(3, 16, 16))

        def forward(self, x: Tensor) -> Any:
            y = self.first(x).relu()
            if self.of_batch:
                return self.last(torch.func.vmap(lambda row: row.softmax(0))(y))
            return self.last(torch.func.vmap(lambda weight: y @ weight)(self.weights).mean(0))

    for of_batch in (True, False):
        Mapped.of_batch = of_batch  # type: ignore[attr-defined]
        slim = fxprune.compress(Mapped().eval(), 0.5, torch.randn(4, 10), verify=True)
        said = [note for note in fxprune.record(slim).notes if "torch.vmap over 4 was specialised" in note]
        assert len(said) == of_batch == len(fxprune.record(slim).notes)
        if of_batch:
            with pytest.raises(AssertionError, match=r"test_lost.py:\d+: torch.vmap over 4"):
                slim(torch.randn(7, 10))
        else:
            slim(torch.randn(7, 10))


BY_DTYPE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "element_size": lambda _, y: y * (1 if y.element_size() == 4 else 3),
    "itemsize": lambda _, y: y * (1 if y.itemsize == 4 else 3),
    "itemsize of the dtype": lambda _, y: y * (1 if y.dtype.itemsize == 4 else 3),
    "limits": lambda _, y: y * (1 if torch.finfo(y.dtype).bits == 32 else 3),
}


@pytest.mark.parametrize("how", BY_DTYPE)
def test_branches_on_what_follows_from_the_dtype_are_said(how: str) -> None:
    kinds = {getattr(note, "kind", None) for note in fxprune.analyze(Net(BY_DTYPE[how]).eval(), X).notes}
    assert NoteKind.DTYPE in kinds


OWN = random.Random(3)
GENERATOR = np.random.default_rng(3)


@pytest.mark.parametrize(
    "how", [lambda _, y: y * OWN.random(), lambda _, y: y * float(GENERATOR.random()), lambda m, y: y * m.own.random()]
)
def test_generators_of_the_users_do_not_move_and_what_they_draw_is_said(how: Callable[[Any, Tensor], Tensor]) -> None:
    model: Any = Net(how).eval()
    model.own = random.Random(4)

    def states() -> Any:
        return OWN.getstate(), GENERATOR.bit_generator.state, model.own.getstate()

    before = states()
    slim = fxprune.compress(model, 0.5, X)
    assert states() == before
    assert any("of its own" in note for note in fxprune.record(slim).notes)
