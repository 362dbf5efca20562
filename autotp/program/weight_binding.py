"""weight_binding: the weights of a lowered graph, read where the module keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["WeightBinding"]


class WeightBinding:
    """The weights of a lowered graph where a module keeps them: what is assigned to the module later is seen.

    Weights that a graph takes as one lie side by side in memory. They are laid so when they are first asked for, and
    again when they have moved (a cast, an assignment); they stay parameters of their own, as views of it.

    Args:
        module: the module.
        names: for each weight the name of a parameter or buffer, or the names of several that are taken as one.
        compiled: whether a compiler is to know that their sizes and, as long as they are not replaced, addresses stay.
    """

    def __init__(self, module: nn.Module, names: Sequence[tuple[str, ...]], compiled: bool = False) -> None:
        self._places = [[_place(module, n) for n in each] for each in names]
        self._single = [each[0] for each in self._places]
        self._groups = [(i, each) for i, each in enumerate(self._places) if len(each) > 1]
        self._whole: dict[int, tuple[torch.Tensor, list[int]]] = {}
        self._last: tuple[Any, list[torch.Tensor]] | None = None
        self._compiled = compiled

    def take(self, seen: Any = None) -> list[torch.Tensor] | None:
        """The weights; None where some that are taken as one are not of one kind, and cannot lie side by side.

        Args:
            seen: the same object as in the last call if no weight has been replaced or moved since; None: unknown.
        """
        if seen is not None and self._last is not None and self._last[0] is seen:
            return self._last[1]
        found = [d[kind][k] for d, kind, k in self._single]
        for i, places in self._groups:
            parts = [d[kind][k] for d, kind, k in places]
            whole, pointers = self._whole.get(i, (None, None))
            if whole is None or [p.data_ptr() for p in parts] != pointers or parts[0].dtype != whole.dtype:
                if any(
                    (p.dtype, p.device, p.layout) != (parts[0].dtype, parts[0].device, parts[0].layout) for p in parts
                ):
                    return None
                whole = nn.Parameter(laid_side_by_side(parts), requires_grad=False)
                self._whole[i] = whole, [p.data_ptr() for p in parts]
            found[i] = whole
        for x in found if self._compiled else ():
            if type(x) is not nn.Parameter and not hasattr(x, "_dynamo_static_input_type"):
                torch._dynamo.mark_static(x)
                torch._dynamo.mark_static_address(x)
        self._last = (seen, found) if seen is not None else None
        return found


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str, str]:
    """The attributes of the module that has a parameter or buffer, which of them it is in, and its key there."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    return owner.__dict__, "_parameters" if key in owner._parameters else "_buffers", key


def laid_side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of which parameters are views, one after another along their first dim; they become that here."""
    with torch.no_grad(), torch.inference_mode(False):
        if (base := _base(parts)) is not None:
            return base
        whole = torch.cat([p.detach() for p in parts])
        for p, part in zip(parts, whole.split([p.shape[0] for p in parts]), strict=True):
            p.data = part
    return whole


def _base(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor of which contiguous ones are views already, one after another."""
    at, first = parts[0].data_ptr(), parts[0].detach()
    for p in parts:
        if (
            not p.is_contiguous()
            or p.data_ptr() != at
            or p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        at += p.numel() * p.element_size()
    rows = sum(p.shape[0] for p in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
