"""How the processes that some tests start by torchrun end."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist


def leave() -> None:
    """End this process, whose work is done and written, without the interpreter's shutdown.

    A thread of gloo that still lets go of a tensor while the interpreter shuts down aborts the process, once in some hundred runs
    ("terminate called without an active exception", pytorch/pytorch#179291). What is tested is over by then.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
