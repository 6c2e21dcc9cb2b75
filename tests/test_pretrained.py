"""Slim models of transformers: their own class, which generates and trains, and folders that ``from_pretrained`` loads elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ExportError, FileError, InputError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers and its packages say about themselves

IDS = torch.arange(12).reshape(2, 6) * 7 % 89 + 3
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = GPT2 if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **more})
    name = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM"}.get(kind, f"{kind}ForCausalLM")
    model = getattr(transformers, name)(config)
    for one in model.parameters():  # away from the small numbers of their initialisation, so that attention says something
        one.data.mul_(3) if one.ndim > 1 else one.data.add_(0.1 * torch.randn_like(one))
    return model.eval()


def inputs(kind: str) -> dict[str, Any]:
    return {"input_ids": IDS} if kind == "Bert" else {"input_ids": IDS, "use_cache": False}


def slim_of(model: Any, kind: str, policy: Any, **options: Any) -> Any:
    return fxprune.compress(model, policy, inputs(kind), keep_class=True, attention="heads", **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def generated(model: Any) -> list[list[int]]:
    tokens = model.generate(input_ids=IDS, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    found: list[list[int]] = tokens.tolist()
    return found


FAMILIES = {
    "Llama": {"num_key_value_heads": 4},
    "Qwen3": {"num_key_value_heads": 4, "head_dim": 8},
    "GPT2": {},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("kind", ["GPT2", *(pytest.param(k, marks=pytest.mark.long) for k in sorted(FAMILIES) if k != "GPT2")])
def test_the_class_generates_with_its_cache_and_loads_elsewhere(kind: str, tmp_path: Path) -> None:
    model = made(kind, **FAMILIES[kind])
    slim = slim_of(model, kind, 0.5)
    assert type(slim) is type(model) and slim.num_parameters() < 0.5 * model.num_parameters()
    with torch.no_grad():
        step = slim(input_ids=IDS[:, :5], use_cache=True)
        last = slim(input_ids=IDS[:, 5:], past_key_values=step.past_key_values).logits[:, -1]
    assert torch.allclose(last, logits(slim)[:, -1], atol=1e-4)
    done = fxprune.export(slim, tmp_path / "slim", format="transformers")
    assert done.format == "transformers" and done.difference == 0 and done.bytes == sum(f.stat().st_size for f in done.path.iterdir())
    assert not list(tmp_path.glob(".export-*")) and slim.config.to_dict() == model.config.to_dict()
    script = (
        "import sys, torch, transformers\n"
        "sys.modules['fxprune'] = None\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(done.path)!r}).eval()\n"
        "with torch.no_grad(): torch.save(model(input_ids=ids).logits, sys.argv[1])\n"
        "print(model.generate(input_ids=ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0).tolist())\n"
    )
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "logits")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert told.stdout.strip().splitlines()[-1] == str(generated(slim))
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), logits(slim))


def test_widths_that_differ_between_layers_are_named(tmp_path: Path) -> None:
    model = made("Llama", num_key_value_heads=4)
    slim = slim_of(model, "Llama", {"model.layers.0.mlp.gate_proj": 0.5, "model.layers.1.mlp.gate_proj": 0.25})
    with pytest.raises(
        ExportError, match=r"LlamaConfig.intermediate_size is one number .* 48 in model.layers.0.mlp.*72 in model.layers.1"
    ) as caught:
        fxprune.export(slim, tmp_path / "slim", format="transformers")
    assert "\n" not in str(caught.value) and "one sparsity for the groups of these layers fits" in str(caught.value)
    assert not (tmp_path / "slim").exists() and len(generated(slim)) == 2  # in memory it works all the same


def test_what_a_family_ties_together_is_named(tmp_path: Path) -> None:
    slim = slim_of(made("Bert"), "Bert", {f"bert.encoder.layer.{i}.attention.self.query": 0.5 for i in range(2)})
    with pytest.raises(ExportError, match="BertForMaskedLM sizes .*attention.* by BertConfig.hidden_size.*; leave .* whole"):
        fxprune.export(slim, tmp_path / "slim", format="transformers")
    slim = fxprune.compress(made("Llama"), 0.5, inputs("Llama"), keep_class=True, attention="head_dim")
    with pytest.raises(ExportError, match=r'gives other outputs, by .*prune with attention="heads"'):
        fxprune.export(slim, tmp_path / "slim", format="transformers")


def test_what_is_no_model_of_transformers_or_no_free_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"writes models of transformers, and this is a Linear; .*keep_class=True"):
        fxprune.export(nn.Linear(2, 2), tmp_path / "slim", format="transformers")
    model = made("GPT2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(FileError, match="it is there already; choose an empty folder"):
        fxprune.export(slim_of(model, "GPT2", 0.5), tmp_path / "full", format="transformers")


def test_training_adapters_and_integers_work_as_on_the_original() -> None:
    slim = slim_of(made("Llama", num_key_value_heads=4), "Llama", 0.5)
    optimizer = torch.optim.AdamW(slim.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = slim(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    kept = [name for name, one in slim.named_modules() if isinstance(one, nn.Linear)]
    assert "model.layers.1.self_attn.q_proj" in kept


def test_integers_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    slim = slim_of(made("Llama", num_key_value_heads=4), "Llama", 0.5)
    before = logits(slim)
    quantization.quantize_(slim, quantization.Int8WeightOnlyConfig())
    assert (
        "Int8" in type(slim.model.layers[0].mlp.up_proj.weight).__name__
        or "Quantized" in type(slim.model.layers[0].mlp.up_proj.weight).__name__
    )
    assert float((logits(slim) - before).abs().max()) < 0.05 * float(before.abs().max()) and len(generated(slim)) == 2


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    slim = slim_of(made("Llama", num_key_value_heads=4), "Llama", 0.5)
    adapted = peft.get_peft_model(slim, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, one in adapted.named_parameters() if one.grad is not None]
    assert trained and all("lora" in name for name in trained) and len(generated(adapted)) == 2


EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "num_key_value_heads": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


class Unchosen(torch.overrides.TorchFunctionMode):
    """The logits of experts that went are minus infinity, and so is what corrects their scores. ``kept``: by their parameters."""

    def __init__(self, kept: dict[int, Tensor]) -> None:
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        weight = next((one for one in args[1:] if id(one) in self.kept), None)
        if func not in (nn.functional.linear, Tensor.add) or weight is None:
            return made
        stays = self.kept[id(weight)]
        return torch.full_like(made, float("-inf")).index_copy(-1, stays, made[..., stays])


@pytest.mark.parametrize("kind", [kind if kind == "Mixtral" else pytest.param(kind, marks=pytest.mark.long) for kind in EXPERTS])
@pytest.mark.parametrize("products", ["grouped_mm", "batched_mm"])
def test_whole_experts_go(kind: str, products: str, tmp_path: Path) -> None:
    model = made(kind, **EXPERTS[kind])
    model.set_experts_implementation(products)
    graph = fxprune.analyze(model, inputs(kind), attention="heads", experts=True)
    groups = [group for group in graph.groups if group.experts]
    assert [(group.name, group.prunable) for group in groups] == [(f"model.layers.{i}.mlp.gate", True) for i in range(2)]
    slim: Any = fxprune.compress(graph, {group.name: 0.5 for group in groups}, keep_class=True, verify=True, importance="random")
    kept = fxprune.record(slim).kept
    left = 4 if kind == "DeepseekV3" else 3  # one of each group goes
    assert all(list(dims) == [0] and len(dims[0]) == left for dims in kept.values())
    assert {name.split("mlp.")[1] for name in kept} >= {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    with Unchosen({id(parameters[name]): dims[0] for name, dims in kept.items() if "gate." in name}):
        wanted, tokens = logits(model), generated(model)
    assert float((logits(slim) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()) and generated(slim) == tokens
    counts = {value for key, value in vars(slim.config).items() if key in ("num_experts", "num_local_experts", "n_routed_experts")}
    assert counts == {left} and counts != {value for key, value in vars(model.config).items() if key.endswith("experts")}
    done = fxprune.export(slim, tmp_path / "slim", format="transformers")
    loaded = type(model).from_pretrained(done.path).eval()  # with products of its own choice
    assert (done.difference or 0) < 1e-5 and torch.allclose(logits(loaded), logits(slim), atol=1e-3)


def test_a_slim_router_is_trained_evenly_and_uneven_ones_are_named(tmp_path: Path) -> None:
    model = made("Mixtral", **EXPERTS["Mixtral"])
    slim = slim_of(model, "Mixtral", {"model.layers.*.mlp.gate": 0.5}, experts=True)
    found = slim(input_ids=IDS, labels=IDS, output_router_logits=True)
    found.loss.backward()
    assert float(found.aux_loss) > 0 and found.router_logits[0].shape[-1] == 3 == slim.num_experts and model.num_experts == 6
    uneven = slim_of(model, "Mixtral", {"model.layers.0.mlp.gate": 0.5, "model.layers.1.mlp.gate": 0.4}, experts=True)
    assert [layer.mlp.experts.num_experts for layer in uneven.model.layers] == [3, 4] and uneven.config.num_local_experts == 6
    assert len(generated(uneven)) == 2
    with pytest.raises(ExportError, match=r"MixtralConfig.num_local_experts is one number .* 3 in model.layers.0.mlp.*4 in model.layers.1"):
        fxprune.export(uneven, tmp_path / "slim", format="transformers")


def test_experts_in_a_loop_over_values_stay() -> None:
    model = made("Mixtral", **EXPERTS["Mixtral"])
    model.set_experts_implementation("eager")
    graph = fxprune.analyze(model, inputs("Mixtral"), attention="heads", experts=True)
    assert not any(group.prunable for group in graph.groups if "mlp.gate" in group.name)
