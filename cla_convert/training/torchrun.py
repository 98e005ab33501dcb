"""What the processes that torchrun started have in common: a key-value store, and one voice.

All of them do the same (SPMD); a `Team` (parallel.py) is what they train as. The first one speaks and writes for all.
"""

import os
import time
import uuid
from datetime import timedelta
from functools import cache

import torch.distributed as dist

from ..environment import rank, world_size

PATIENCE = timedelta(days=30)
"""How long to wait for process 0, which may first have to download and tokenise."""
_MEANWHILE = 0.02
"""Seconds between two looks."""


@cache
def store() -> dist.Store:
    """The key-value store of this launch, once all processes are there.

    torchrun's own store outlives the processes that it restarts, with all that they wrote, and its count of restarts is
    not the same on all machines (pytorch issue 135712). So every launch has a prefix, which process 0 makes up.
    """
    return dist.PrefixStore(_named(_shared()) if rank() == 0 else _told(_shared()), _shared())


@cache
def _shared() -> dist.Store:
    return next(dist.rendezvous("env://", timeout=PATIENCE))[0]


def _named(shared: dist.Store) -> str:
    """A new name for this launch, told to whoever asks (the questions of an earlier launch are there too)."""
    name, answered = uuid.uuid4().hex, dict[int, bytes]()
    others = range(1, world_size())
    while shared.add(f"{name}/informed", 0) < len(others):
        for other in others:
            if shared.check([f"asks/{other}"]) and answered.get(other) != (asks := shared.get(f"asks/{other}")):
                shared.set(f"launch/{asks.decode()}", name)
                answered[other] = asks
        time.sleep(_MEANWHILE)
    return name


def _told(shared: dist.Store) -> str:
    """The name of this launch."""
    asks = uuid.uuid4().hex
    shared.set(f"asks/{rank()}", asks)
    shared.wait([f"launch/{asks}"], PATIENCE)
    name = shared.get(f"launch/{asks}").decode()
    shared.add(f"{name}/informed", 1)
    return name


@cache
def parent() -> int:
    """The process that started this one, at the first call."""
    return os.getppid()


def orphaned() -> bool:
    """Whether what started this process, to train with others, has ended without ending it."""
    return world_size() > 1 and os.getppid() != parent()


def first_to_fail() -> bool:
    """Whether no other process has failed before: then the error is this one's to print."""
    if rank():
        time.sleep(1)  # of an error that all have, process 0 speaks
    try:
        return world_size() == 1 or _failures() == 1
    except dist.DistError:  # who kept the store is gone, and had the word
        return rank() == 0


def _failures() -> int:
    """How many have failed, this one counted. Before all are connected there is only torchrun's count of launches."""
    if store.cache_info().currsize:
        return store().add("failures", 1)
    return _shared().add(f"failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)
