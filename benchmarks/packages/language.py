"""Networks of transformers: text, pictures, sound and time series, as its classes build them from a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.packages.network import Inputs, Maker, Network, token_numbers

V = 96  # tokens
Options = dict[str, Any]


def made(model: str, **options: Any) -> Callable[[], nn.Module]:
    """A class of transformers from its own configuration class."""

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        kind = getattr(transformers, model)
        built: nn.Module = kind(kind.config_class(**options))
        return built

    return build


def text(batch: int, size: int) -> Inputs:
    return {"input_ids": token_numbers(V, batch, size), "attention_mask": torch.ones(batch, size, dtype=torch.long)}


def causal(batch: int, size: int) -> Inputs:
    return {"input_ids": token_numbers(V, batch, size), "use_cache": False}


def both_sides(batch: int, size: int) -> Inputs:
    return {"input_ids": token_numbers(V, batch, size), "decoder_input_ids": token_numbers(V, batch, size - 2), "use_cache": False}


def pixels(channels: int = 3) -> Maker:
    return lambda batch, size: {"pixel_values": torch.randn(batch, channels, size, size)}


def sound(batch: int, size: int) -> Inputs:
    return {"input_values": torch.randn(batch, size)}


def spectrum(batch: int, size: int) -> Inputs:
    return {"input_features": torch.randn(batch, 16, size), "decoder_input_ids": token_numbers(V, batch, 5), "use_cache": False}


def fbank(batch: int, size: int) -> Inputs:
    return {"input_values": torch.randn(batch, size, 32)}


def text_and_pixels(batch: int, size: int) -> Inputs:
    return {"input_ids": token_numbers(V, batch, size), "pixel_values": torch.randn(batch, 3, 32, 32)}


def past(channels: int) -> Maker:
    return lambda batch, size: {"past_values": torch.randn(batch, size, channels)}


def networks() -> Iterator[Network]:
    bert = {"vocab_size": V, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "num_labels": 3}
    for model in ("BertForSequenceClassification", "RobertaForSequenceClassification", "ElectraForSequenceClassification"):
        pad = {"pad_token_id": 0} if model.startswith("Roberta") else {}
        yield Network("transformers", model, made(model, **bert, **pad), text, 12, 20)
    yield Network(
        "transformers", "AlbertForSequenceClassification", made("AlbertForSequenceClassification", **bert, embedding_size=24), text, 12, 20
    )
    yield Network(
        "transformers",
        "DebertaV2ForSequenceClassification",
        made("DebertaV2ForSequenceClassification", **bert, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        text,
        12,
        20,
    )
    yield Network(
        "transformers",
        "DistilBertForSequenceClassification",
        made("DistilBertForSequenceClassification", vocab_size=V, dim=48, n_layers=2, n_heads=4, hidden_dim=96),
        text,
        12,
        20,
    )
    modern = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    yield Network(
        "transformers", "ModernBertForSequenceClassification", made("ModernBertForSequenceClassification", **bert, **modern), text, 12, 20
    )

    yield Network(
        "transformers",
        "GPT2LMHeadModel",
        made("GPT2LMHeadModel", vocab_size=V, n_embd=48, n_layer=2, n_head=4, n_positions=32),
        causal,
        12,
        20,
    )
    llama = {
        "vocab_size": V,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    }
    llama |= {"max_position_embeddings": 64, "pad_token_id": 0}
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Glm", "Olmo2", "StableLm"):
        more: Options = {"head_dim": 12} if family in ("Qwen3", "Gemma", "Gemma2", "Glm") else {}
        more |= {"partial_rotary_factor": 0.5} if family == "StableLm" else {}
        yield Network("transformers", f"{family}ForCausalLM", made(f"{family}ForCausalLM", **llama, **more), causal, 12, 20)
    neox = {k: v for k, v in llama.items() if k != "num_key_value_heads"}
    for family in ("GPTNeoX", "Phi"):
        yield Network("transformers", f"{family}ForCausalLM", made(f"{family}ForCausalLM", **neox), causal, 12, 20)
    yield Network(
        "transformers",
        "OPTForCausalLM",
        made(
            "OPTForCausalLM",
            vocab_size=V,
            hidden_size=48,
            word_embed_proj_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=96,
            max_position_embeddings=32,
        ),
        causal,
        12,
        20,
    )
    yield Network(
        "transformers", "BloomForCausalLM", made("BloomForCausalLM", vocab_size=V, hidden_size=48, n_layer=2, n_head=4), causal, 12, 20
    )
    yield Network(
        "transformers",
        "MixtralForCausalLM",
        made("MixtralForCausalLM", **llama, num_local_experts=4, num_experts_per_tok=2),
        causal,
        12,
        20,
    )
    yield Network(
        "transformers",
        "Qwen3MoeForCausalLM",
        made("Qwen3MoeForCausalLM", **llama, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        causal,
        12,
        20,
    )
    yield Network(
        "transformers",
        "MambaForCausalLM",
        made("MambaForCausalLM", vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
        causal,
        12,
        20,
    )
    t5 = {"vocab_size": V, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    yield Network("transformers", "T5ForConditionalGeneration", made("T5ForConditionalGeneration", **t5), both_sides, 12, 20)
    bart = {
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
    }
    yield Network(
        "transformers",
        "BartForConditionalGeneration",
        made("BartForConditionalGeneration", vocab_size=V, max_position_embeddings=32, pad_token_id=1, **bart),
        both_sides,
        12,
        20,
    )

    vit = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "num_labels": 5,
    }
    yield Network("transformers", "ViTForImageClassification", made("ViTForImageClassification", **vit), pixels(), 32, 32)
    yield Network(
        "transformers", "Dinov2ForImageClassification", made("Dinov2ForImageClassification", **vit, mlp_ratio=2), pixels(), 32, 48
    )
    yield Network("transformers", "BeitForImageClassification", made("BeitForImageClassification", **vit), pixels(), 32, 32)
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}
    yield Network("transformers", "SwinForImageClassification", made("SwinForImageClassification", **swin), pixels(), 32, 48)
    yield Network(
        "transformers",
        "ConvNextV2ForImageClassification",
        made("ConvNextV2ForImageClassification", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=5),
        pixels(),
        64,
        96,
    )
    seg = {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 24, 32, 48],
        "num_attention_heads": [1, 2, 4, 4],
        "decoder_hidden_size": 24,
        "num_labels": 5,
    }
    yield Network("transformers", "SegformerForSemanticSegmentation", made("SegformerForSemanticSegmentation", **seg), pixels(), 64, 96)
    detr = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "d_model": 32,
        "num_queries": 6,
        "num_labels": 4,
    }
    detr |= {k: v for k, v in bart.items() if k != "d_model"}
    yield Network("transformers", "DetrForObjectDetection", detector(**detr), pixels(), 64, 96)
    side = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    clip = {
        "text_config": {**side, "vocab_size": V, "max_position_embeddings": 32, "eos_token_id": 2},
        "vision_config": {**side, "image_size": 32, "patch_size": 8},
        "projection_dim": 24,
    }
    yield Network("transformers", "CLIPModel", made("CLIPModel", **clip), text_and_pixels, 12, 20)
    dpt: Options = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    dpt |= {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 24, "head_in_index": -1}
    yield Network("transformers", "DPTForDepthEstimation", made("DPTForDepthEstimation", **dpt), pixels(), 32, 32)

    wav: Options = {"vocab_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    wav |= {
        "conv_dim": (24, 24, 24),
        "conv_stride": (5, 4, 4),
        "conv_kernel": (10, 8, 4),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    yield Network("transformers", "Wav2Vec2ForCTC", made("Wav2Vec2ForCTC", **wav), sound, 1600, 2400)
    yield Network("transformers", "HubertForCTC", made("HubertForCTC", **wav), sound, 1600, 2400)
    whisper = {
        **bart,
        "vocab_size": V,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 16,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
    }
    yield Network("transformers", "WhisperForConditionalGeneration", made("WhisperForConditionalGeneration", **whisper), spectrum, 40, 40)
    ast = {**side, "patch_size": 8, "max_length": 64, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8, "num_labels": 5}
    yield Network("transformers", "ASTForAudioClassification", made("ASTForAudioClassification", **ast), fbank, 64, 64)
    patch = {
        "num_input_channels": 3,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "prediction_length": 6,
    }
    yield Network("transformers", "PatchTSTForPrediction", made("PatchTSTForPrediction", **patch), past(3), 32, 32)
    mixer = {
        "num_input_channels": 3,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
        "d_model": 32,
        "num_layers": 2,
        "prediction_length": 6,
    }
    yield Network("transformers", "PatchTSMixerForPrediction", made("PatchTSMixerForPrediction", **mixer), past(3), 32, 32)


def detector(**options: Any) -> Callable[[], nn.Module]:
    """DETR upon a small ResNet of transformers itself."""

    def build() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        backbone = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], out_features=["stage4"])
        given = {k: v for k, v in options.items() if k != "backbone"}
        built: nn.Module = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=backbone, **given))
        return built

    return build
