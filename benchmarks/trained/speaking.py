"""Speech made on the spot by eSpeak NG, which a wheel ships as a library: what is said, by whom and when is known exactly."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "She sells sea shells by the shore and counts them every evening.",
    "How much wood would a woodchuck chuck if it could chuck wood?",
    "A journey of a thousand miles begins with a single careful step.",
    "Please call the office before noon and leave a short message.",
    "Winter mornings are quiet, but the kitchen is warm and bright.",
    "Nobody expected the train to arrive seven minutes too early.",
    "My neighbour plays the violin while her brother paints the fence.",
    "Fresh bread, strong coffee and good music make a fine Sunday.",
    "The museum opens at nine and closes when the last guest has gone.",
)
VOICES = tuple(
    f"{language}+{variant}"
    for language, variant in zip(
        ("en-us", "en", "en-gb-scotland", "en-us", "en-029", "en-gb-x-rp", "en-us", "en", "en-gb-x-gbclan", "en-us", "en", "en-029"),
        ("m1", "f1", "m3", "f2", "m5", "f4", "m7", "f5", "m2", "croak", "whisper", "klatt2"),
        strict=True,
    )
)
FRAME = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
SYNCHRONOUS, UTF8 = 2, 1


@cache
def _library() -> tuple[Any, int]:
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    return library, library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)


@cache
def said(text: str, voice: str, rate: int = 16000) -> NDArray[np.float32]:
    """The samples of ``text`` in a voice, at ``rate`` a second."""
    from scipy.signal import resample_poly

    library, own = _library()
    parts: list[NDArray[np.int16]] = []

    def take(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = FRAME(take)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"eSpeak NG has no voice {voice}")
    spoken = text.encode()
    library.espeak_Synth(spoken, len(spoken) + 1, 0, 1, 0, UTF8, None, None)
    library.espeak_Synchronize()
    wave = np.concatenate(parts).astype(np.float32) / 32768
    step = np.gcd(rate, own)
    found: NDArray[np.float32] = resample_poly(wave, rate // step, own // step).astype(np.float32)
    return found
