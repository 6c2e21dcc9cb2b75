"""What works on the slim models of transformers, family by family: ``python -m benchmarks.families [NAME ...]``.

Small models with random weights, two layers each, are traced with their defaults (the cache included) and pruned at 0.5 in every group with
``attention="heads"`` and ``keep_class=True``. Each check below gives "yes" or the reason in a few words; the table goes into
docs/how-to/transformers.md between its marks, and tests/test_families.py asks for every row again.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxPruneError

V = 97  # tokens
IDS = torch.arange(12).reshape(2, 6) * 7 % 89 + 3
TOKENS = 32  # generated
PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "transformers.md"
BEGIN, END = "<!-- made by benchmarks/families.py: begin -->", "<!-- end -->"
YES, NOT = "yes", ""
Inputs = dict[str, Any]
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64, "intermediate_size": 96}
TEXT = {"vocab_size": V, "max_position_embeddings": 64, **LAYERS, **SPECIAL}
GROUPED = {**TEXT, "num_key_value_heads": 4}
HEADS, HIDDEN = r"attn|attention|Attention", r"embed|wte|shared|patch_embeddings|downsampl|encoder\.conv1|pooler"


def ids() -> Inputs:
    return {"input_ids": IDS}


def both() -> Inputs:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}


def image(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def sound() -> Inputs:
    return {"input_features": torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0)), "decoder_input_ids": IDS}


@dataclass(frozen=True)
class Family:
    """One family: a class of transformers, the numbers of its configuration, example inputs, and the layers that adapters go to.

    ``prompt``: the inputs that ``generate`` starts from; empty where it does not generate. ``auto``: the class that loads its folders, the
    model's own where it is empty.
    """

    name: str
    model: str
    options: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    adapted: Sequence[str]
    prompt: Sequence[str] = ()
    auto: str = "AutoModelForCausalLM"

    def build(self) -> Any:
        """The model with weights that leave no output at rest."""
        transformers: Any = importlib.import_module("transformers")
        kind = getattr(transformers, self.model)
        torch.manual_seed(0)
        model = kind(kind.config_class(**self.options))
        with torch.no_grad():
            for one in model.parameters():
                one.mul_(3) if one.ndim > 1 else one.add_(0.1 * torch.randn_like(one))
        return model.eval()


def causal(name: str, adapted: Sequence[str] = ("q_proj", "v_proj"), model: str = "", **options: Any) -> Family:
    base = options.pop("base", GROUPED)
    return Family(name, model or f"{name}ForCausalLM", {**base, **options}, ids, adapted, ("input_ids",))


GPT2 = {"vocab_size": V, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
OPT = {**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, "ffn_dim": 96, "word_embed_proj_dim": 64}
PICTURES = {"image_size": 32, "patch_size": 8, "num_labels": 5, **LAYERS}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4, "num_labels": 5}
WHISPER = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": V, "num_mel_bins": 16, "max_source_positions": 20,
    "max_target_positions": 48, "decoder_start_token_id": 1, "begin_suppress_tokens": None, **SPECIAL,
}  # fmt: skip
T5 = {"vocab_size": V, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 8, "decoder_start_token_id": 0}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4: dict[str, Any] = {
    "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip
STEP = {
    "head_dim": 16, "sliding_window": 32, "mlp_layer_types": ["dense", "dense"], "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip
PIXEL: dict[str, Any] = {"prompt": (), "auto": "AutoModelForImageClassification"}
CONVNEXT = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_labels": 5}
LABELS, SPEECH = "AutoModelForSequenceClassification", "AutoModelForSpeechSeq2Seq"
FAMILIES = {
    one.name: one
    for one in (
        causal("Llama"),
        causal("Mistral"),
        causal("Qwen2"),
        causal("Qwen3", head_dim=8),
        causal("Gemma", head_dim=8),
        causal("Gemma4", model="Gemma4ForCausalLM", **GEMMA4),
        causal("Phi"),
        causal("GPT2", ("c_attn",), "GPT2LMHeadModel", base=GPT2),
        causal("OPT", base=OPT),
        causal("GPTNeoX", ("query_key_value",), base=TEXT),
        causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
        causal("Qwen2Moe", shared_expert_intermediate_size=48, **ROUTED),
        causal("Qwen3Moe", head_dim=8, **ROUTED),
        Family("Step 3.7, text", "Step3p7TextModel", {**GROUPED, **STEP}, ids, ("q_proj", "v_proj"), (), ""),
        Family("BERT", "BertForSequenceClassification", {**TEXT, "num_labels": 3}, ids, ("query", "value"), (), LABELS),
        Family("ViT", "ViTForImageClassification", PICTURES, image(32), ("q_proj", "v_proj"), **PIXEL),
        Family("Swin", "SwinForImageClassification", SWIN, image(32), ("q_proj", "v_proj"), **PIXEL),
        Family("ConvNeXt", "ConvNextForImageClassification", CONVNEXT, image(64), ("pwconv1",), **PIXEL),
        Family("Whisper", "WhisperForConditionalGeneration", WHISPER, sound, ("q_proj", "v_proj"), ("input_features",), SPEECH),
        Family("T5", "T5ForConditionalGeneration", T5, both, ("q", "v"), ("input_ids",), "AutoModelForSeq2SeqLM"),
    )
}  # fmt: skip


class Trial:
    """One family's model, its analysis and its slim model; each check is a method that returns "yes", a few words, or nothing to ask."""

    def __init__(self, family: Family) -> None:
        self.family, self.model, self.inputs = family, family.build(), family.inputs()
        self.graph = fxprune.analyze(self.model, self.inputs, attention="heads", experts=True)
        self.free = [g.name for g in self.graph.groups if g.prunable]
        self.slim: Any = self.pruned(dict.fromkeys(self.free, 0.5))

    def pruned(self, policy: Mapping[str, float], **options: Any) -> Any:
        return fxprune.compress(self.graph, policy, self.inputs, keep_class=True, importance="l2", **options)

    def parts(self, *kinds: str) -> dict[str, float]:
        """0.5 for the groups of these kinds: heads (with the keys and values they read), feed-forward, hidden size, whole experts."""
        kind = {n: "heads" if re.search(HEADS, n) else "hidden" if re.search(HIDDEN, n) else "feed-forward" for n in self.free}
        kind |= {g.name: "experts" for g in self.graph.groups if g.experts}
        return {name: 0.5 for name in self.free if kind[name] in kinds}

    # -- the checks -----------------------------------------------------------------------------------------------------------

    def kept(self) -> str:
        """The class stays, gives bit for bit what the slim graph gives in both modes, and loses what it was to lose."""
        graph = fxprune.compress(self.graph, dict.fromkeys(self.free, 0.5), self.inputs, importance="l2")
        if type(self.slim) is not type(self.model):
            return f"a {type(self.slim).__name__}"
        for training in (False, True):
            found = []
            for module in (self.slim, graph):
                torch.manual_seed(0)
                found.append(_first(copy.deepcopy(module).train(training)(**self.inputs)))
            if not torch.equal(*found):
                return f"other outputs in {'training' if training else 'evaluation'}"
        left = sum(p.numel() for p in self.slim.parameters()) / sum(p.numel() for p in self.model.parameters())
        return f"yes, {left:.0%} left"

    def oracle(self) -> str:
        """The slim network equals the original with zeros in place of what went, where norms keep their divisor."""
        fxprune.compress(self.graph, 0.5, self.inputs, importance="l2", norms="exact", verify=True)
        return YES

    def generates(self) -> str:
        """As many tokens with the cache as without, and as the zeroed original, from which heads and feed-forward went."""
        if not self.family.prompt:
            return NOT
        if _generated(self.family, self.slim) != _generated(self.family, self.slim, use_cache=False):
            return "other tokens without the cache"
        thin = self.pruned(self.parts("heads", "feed-forward"))
        twin = _zeroed(self.model, fxprune.record(thin).kept)
        return YES if _generated(self.family, thin) == _generated(self.family, twin) else "other tokens than the zeroed original"

    def trainer(self) -> str:
        """Three steps of transformers' Trainer; a bare trunk has no loss to train."""
        if not self.family.auto:
            return NOT
        transformers: Any = importlib.import_module("transformers")
        slim = copy.deepcopy(self.slim)
        name = "decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"
        labels = self.inputs[name] if self.family.prompt else torch.tensor([0, 1])
        rows = [{**{key: value[i] for key, value in self.inputs.items()}, "labels": labels[i]} for i in range(2)]
        before = [p.detach().clone() for p in slim.parameters()]
        with tempfile.TemporaryDirectory() as folder:
            options = transformers.TrainingArguments(
                folder, max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
                save_strategy="no", dataloader_pin_memory=False,
            )  # fmt: skip
            done = transformers.Trainer(slim, options, train_dataset=rows).train()
        moved = sum(not torch.equal(a, b) for a, b in zip(before, slim.parameters(), strict=True))
        return YES if done.global_step == 3 and moved > len(before) / 2 else "it trains nothing"

    def adapters(self) -> str:
        """LoRA of peft: adapters on the slim layers alone get gradients."""
        peft: Any = importlib.import_module("peft")
        made = peft.get_peft_model(copy.deepcopy(self.slim), peft.LoraConfig(r=2, target_modules=list(self.family.adapted)))
        _first(made(**self.inputs)).square().mean().backward()
        trained = [name for name, one in made.named_parameters() if one.grad is not None]
        return YES if trained and all("lora" in name for name in trained) else "no adapter"

    def integers(self) -> str:
        """int8 weights of torchao: within a twentieth of the largest output, or twice what they cost the original."""
        ao: Any = importlib.import_module("torchao.quantization")
        twin, wanted = copy.deepcopy(self.slim), _first(self.slim(**self.inputs))
        ao.quantize_(twin, ao.Int8WeightOnlyConfig())
        whole = [n for n, m in twin.named_modules() if isinstance(m, nn.Linear) and type(m.weight.data) in (Tensor, nn.Parameter)]
        if whole:
            return f"{len(whole)} layers stay"
        off = float((_first(twin(**self.inputs)) - wanted).abs().max()) / float(wanted.abs().max())
        full, wanted = copy.deepcopy(self.model), _first(self.model(**self.inputs))
        ao.quantize_(full, ao.Int8WeightOnlyConfig())
        theirs = float((_first(full(**self.inputs)) - wanted).abs().max()) / float(wanted.abs().max())
        return YES if off < max(0.05, 2 * theirs) else f"{off:.0%} off, the original {theirs:.0%}"

    def folder(self, *kinds: str) -> str:
        """A folder that transformers loads, with equal outputs."""
        policy = self.parts(*kinds) if kinds else dict.fromkeys(self.free, 0.5)
        return self._loaded(self.pruned(policy)) if policy else NOT

    def uneven(self, kind: str) -> str:
        """The same with other widths, or as many heads, in every second layer (of Swin and ConvNeXt: stage)."""
        policy = {name: (0.5, 0.25)[int(re.findall(r"\.(\d+)\.", name)[0]) % 2] for name in self.parts(kind)}
        return self._loaded(self.pruned(policy)) if len(set(policy.values())) > 1 else NOT  # T5 ties the heads of all layers

    def _loaded(self, slim: Any) -> str:
        transformers: Any = importlib.import_module("transformers")
        with tempfile.TemporaryDirectory() as place:
            try:
                done = fxprune.export(slim, Path(place) / "slim", format="transformers")
            except FxPruneError as error:
                return _why(str(error))
            auto = getattr(transformers, self.family.auto) if self.family.auto else type(slim)
            made = auto.from_pretrained(done.path).eval()
            if type(made) is not type(slim):
                return f"a {type(made).__name__}"
            return YES if torch.equal(_first(made(**self.inputs)), _first(slim(**self.inputs))) else "other outputs"


