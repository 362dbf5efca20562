"""process_groups: process groups of some ranks, made by these ranks alone."""

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

_counts: Counter[tuple[int, ...]] = Counter()
"""How many groups this process has made of each list of ranks."""


def new_group(ranks: Sequence[int], timeout: timedelta, backend: str | None = None) -> Any:
    """A process group of some ranks; collective among them alone.

    torch puts the number of groups that the process has into the group's name. If one member is in a group without the
    other, their numbers differ, and they wait for each other under different names. So the name here has the number
    of groups that were made of exactly these ranks, which is the same for all members.

    Args:
        ranks: the members, by global rank.
        timeout: how long a collective waits.
        backend: the backend; left out, it is the default group's.
    """
    key = tuple(ranks)
    _counts[key] += 1
    name = hashlib.sha256(f"autotp {key} {_counts[key]}".encode()).hexdigest()
    naming: Any = contextlib.nullcontext()
    if hasattr(distributed_c10d, "_hash_ranks_to_str"):
        naming = mock.patch.object(distributed_c10d, "_hash_ranks_to_str", return_value=name)
    with naming:
        return dist.new_group(list(ranks), timeout, backend, use_local_synchronization=True)
