"""weight_binding: read the weights of a lowered graph where the module keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["WeightBinding"]


class WeightBinding:
    """Reads the weights of a lowered graph from the module that keeps them, so that later assignments are seen.

    A graph may take several weights as one tensor, the merged weight. They then lie side by side in memory. They are
    moved there at the first request, and again after they have been moved elsewhere (a cast, an assignment). They stay
    parameters of their own, as views of the merged weight.

    Args:
        module: the module.
        names: for each input of the graph the name of a parameter or buffer, or the names of several to merge.
        compiled: whether to mark sizes and addresses as static for a compiler.
    """

    def __init__(self, module: nn.Module, names: Sequence[tuple[str, ...]], compiled: bool = False) -> None:
        locations = [[_location(module, n) for n in group] for group in names]
        self._first = [group[0] for group in locations]
        self._groups = [(i, group) for i, group in enumerate(locations) if len(group) > 1]
        self._merged: dict[int, tuple[torch.Tensor, list[int]]] = {}
        self._last: tuple[Any, list[torch.Tensor]] | None = None
        self._compiled = compiled

    def take(self, seen: Any = None) -> list[torch.Tensor] | None:
        """The weights; None if some to merge differ in dtype, device or layout.

        Args:
            seen: the same object as in the last call if no weight has been replaced or moved since; None: unknown.
        """
        if seen is not None and self._last is not None and self._last[0] is seen:
            return self._last[1]
        weights = [d[kind][k] for d, kind, k in self._first]
        for i, locations in self._groups:
            group = [d[kind][k] for d, kind, k in locations]
            merged, pointers = self._merged.get(i, (None, None))
            if merged is None or [p.data_ptr() for p in group] != pointers or group[0].dtype != merged.dtype:
                if len({(p.dtype, p.device, p.layout) for p in group}) > 1:
                    return None
                merged = nn.Parameter(merge_in_memory(group), requires_grad=False)
                self._merged[i] = merged, [p.data_ptr() for p in group]
            weights[i] = merged
        for x in weights if self._compiled else ():
            if type(x) is not nn.Parameter and not hasattr(x, "_dynamo_static_input_type"):
                torch._dynamo.mark_static(x)
                torch._dynamo.mark_static_address(x)
        self._last = (seen, weights) if seen is not None else None
        return weights


def _location(module: nn.Module, name: str) -> tuple[dict[str, Any], str, str]:
    """A parameter's or buffer's location: its module's ``__dict__``, the key of a dict in it, and the key in that."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    return owner.__dict__, "_parameters" if key in owner._parameters else "_buffers", key


def merge_in_memory(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make parameters views of one tensor, in order along its first dim, and return that."""
    with torch.no_grad(), torch.inference_mode(False):
        if (base := _common_base(parameters)) is not None:
            return base
        merged = torch.cat([p.detach() for p in parameters])
        for p, view in zip(parameters, merged.split([p.shape[0] for p in parameters]), strict=True):
            p.data = view
    return merged


def _common_base(parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor of which parameters are contiguous views already, one after another; None if there is none."""
    address, first = parameters[0].data_ptr(), parameters[0].detach()
    for p in parameters:
        if (
            not p.is_contiguous()
            or p.data_ptr() != address
            or p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        address += p.numel() * p.element_size()
    rows = sum(p.shape[0] for p in parameters)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
