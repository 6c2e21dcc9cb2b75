"""Fourier transforms: of channels that are folded with the batch, and with complex weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.testing import assert_sound
from tests.passes.helpers import prime

WINDOW = torch.hann_window(16)


class Waves(nn.Module):
    window: Tensor

    def __init__(self, middle: Callable[[Tensor, Tensor], Tensor], space: int) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv1d(2, 8, 3, padding=1), middle
        self.last: nn.Module = nn.Conv2d(8, 3, 1) if space == 2 else nn.Conv1d(8, 3, 1)
        self.register_buffer("window", WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        made = self.last(self.middle(self.first(x).relu(), self.window))
        assert isinstance(made, Tensor)
        return made


def spectrum(y: Tensor, window: Tensor) -> Tensor:
    b, c, t = y.shape
    z = torch.stft(y.reshape(-1, t), 16, 8, window=window, return_complex=True)
    return z.abs().view(b, c, *z.shape[-2:])


def pairs(y: Tensor, window: Tensor) -> Tensor:
    b, c, t = y.shape
    z = torch.view_as_real(torch.stft(y.view(b * c, t), n_fft=16, hop_length=4, window=window, return_complex=True))
    return z.pow(2).sum(-1).view(b, c, *z.shape[1:3])


def there_and_back(y: Tensor, window: Tensor) -> Tensor:
    b, c, t = y.shape
    z = torch.stft(y.reshape(b * c, t), 16, 8, window=window, normalized=True, return_complex=True)
    return torch.istft(z, 16, 8, window=window, normalized=True, length=t).view(b, c, t)


def methods(y: Tensor, window: Tensor) -> Tensor:
    b, c, t = y.shape
    frames: Tensor = y.reshape(-1, t).stft(16, window=window, return_complex=True)
    waves: Tensor = frames.istft(n_fft=16, window=window)
    return waves.view(b, c, -1)


def no_centre(y: Tensor, window: Tensor) -> Tensor:
    b, c, t = y.shape
    z = torch.stft(y.reshape(-1, t), 16, 8, window=WINDOW + 0.1, center=False, return_complex=True, onesided=False)
    return torch.istft(input=z, n_fft=16, hop_length=8, window=WINDOW + 0.1, center=False, onesided=False, return_complex=True).real.view(
        b, c, -1
    )


def complex_as_channels(y: Tensor, window: Tensor) -> Tensor:
    """As in Demucs: real and imaginary parts are channels in between."""
    b, c, t = y.shape
    z = torch.stft(y.reshape(-1, t), 16, 8, window=window, return_complex=True)
    z = z.view(b, c, *z.shape[-2:])
    parts = torch.view_as_real(z).permute(0, 1, 4, 2, 3).reshape(b, c * 2, *z.shape[-2:]).tanh()
    z = torch.view_as_complex(parts.view(b, c, 2, *z.shape[-2:]).permute(0, 1, 3, 4, 2).contiguous())
    return torch.istft(z.reshape(b * c, *z.shape[-2:]), 16, 8, window=window, length=t).view(b, c, t)


@pytest.mark.parametrize(
    ("middle", "space"), [(spectrum, 2), (pairs, 2), (there_and_back, 1), (methods, 1), (no_centre, 1), (complex_as_channels, 1)]
)
def test_channels_pass_short_time_transforms(middle: Callable[[Tensor, Tensor], Tensor], space: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 64)
    model = prime(Waves(middle, space), (x,))
    slim = fxprune.compress(model, 0.5, x, verify=True)
    assert slim.get_parameter("first.weight").shape[0] == 4
    other = torch.randn(3, 2, 80)
    assert slim.eval()(other).shape == model.eval()(other).shape


class OneWave(nn.Module):
    """The time axis is made of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stft(self.first(x), 16, 8, window=WINDOW, center=False, return_complex=True)
        made = self.last(torch.istft(torch.ones(3, 9, 4) * z.abs().mean(), 16, window=WINDOW + 1).mean(1, keepdim=True).expand(-1, 4))
        assert isinstance(made, Tensor)
        return made


def test_channels_as_time_are_kept_by_name() -> None:
    x = torch.randn(3, 8)
    graph = fxprune.analyze(OneWave().eval(), x)
    (group,) = [g for g in graph.groups if g.name == "first"]
    assert not group.prunable and "stft" in str(group.reason)


class Spectral(nn.Module):
    """A Fourier layer with complex weights beside a plain one, as neural operators have it."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.skip, self.project = nn.Conv1d(2, 16, 1), nn.Conv1d(16, 16, 1), nn.Conv1d(16, 3, 1)
        self.modes = nn.Parameter(torch.randn(16, 16, 5, dtype=torch.cfloat) / 10)

    def forward(self, x: Tensor) -> Any:
        x = self.lift(x)
        waves = torch.fft.rfft(x)
        made = torch.zeros(x.shape[0], self.modes.shape[1], waves.shape[-1], dtype=torch.cfloat)
        made[..., :5] = torch.einsum("bim,iom->bom", waves[..., :5], self.modes)
        return self.project((torch.fft.irfft(made, n=x.shape[-1]) + self.skip(x)).relu())


@pytest.mark.filterwarnings("error:Casting complex values")
@pytest.mark.parametrize("importance", ["l2", "l1", "taylor"])
def test_complex_weights_count_whole(importance: str) -> None:
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.randn(2, 2, 24)
    assert_sound(model, x, removes=("lift.weight", "modes"))
    with torch.no_grad():
        model.modes.real.zero_()
        model.lift.weight.fill_(1), model.skip.weight.fill_(1), model.project.weight.fill_(1)
        model.modes.imag[::2] = model.modes.imag[:, ::2] = 0
    batches = [(x, torch.randn(2, 3, 24))]
    slim = fxprune.compress(
        model, {"lift": 0.5}, x, importance=importance, calibration=batches, loss=lambda made, batch: (made - batch[1]).square().mean()
    )
    if importance != "taylor":
        assert fxprune.record(slim).kept["lift.weight"][0].tolist() == list(range(1, 16, 2))
    assert slim.get_parameter("modes").shape[0] == 8