CHECKS: dict[str, Callable[[Trial], str]] = {
    "class": Trial.kept,
    "oracle": Trial.oracle,
    "generate": Trial.generates,
    "Trainer": Trial.trainer,
    "LoRA": Trial.adapters,
    "int8": Trial.integers,
    "folder: feed-forward": lambda t: t.folder("feed-forward"),
    "heads too": lambda t: t.folder("heads", "feed-forward"),
    "experts": lambda t: t.folder("experts"),
    "everything": Trial.folder,
    "uneven: feed-forward": lambda t: t.uneven("feed-forward"),
    "uneven: heads": lambda t: t.uneven("heads"),
}


def row(family: Family) -> dict[str, str]:
    """Every check of one family. What fails says how, and never ends the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(family)
        found = {}
        for name, check in CHECKS.items():
            try:
                found[name] = check(trial)
            except Exception as error:  # noqa: BLE001 - a table of what works names whatever does not
                found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return found


def _why(text: str) -> str:
    """The export's refusal in a few words."""
    for what, short in (
        (r"gives other outputs", "no: the class computes a number of a size that went"),
        (r"is one number for all layers", "no: one number for all layers"),
        (r"sizes \S+ by (\S+?),", "no: sizes are tied by {}"),
    ):
        match = re.search(what, text)
        if match:
            return short.format(f"`{match.group(1)}`" if match.groups() else "")
    return f"no: {text[:100]}"


