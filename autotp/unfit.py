"""unfit: arguments with which a graph would not do what the module does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from autotp.arguments import Arguments
from autotp.comparison import is_constant
from autotp.errors import CaptureError
from autotp.held import Held, are_distinct, overlapping

__all__ = ["refuse_overlap", "refuse_shared", "refuse_unseen"]


def refuse_unseen(leaves: Sequence[Any]) -> None:
    """Raise if the content of an argument could change unseen."""
    for x in leaves:
        if not isinstance(x, torch.Tensor) and not is_constant(x):
            x = x.it if isinstance(x, Held) else x
            what = f"a {type(x).__module__}.{type(x).__qualname__}"
            raise CaptureError(
                f"an argument is, or holds, {what}, whose content autotp cannot see: pass tensors, numbers and "
                "strings, in tuples, lists and dicts, or register the class with "
                "torch.utils._pytree.register_pytree_node",
                reason=f"called with {what}, into which pytree cannot see",
            )


def refuse_shared(objects: Sequence[Any]) -> None:
    """Raise if of objects that a call may change two are, or hold, one and the same."""
    if not are_distinct(objects):
        raise CaptureError(
            "two arguments are, or hold, one list or object, and the call changes an argument: a graph would change "
            "one of the two only (what the model keeps on its modules is an argument too). Pass copies",
            reason="arguments that are one object, of which the call changes one",
        )


def refuse_overlap(of: Arguments, written: Collection[int], is_alone: Callable[[Sequence[torch.Tensor]], bool]) -> None:
    """Raise if a call would write into a tensor that shares memory with another that it, or the module, has.

    Args:
        of: its arguments.
        written: the numbers of the tensors that it writes into.
        is_alone: whether tensors share no memory with what else the module holds.
    """
    if not written:
        return
    named = zip(of.spec.paths(), of.leaves, strict=True)
    paths = [path for path, x in named if isinstance(x, torch.Tensor)]
    if (pair := overlapping(of.tensors, written)) is not None:
        said = f"{paths[pair[0]]} and {paths[pair[1]]} share memory"
    elif not is_alone([of.tensors[i] for i in written]):
        said = f"one of {', '.join(paths[i] for i in sorted(written))} shares memory with another tensor on the model"
    else:
        return
    raise CaptureError(
        f"{said}, and the call writes into one of them: a graph would change that one only. Give each its own",
        reason="tensors that share memory, of which the call changes one",
    )
