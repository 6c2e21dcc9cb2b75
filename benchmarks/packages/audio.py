"""Networks that hear and speak: recognition, separation, codecs, vocoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.packages.network import Inputs, Network, found, of, sequence, signal, wave


def features(width: int) -> Callable[[int, int], Inputs]:
    """(batch, length, width) and the lengths, all full."""
    return lambda batch, size: (torch.randn(batch, size, width), torch.full((batch,), size))


def vocos() -> nn.Module:
    backbone = found("vocos.models:VocosBackbone")(input_channels=16, dim=32, intermediate_dim=64, num_layers=2)
    return nn.Sequential(backbone, found("vocos.heads:ISTFTHead")(dim=32, n_fft=64, hop_length=16))


def whisper() -> nn.Module:
    made: nn.Module = found("whisper.model:Whisper")(found("whisper.model:ModelDimensions")(16, 20, 32, 4, 2, 96, 16, 32, 4, 2))
    torch.nn.init.normal_(made.get_parameter("decoder.positional_embedding"), std=0.02)  # what its class leaves to the memory
    return made


def mel_and_words(batch: int, size: int) -> Inputs:
    return torch.randn(batch, 16, 40), torch.randint(0, 96, (batch, size))


def mel_and_wave(batch: int, size: int) -> Inputs:
    return torch.randn(batch, 1, size * 16), torch.randn(batch, 1, 16, size + 2)


def networks() -> Iterator[Network]:
    yield Network(
        "torchaudio",
        "wav2vec2 of torchaudio",
        of(
            "torchaudio.models:wav2vec2_model",
            "group_norm",
            [(24, 10, 5), (24, 8, 4)],
            False,
            32,
            0.1,
            16,
            4,
            2,
            4,
            0.1,
            64,
            0.1,
            0.1,
            False,
            0.1,
            12,
        ),
        wave(),
        800,
        1200,
    )
    yield Network("torchaudio", "Conformer", of("torchaudio.models:Conformer", 32, 4, 64, 2, 7), features(32), 16, 24)
    yield Network(
        "torchaudio", "ConvTasNet of torchaudio", of("torchaudio.models:ConvTasNet", 2, 8, 24, 3, 16, 24, 3, 2), signal(1), 400, 600
    )
    yield Network(
        "torchaudio", "DeepSpeech", of("torchaudio.models:DeepSpeech", 16, 32, 10), lambda b, n: (torch.randn(b, 1, n, 16),), 12, 20
    )
    yield Network("torchaudio", "HDemucs", of("torchaudio.models:hdemucs_low", ["a", "b"]), signal(2), 16384, 20480, 1)
    yield Network("torchaudio", "WaveRNN", of("torchaudio.models:WaveRNN", [4, 4], 16, 16, 1, 24, 24, 3, 16, 24, 16), mel_and_wave, 8, 12)
    asteroid = {"n_src": 2, "n_filters": 32, "kernel_size": 16, "stride": 8}
    yield Network(
        "asteroid",
        "ConvTasNet of asteroid",
        of("asteroid.models:ConvTasNet", **asteroid, n_blocks=2, n_repeats=2, bn_chan=16, hid_chan=32, skip_chan=16),
        signal(1),
        800,
        1200,
    )
    yield Network(
        "asteroid",
        "DPRNNTasNet",
        of("asteroid.models:DPRNNTasNet", **asteroid, bn_chan=16, hid_size=16, chunk_size=10, n_repeats=1),
        signal(1),
        800,
        1200,
    )
    lobes = "speechbrain.lobes.models."
    ecapa = {"input_size": 16, "lin_neurons": 24, "channels": [32, 32, 32, 32, 96], "attention_channels": 16, "se_channels": 16}
    yield Network("speechbrain", "ECAPA-TDNN", of(f"{lobes}ECAPA_TDNN:ECAPA_TDNN", **ecapa), sequence(16), 30, 40)
    yield Network(
        "speechbrain",
        "Xvector",
        of(
            f"{lobes}Xvector:Xvector",
            in_channels=16,
            tdnn_channels=[32, 32, 32, 32, 64],
            tdnn_kernel_sizes=[5, 3, 3, 1, 1],
            tdnn_dilations=[1, 2, 3, 1, 1],
            lin_neurons=24,
        ),
        sequence(16),
        30,
        40,
    )
    yield Network(
        "speechbrain",
        "CRDNN",
        of(
            f"{lobes}CRDNN:CRDNN",
            input_size=16,
            cnn_blocks=1,
            cnn_channels=(16,),
            rnn_layers=1,
            rnn_neurons=24,
            dnn_blocks=1,
            dnn_neurons=24,
        ),
        sequence(16),
        30,
        40,
    )
    yield Network(
        "encodec",
        "SEANet encoder",
        of("encodec.modules:SEANetEncoder", n_filters=8, dimension=32, ratios=[4, 2], lstm=1),
        signal(1),
        800,
        1200,
    )
    yield Network(
        "encodec",
        "SEANet decoder",
        of("encodec.modules:SEANetDecoder", n_filters=8, dimension=32, ratios=[4, 2], lstm=1),
        signal(32),
        20,
        30,
    )
    yield Network("snac", "SNAC encoder", of("snac.layers:Encoder", d_model=16, strides=[2, 4], depthwise=True), signal(1), 400, 600)
    yield Network("vocos", "Vocos", vocos, signal(16), 20, 30)
    yield Network("openai-whisper", "Whisper", whisper, mel_and_words, 8, 12)
    yield Network("demucs", "Demucs", of("demucs.demucs:Demucs", ["a", "b"], channels=8, depth=3, lstm_layers=1), signal(2), 8000, 12000, 1)
    yield Network(
        "BS-RoFormer",
        "BSRoformer",
        of(
            "bs_roformer:BSRoformer",
            dim=32,
            depth=1,
            time_transformer_depth=1,
            freq_transformer_depth=1,
            dim_head=8,
            heads=4,
            freqs_per_bands=(4, 4, 8, 17),
            stft_n_fft=64,
            stft_hop_length=16,
            stft_win_length=64,
            flash_attn=False,
        ),
        wave(),
        800,
        1200,
    )
