"""direct_calls: ops are called as torch's C functions, without the way through the dispatcher's Python objects.

A call of an ``OpOverload`` costs one to two microseconds more than one of the C function beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import cut, is_tensor, local

__all__ = ["direct_calls"]

_AS_FUNCTIONS = ("abs add addmm all amax amin any arange argmax argmin baddbmm bitwise_and bitwise_not bitwise_or bmm "
                 "cat ceil clamp cos cumsum diff div einsum embedding eq erf exp expm1 flatten floor full ge gelu gt "
                 "index_copy index_select isnan layer_norm le linear log log1p logical_and logical_not logical_or lt "
                 "masked_fill matmul maximum mean minimum mm mul ne neg ones outer permute pow prod reciprocal relu "
                 "reshape rms_norm rsqrt rsub scaled_dot_product_attention select sigmoid sign silu silu_ sin softmax "
                 "split_with_sizes sqrt square squeeze stack sub sum tanh transpose tril triu unflatten unsqueeze "
                 "where zeros")  # fmt: skip
_AS_METHODS = "add_ mul_ sub_ div_ relu_ tanh_ sigmoid_ neg_ exp_ rsqrt_ index_copy_ expand to"


def _functions() -> dict[str, Callable[..., Any]]:
    homes: tuple[Any, ...] = (torch._C._nn, torch._C._VariableFunctions)
    found = {f"aten.{n}": next(getattr(h, n) for h in homes if hasattr(h, n)) for n in _AS_FUNCTIONS.split()}
    found |= {f"aten.{n}": getattr(torch.Tensor, n) for n in _AS_METHODS.split()}
    return found | {"aten.sym_size": torch.Tensor.size, "aten.__and__": torch.bitwise_and}


_FUNCTIONS = _functions()
_OTHER = {"out", "dimname", "dtype_layout"}
"""Overloads whose arguments the C functions do not take as they are."""


def _narrowed(node: fx.Node) -> bool:
    """A slice of a known length as ``narrow``."""
    source, dim, start, _, step = cut(node)
    if step != 1 or not is_tensor(source) or not isinstance(start, int) or start < 0:
        return False
    length = local(node).shape[dim]
    if not isinstance(length, int):
        return False
    node.target, node.args = torch._C._VariableFunctions.narrow, (source, dim, start, length)
    return True


def direct_calls(graph: fx.Graph) -> int:
    """Call torch's C functions.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        How many calls were changed.
    """
    count = 0
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = op_name(node)
        if name == "aten.slice":
            count += _narrowed(node)
            continue
        function = _FUNCTIONS.get(name)
        if function is not None and node.target._overloadname not in _OTHER:
            node.target = function
            count += 1
    return count
