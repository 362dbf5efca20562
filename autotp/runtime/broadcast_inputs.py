"""broadcast_inputs: rank 0's arguments of a call on all ranks."""

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
    """A tensor in the form in which it is sent."""

    values: torch.Tensor
    device: str


@dataclass(frozen=True)
class _Own:
    """Stands for an argument that each rank keeps: its own one at this path."""

    path: str


def broadcast_inputs(
    agreement: Agreement, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> Call:
    """Rank 0's arguments, but this rank's own caches, and this rank's own objects where they cannot be sent.

    Args:
        agreement: the ranks' means of exchange.
        args: this rank's positional arguments.
        kwargs: its arguments by keyword.
        device: the device for tensors that are not on the CPU.
    """
    paths, leaves, spec = _flattened((args, dict(kwargs)))
    sent = agreement.of_rank_0(
        pytree.tree_unflatten([_sendable(p, x) for p, x in zip(paths, leaves, strict=True)], spec)
    )
    if agreement.mesh.rank == 0:
        return args, dict(kwargs)
    own = dict(zip(paths, leaves, strict=True))
    _, leaves, spec = _flattened(sent)
    call: Call = pytree.tree_unflatten([_received(x, own, device) for x in leaves], spec)
    return call


def _flattened(tree: Any) -> tuple[list[str], list[Any], Any]:
    leaves, spec = plain_leaves(tree)
    numbered = pytree.tree_unflatten(list(range(len(leaves))), spec)
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(numbered)[0]], leaves, spec


def _sendable(path: str, x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return _Tensor(x.detach().cpu(), x.device.type)
    return x if is_constant(x) or (is_object(x) and not is_sharded(type(x)) and _is_visible(x)) else _Own(path)


def _is_visible(x: Any) -> bool:
    """Whether autotp can see all of an object, such as a config of transformers."""
    try:
        ObjectFlattener().flatten(x)
    except UnseenError:
        return False
    return True


def _received(x: Any, own: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(x, _Tensor):
        return x.values if x.device == "cpu" else x.values.to(device)
    return own.get(x.path) if isinstance(x, _Own) else x
