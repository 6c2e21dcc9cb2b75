"""Models of Hugging Face transformers, tiny and with random weights, pruned through torch.export."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from tests.passes.exporting import assert_exported_sound, exported
from tests.passes.helpers import call, gap, leaves, prime, zeroed

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")

LENGTH = 7
WORDS = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=32)}
IMAGES = {"pixel_values": {0: torch.export.Dim("batch", max=64)}}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 40}
Make = Callable[[], nn.Module]


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=50, n_positions=40, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False))


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50, use_cache=False, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=4))


def swin() -> Any:
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    return transformers.SwinModel(config)


def words(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length))


def text(batch: int = 2, length: int = LENGTH) -> dict[str, Any]:
    return {"input_ids": words(batch, length)}


def masked(batch: int = 2, length: int = LENGTH) -> dict[str, Any]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": words(batch, length), "attention_mask": mask}


def pair(batch: int = 2, length: int = LENGTH) -> dict[str, Any]:
    return {"input_ids": words(batch, length), "decoder_input_ids": words(batch, length)}


def picture(batch: int = 2, length: int = 0) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


# make, inputs, dynamic sizes, the share of parameters that half of every group leaves at most
MODELS: dict[str, tuple[Make, Callable[..., dict[str, Any]], dict[str, Any], float]] = {
    "bert": (bert, masked, {"input_ids": WORDS, "attention_mask": WORDS}, 0.35),
    "gpt2": (gpt2, text, {"input_ids": WORDS}, 0.35),
    "llama": (llama, text, {"input_ids": WORDS}, 0.35),
    "t5": (t5, pair, {"input_ids": WORDS, "decoder_input_ids": WORDS}, 0.6),
    "vit": (vit, picture, IMAGES, 0.35),
    "swin": (swin, picture, IMAGES, 0.5),
}


def made(name: str) -> tuple[Any, Any, dict[str, Any]]:
    make, inputs, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        model, example = make(), inputs()
        prime(model, example)
    return model, exported(model, example, dynamic_shapes=sizes), example


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in ("t5", "swin") else n for n in MODELS])
def test_model_through_export(name: str) -> None:
    model, module, example = made(name)
    slim, graph = assert_exported_sound(module, example)
    rec = fxprune.record(slim)
    assert rec.after.params <= MODELS[name][3] * rec.before.params
    assert not graph.unknown, graph.unknown
    assert set(dict(slim.named_parameters())) <= set(dict(model.named_parameters(remove_duplicate=False)))
    other = MODELS[name][1](3, 11)
    whole = fxprune.compress(graph, 0.0)
    with torch.no_grad():
        want = call(model, other)
        assert gap(leaves(want), leaves(call(whole, other))) < 1e-5  # other sizes compute what the model does
        assert [t.shape for t in leaves(call(slim, other))] == [t.shape for t in leaves(want)] or name == "t5"


def test_verified_in_one_call() -> None:
    _, module, example = made("gpt2")
    slim = fxprune.compress(module, 0.5, example, verify=True)
    assert slim.get_parameter("transformer.h.0.attn.c_attn.weight").shape == (16, 48)  # Conv1D: inputs first
    assert slim.get_parameter("transformer.wte.weight").shape == (50, 16)


def test_grouped_queries_keep_their_ratio() -> None:
    _, module, example = made("llama")
    for attention, query, key in (("head_dim", 16, 8), ("heads", 16, 8)):
        slim = fxprune.compress(module, 0.5, example, attention=attention, verify=True)
        layer = "model.layers.0.self_attn"
        shapes = [tuple(slim.get_parameter(f"{layer}.{n}_proj.weight").shape) for n in "qkv"]
        assert shapes == [(query, 16), (key, 16), (key, 16)], attention


def llama_eager() -> Any:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config)


def test_an_untraceable_call_names_the_road_through_export() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight if x.sum() > 0 else x

    with pytest.raises(fxprune.errors.TraceError, match=r"fxprune.compress\(torch.export.export\(model, \(example,\)\).module\(\), ...\)"):
        fxprune.compress(Odd(), 0.5, torch.randn(2, 4))


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=4, use_cache=False)
    return transformers.MambaForCausalLM(config)


@pytest.mark.parametrize(("make", "inputs", "left"), [(t5, pair, 0.6), (mamba, text, 0.4), (llama_eager, text, 0.4)])
def test_model_without_export(make: Make, inputs: Callable[..., dict[str, Any]], left: float) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        model, example = make().eval(), inputs()
        slim = fxprune.compress(model, 0.5, example, verify=True)
    rec = fxprune.record(slim)
    assert isinstance(slim, torch.fx.GraphModule)  # the root, not parts of it
    assert rec.after.params <= left * rec.before.params


@pytest.mark.long
def test_a_language_model_of_a_real_size_is_analysed_in_half_a_minute() -> None:
    """36 layers of width 4,096 on the meta device, in a process of its own, whose memory nothing else has used."""
    script = (
        "import resource, time, torch, transformers, fxprune\n"
        "config = transformers.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=36,\n"
        "                                  num_attention_heads=32, num_key_value_heads=8)\n"
        "with torch.device('meta'): model = transformers.LlamaForCausalLM(config).eval()\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "graph = fxprune.analyze(model, {'input_ids': torch.zeros(2, 64, dtype=torch.long)}, attention='heads')\n"
        "print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6,\n"
        "      sum(group.prunable for group in graph.groups))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    seconds, gigabytes, groups = map(float, done.stdout.split())
    assert seconds < 30 and gigabytes < 2 and groups == 73


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=28, patch_size=14, projection_dim=32)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2), image_token_index=7
    )
    return transformers.LlavaForConditionalGeneration(config)


def pictures_and_words(length: int) -> dict[str, Any]:
    ids = torch.randint(8, 50, (2, length))
    ids[:, 1:5] = 7  # one for each patch of the picture
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28), "attention_mask": torch.ones_like(ids)}


def test_pictures_and_words_are_traced_whole() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the library's own
        model, example = llava().eval(), pictures_and_words(9)
        graph = fxprune.analyze(model, example, attention="heads", outputs=["logits"])
        slim = fxprune.compress(graph, 0.5, example, norms="exact", verify=True)
        rec = fxprune.record(slim)
        assert rec.after.params <= 0.45 * rec.before.params
        for length in (9, 12):
            other = pictures_and_words(length)
            assert gap(zeroed(model, rec.kept)(**other).logits, slim(**other)["logits"]) < 1e-5
        assert any("a check of values" in note for note in rec.notes)
        assert type(fxprune.compress(graph, 0.5, example, keep_class=True)) is type(model)
