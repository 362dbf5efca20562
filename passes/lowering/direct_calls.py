"""direct_calls: call torch's C functions in place of ops, without the detour over the dispatcher's Python objects.

A call of an ``OpOverload`` costs one to two microseconds more than one of the C function for the same op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import is_tensor, local, slice_arguments

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
    """The C function for each op, by the op's name."""
    homes: tuple[Any, ...] = (torch._C._nn, torch._C._VariableFunctions)
    functions = {f"aten.{n}": next(getattr(h, n) for h in homes if hasattr(h, n)) for n in _AS_FUNCTIONS.split()}
    functions |= {f"aten.{n}": getattr(torch.Tensor, n) for n in _AS_METHODS.split()}
    return functions | {"aten.sym_size": torch.Tensor.size, "aten.__and__": torch.bitwise_and}


_FUNCTIONS = _functions()
_OTHER = {"out", "dimname", "dtype_layout"}
"""Overloads whose arguments differ from the C functions'."""


def _call_narrow(node: fx.Node) -> bool:
    """Call ``narrow`` in place of a slice of known length; returns whether that is possible."""
    source, dim, start, _, step = slice_arguments(node)
    if step != 1 or not is_tensor(source) or not isinstance(start, int) or start < 0:
        return False
    length = local(node).shape[dim]
    if not isinstance(length, int):
        return False
    node.target, node.args = torch._C._VariableFunctions.narrow, (source, dim, start, length)
    return True


def direct_calls(graph: fx.Graph) -> int:
    """Call torch's C functions in place of ops.

    Args:
        graph: a rank's graph; changed in place.

    Returns:
        The number of calls that were changed.
    """
    count = 0
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = op_name(node)
        if name == "aten.slice":
            count += _call_narrow(node)
            continue
        function = _FUNCTIONS.get(name)
        if function is not None and node.target._overloadname not in _OTHER:
            node.target = function
            count += 1
    return count
