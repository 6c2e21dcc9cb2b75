"""Transformers and their relatives from packages of one idea each, most of them users of einops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.packages.network import Inputs, Network, found, of, sequence, words

V = 96


def decoder(**options: object) -> Callable[[], nn.Module]:
    """A language model of x-transformers."""

    def build() -> nn.Module:
        layers = found("x_transformers:Decoder")(dim=48, depth=2, heads=4, attn_dim_head=12, **options)
        made: nn.Module = found("x_transformers:TransformerWrapper")(num_tokens=V, max_seq_len=32, attn_layers=layers)
        return made

    return build


def encoder() -> nn.Module:
    layers = found("x_transformers:Encoder")(dim=48, depth=2, heads=4, attn_dim_head=12)
    made: nn.Module = found("x_transformers:ContinuousTransformerWrapper")(dim_in=10, dim_out=6, max_seq_len=32, attn_layers=layers)
    return made


def video(batch: int, size: int) -> Inputs:
    return (torch.randn(batch, 2, 3, size, size),)


def points(batch: int, size: int) -> Inputs:
    return torch.randn(batch, size, 16), torch.randn(batch, size, 3)


def series(channels: int) -> Callable[[int, int], Inputs]:
    return lambda batch, size: (torch.randn(batch, size, channels),)


def networks() -> Iterator[Network]:
    yield Network("x-transformers", "x-transformers decoder", decoder(), words(V), 12, 20)
    yield Network(
        "x-transformers", "x-transformers decoder, rotary", decoder(rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True), words(V), 12, 20
    )
    yield Network(
        "x-transformers", "x-transformers decoder, ALiBi, grouped queries", decoder(alibi_pos_bias=True, attn_kv_heads=2), words(V), 12, 20
    )
    yield Network("x-transformers", "x-transformers encoder", encoder, sequence(10), 12, 20)
    perceiver = {"input_channels": 3, "input_axis": 2, "num_freq_bands": 4, "max_freq": 8.0, "depth": 2, "num_latents": 8, "latent_dim": 32}
    perceiver |= {"cross_heads": 1, "latent_heads": 4, "cross_dim_head": 16, "latent_dim_head": 8, "num_classes": 5}
    yield Network(
        "perceiver-pytorch", "Perceiver", of("perceiver_pytorch:Perceiver", **perceiver), lambda b, n: (torch.randn(b, n, n, 3),), 16, 24
    )
    lm = {"num_tokens": V, "max_seq_len": 32, "dim": 48, "depth": 2, "heads": 4}
    yield Network(
        "performer-pytorch", "PerformerLM", of("performer_pytorch:PerformerLM", **lm, dim_head=12, causal=False), words(V), 12, 20
    )
    yield Network(
        "reformer-pytorch",
        "ReformerLM",
        of(
            "reformer_pytorch:ReformerLM",
            num_tokens=V,
            dim=32,
            depth=1,
            max_seq_len=64,
            heads=2,
            bucket_size=8,
            n_hashes=2,
            use_full_attn=True,
        ),
        words(V),
        32,
        48,
    )
    yield Network(
        "linformer", "LinformerLM", of("linformer:LinformerLM", num_tokens=V, dim=48, seq_len=16, depth=2, heads=4, k=8), words(V), 16, 16
    )
    yield Network(
        "nystrom-attention",
        "Nystromformer",
        of("nystrom_attention:Nystromformer", dim=48, depth=2, heads=4, dim_head=12, num_landmarks=4),
        sequence(48),
        16,
        24,
    )
    yield Network(
        "local-attention",
        "LocalTransformer",
        of(
            "local_attention:LocalTransformer",
            num_tokens=V,
            dim=48,
            depth=2,
            max_seq_len=64,
            local_attn_window_size=8,
            heads=4,
            dim_head=12,
            causal=True,
        ),
        words(V),
        16,
        24,
    )
    yield Network("g-mlp-pytorch", "gMLP", of("g_mlp_pytorch:gMLP", num_tokens=V, dim=32, depth=2, seq_len=16), words(V), 16, 16)
    yield Network(
        "mlp-mixer-pytorch",
        "MLPMixer",
        of("mlp_mixer_pytorch:MLPMixer", image_size=32, channels=3, patch_size=8, dim=48, depth=2, num_classes=5),
        lambda b, n: (torch.randn(b, 3, n, n),),
        32,
        32,
    )
    yield Network(
        "timesformer-pytorch",
        "TimeSformer",
        of(
            "timesformer_pytorch:TimeSformer",
            dim=48,
            image_size=32,
            patch_size=8,
            num_frames=2,
            num_classes=5,
            depth=2,
            heads=4,
            dim_head=12,
        ),
        video,
        32,
        32,
    )
    yield Network("egnn-pytorch", "EGNN", of("egnn_pytorch:EGNN", dim=16, m_dim=12), points, 8, 12)
    yield Network(
        "iTransformer",
        "iTransformer",
        of(
            "iTransformer:iTransformer",
            num_variates=6,
            lookback_len=16,
            dim=48,
            depth=2,
            heads=4,
            dim_head=12,
            pred_length=(4, 8),
            use_reversible_instance_norm=True,
        ),
        series(6),
        16,
        16,
    )
    yield Network(
        "conformer",
        "Conformer block",
        of("conformer:Conformer", dim=48, depth=2, dim_head=12, heads=4, conv_kernel_size=7),
        sequence(48),
        16,
        24,
    )