def _first(outputs: Any) -> Tensor:
    found: Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return found


def _generated(family: Family, model: Any, **options: Any) -> list[list[int]]:
    given = {key: value for key, value in family.inputs().items() if key in family.prompt}
    torch.manual_seed(0)
    made = model.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0, **options)
    tokens: list[list[int]] = made.tolist()
    assert all(len(one) >= TOKENS for one in tokens)
    return tokens


def _zeroed(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> nn.Module:
    twin = copy.deepcopy(model)
    tensors = {**dict(twin.named_parameters(remove_duplicate=False)), **dict(twin.named_buffers())}
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return twin


def read(page: Path = PAGE) -> dict[str, dict[str, str]]:
    """The rows of the table on the page."""
    inside = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if line.startswith("|")]
    return {one[0]: dict(zip(lines[0][1:], one[1:], strict=True)) for one in lines[2:]}


def write(rows: Mapping[str, Mapping[str, str]], page: Path = PAGE) -> None:
    """Put the table between the marks of the page."""
    packages = ("transformers", "torch", "peft", "torchao", "accelerate")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    table = ["| " + " | ".join(["family", *CHECKS]) + " |", "| " + " | ".join(["---"] * (len(CHECKS) + 1)) + " |"]
    table += ["| " + " | ".join([name, *(found.get(check, "") for check in CHECKS)]) + " |" for name, found in rows.items()]
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    made = f"{BEGIN}\n\nMade with {versions}.\n\n" + "\n".join(table) + f"\n\n{END}"
    page.write_text(head + made + rest.partition(END)[2], encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; all where left out")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows = read(given.page)
    for name in given.names or list(FAMILIES):
        rows[name] = row(FAMILIES[name])
        print(name, *(f"  {check}: {found}" for check, found in rows[name].items()), sep="\n", flush=True)
        write({one: rows[one] for one in FAMILIES if one in rows}, given.page)


if __name__ == "__main__":
    main()
