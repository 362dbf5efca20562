"""sharing: what rank 0 gives the others: the arguments of a call, and its random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autotp.arguments.object_tree import ObjectFlattener, UnseenError, is_object, is_sharded, plain_leaves
from autotp.distributed.agreement import Agreement
from autotp.utils.value_types import is_constant

__all__ = ["Call", "broadcast_inputs"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Tensor:
    """A tensor as it is sent."""

    values: torch.Tensor
    device: str


@dataclass(frozen=True)
class _Own:
    """Stands for what each rank has itself at this place."""

    place: str


def broadcast_inputs(
    agreement: Agreement, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> Call:
    """Rank 0's arguments, with this rank's own caches, and objects that cannot be sent, in their places.

    Args:
        agreement: of the ranks.
        args: this rank's positional arguments.
        kwargs: by keyword.
        device: where this rank's tensors are to be, if not on the CPU.
    """
    places, leaves, spec = _opened((args, dict(kwargs)))
    sent = agreement.of_rank_0(
        pytree.tree_unflatten([_sendable(p, x) for p, x in zip(places, leaves, strict=True)], spec)
    )
    if agreement.mesh.rank == 0:
        return args, dict(kwargs)
    own = dict(zip(places, leaves, strict=True))
    _, given, spec = _opened(sent)
    taken: Call = pytree.tree_unflatten([_received(x, own, device) for x in given], spec)
    return taken


def _opened(tree: Any) -> tuple[list[str], list[Any], Any]:
    leaves, spec = plain_leaves(tree)
    numbered = pytree.tree_unflatten(list(range(len(leaves))), spec)
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(numbered)[0]], leaves, spec


def _sendable(place: str, x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return _Tensor(x.detach().cpu(), x.device.type)
    return x if is_constant(x) or (is_object(x) and not is_sharded(type(x)) and _is_seen(x)) else _Own(place)


def _is_seen(x: Any) -> bool:
    """Whether an object is no more than what autotp sees in it, such as a config of transformers."""
    try:
        ObjectFlattener().open(x)
    except UnseenError:
        return False
    return True


def _received(x: Any, own: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(x, _Tensor):
        return x.values if x.device == "cpu" else x.values.to(device)
    return own.get(x.place) if isinstance(x, _Own) else x
