"""What the processes that torchrun started have in common: a key-value store, and one voice.

All of them do the same (SPMD); a `Team` (parallel.py) is what they train as. The first one speaks and writes for all.
"""

import time
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from ..environment import rank, world_size

PATIENCE = timedelta(days=30)
"""How long to wait for process 0, which may first have to download and tokenise."""


@cache
def store() -> dist.Store:
    """The key-value store of this launch."""
    return next(dist.rendezvous("env://", timeout=PATIENCE))[0]


def first_to_fail() -> bool:
    """Whether no other process has failed before: then the error is this one's to print."""
    if rank():
        time.sleep(1)  # of an error that all have, process 0 speaks
    try:
        return world_size() == 1 or store().add("failures", 1) == 1
    except dist.DistError:  # who kept the store is gone, and had the word
        return rank() == 0
