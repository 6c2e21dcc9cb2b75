"""Networks that listen to speech: is anybody speaking, and who?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trained.network import RECURRENT, Network, Task, file_of
from benchmarks.trained.speaking import SENTENCES, VOICES, said

# -- Silero VAD -----------------------------------------------------------------------------------------------------------


class Silero(nn.Module):
    """Silero VAD at 16 kHz, which the wheel has as a script, as ONNX and as plain weights; here all chunks of a recording at once.

    Chunks, (batch, chunks, 576 samples: 64 of the chunk before, and 512), to the probability of speech in each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, padding=1), nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.Conv1d(64, 128, 3, padding=1)
        self.lstm, self.final_conv = nn.LSTM(128, 128, batch_first=True), nn.Conv1d(128, 1, 1)

    def forward(self, chunks: Tensor) -> Tensor:
        x = F.pad(chunks.flatten(0, 1).unsqueeze(1), (0, 64), mode="reflect")
        x = self.stft_conv(x)
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        x = F.relu(self.conv4(F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))))
        x = self.lstm(x.squeeze(2).unflatten(0, (-1, chunks.shape[1])))[0]
        return torch.sigmoid(self.final_conv(F.relu(x).transpose(1, 2))).squeeze(1)


def silero(_: Path) -> Task:
    from safetensors.torch import load_file

    held = load_file(file_of("silero_vad", "data", "silero_vad_16k.safetensors"))
    model = Silero()
    model.load_state_dict({name.replace("lstm_cell.weight_ih", "lstm.weight_ih_l0").replace("lstm_cell.weight_hh", "lstm.weight_hh_l0")
                           .replace("lstm_cell.bias_ih", "lstm.bias_ih_l0").replace("lstm_cell.bias_hh", "lstm.bias_hh_l0"): tensor
                           for name, tensor in held.items()})  # fmt: skip

    def recordings(count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Five seconds each of noise with two phrases in it, as chunks, and which chunks have speech."""
        draw, size = np.random.default_rng(seed), 512 * 156
        waves, labels = [], []
        for _ in range(count):
            clean = np.zeros(size, np.float32)
            for start in (0.1, 0.55):
                voice = said(SENTENCES[draw.integers(len(SENTENCES))], VOICES[draw.integers(9)])
                length, at = int(0.25 * size), int((start + draw.uniform(0, 0.1)) * size)
                clean[at : at + length] += voice[:length]
            clean *= 0.3 / np.abs(clean).max()
            noise = np.cumsum(draw.standard_normal(size)) if draw.random() < 0.3 else draw.standard_normal(size)
            noise -= np.convolve(noise, np.ones(400) / 400, "same")
            waves.append(torch.from_numpy(clean + 10 ** draw.uniform(-3.5, -2) * noise / noise.std()).float())
            loud = np.sqrt(np.square(clean).reshape(-1, 512).mean(1)) > 0.02
            labels.append(torch.from_numpy(np.convolve(loud, np.ones(7), "same") > 0))  # short gaps between words are speech, too
        padded = F.pad(torch.stack(waves), (64, 0))
        return padded.unfold(1, 576, 512).contiguous(), torch.stack(labels)

    scored, speech = recordings(24, 1)

    def score(net: nn.Module) -> float:
        return float(((net(scored) > 0.5) == speech).float().mean())

    return Task(model.eval(), scored[:2], list(recordings(24, 0)[0].split(6)), score)


# -- Resemblyzer ----------------------------------------------------------------------------------------------------------


def speakers(_: Path) -> Task:
    """GE2E (Wan 2018, https://arxiv.org/abs/1710.10467): whose voice is this? The nearest of twelve that said something else."""
    from resemblyzer import VoiceEncoder
    from resemblyzer.audio import normalize_volume, wav_to_mel_spectrogram

    model = VoiceEncoder("cpu", verbose=False).eval()

    def frames(text: str, voice: str) -> Tensor:
        wave = normalize_volume(said(text, voice), -30, increase_only=True)
        return torch.from_numpy(wav_to_mel_spectrogram(wave))[20:180]

    def all_of(sentences: tuple[str, ...]) -> Tensor:
        return torch.stack([torch.stack([frames(text, voice) for voice in VOICES]) for text in sentences])

    known, asked, others = all_of(SENTENCES[:1]), all_of(SENTENCES[1:6]), all_of(SENTENCES[6:])

    def score(net: nn.Module) -> float:
        kept, found = net(known[0]), torch.stack([net(one) for one in asked])
        return float(((found @ kept.T).argmax(2) == torch.arange(len(VOICES))).float().mean())

    return Task(model, known[0, :2], list(torch.cat([others, others.roll(40, 2)])), score)


NETWORKS = (
    Network(
        "silero-vad",
        RECURRENT,
        ("silero-vad", "espeakng-loader"),
        "speech or not, by chunk",
        "24 recordings of 5 s made by eSpeak NG",
        silero,
    ),
    Network(
        "resemblyzer",
        RECURRENT,
        ("Resemblyzer", "espeakng-loader"),
        "a voice as a vector",
        "60 phrases of 12 voices of eSpeak NG",
        speakers,
    ),
)
