"""How the processes that torchrun starts work together: the first one leads, the others wait to be called.

Process 0 does what the command line says. The others do not even read it: they wait until process 0 starts uptraining,
take part in that, and leave. All of it goes through the key-value store that torchrun keeps, so that waiting for hours
needs no connection between the processes and costs nothing.
"""

import pickle
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

from ..environment import rank, world_size

PATIENCE = timedelta(days=30)
"""How long to wait for process 0, which may first have to download, convert and tokenise."""
_NOTHING = "nothing to do"


@cache
def store() -> dist.Store:
    """The key-value store of this launch."""
    return next(dist.rendezvous("env://", timeout=PATIENCE))[0]


def call_the_others(arguments: Mapping[str, Any]) -> None:
    """On process 0 of several: let the others leave `wait_for_call` with these arguments. Elsewhere nothing."""
    if rank() == 0 and world_size() > 1:
        store().set("call", pickle.dumps(dict(arguments)))  # type: ignore[arg-type]  (bytes are taken too)


def dismiss_the_others() -> None:
    """On process 0 of several, when it ends: let those that were never called go. Elsewhere nothing."""
    if rank() == 0 and world_size() > 1:
        store().compare_set("call", "", _NOTHING)  # changes nothing if there was a call


def wait_for_call() -> dict[str, Any] | None:
    """On every process but 0: the arguments of the call, or None if there is nothing to do."""
    try:
        call = store().get("call")
    except dist.DistError:  # process 0 kept the store itself and has left; torchrun keeps it elsewhere
        return None
    return None if call == _NOTHING.encode() else pickle.loads(call)


def first_to_fail() -> bool:
    """Whether no other process has failed before: then the error is this one's to print."""
    if rank():
        time.sleep(1)  # of an error that all have, process 0 speaks
    try:
        return world_size() == 1 or store().add("failures", 1) == 1
    except dist.DistError:  # who kept the store is gone, and had the word
        return rank() == 0
