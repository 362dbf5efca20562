"""groups: process groups of some ranks, which only these ranks make."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import distributed_c10d

__all__ = ["new_group"]

_made: Counter[tuple[int, ...]] = Counter()


def new_group(ranks: Sequence[int], timeout: timedelta, backend: str | None = None) -> Any:
    """A process group of some ranks; collective among them alone.

    torch names such a group after how many groups the process has. Of two members one may be in a group that the other
    is not in, and then they would wait for each other under different names. So here the name is how many groups of
    just these ranks have been made, which their members agree in.

    Args:
        ranks: the members, by global rank.
        timeout: how long a collective waits.
        backend: left out, the default group's.
    """
    key = tuple(ranks)
    _made[key] += 1
    name = hashlib.sha256(f"autotp {key} {_made[key]}".encode()).hexdigest()
    named: Any = contextlib.nullcontext()
    if hasattr(distributed_c10d, "_hash_ranks_to_str"):
        named = mock.patch.object(distributed_c10d, "_hash_ranks_to_str", return_value=name)
    with named:
        return dist.new_group(list(ranks), timeout, backend, use_local_synchronization=True)
