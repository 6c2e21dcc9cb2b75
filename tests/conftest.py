"""One thread for all tests: linear algebra differs in bits between one and two, and small networks are no faster with more."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
