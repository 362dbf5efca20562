"""fuse: make one op of each norm or activation that is written out in several."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.graphs import op_name
from passes.lowering.local_values import call, is_tensor, local, remove_dead_code, replace

__all__ = ["fuse"]

aten = torch.ops.aten


def _factors(node: Any) -> list[tuple[fx.Node, Any]]:
    """The two ways to read a product of two factors: (one factor, the other), with a tensor first."""
    if not isinstance(node, fx.Node) or op_name(node) != "aten.mul" or node.kwargs:
        return []
    a, b = node.args
    return [(x, y) for x, y in ((a, b), (b, a)) if is_tensor(x)]


def _is_op(node: Any, op: str) -> bool:
    """Whether an argument is a call of this op."""
    return isinstance(node, fx.Node) and op_name(node) == op


def _is_square(node: Any, x: fx.Node) -> bool:
    """Whether a node is the square of ``x``."""
    if _is_op(node, "aten.pow"):
        return node.args[0] is x and node.args[1] == 2
    return (_is_op(node, "aten.square") and node.args[0] is x) or (
        _is_op(node, "aten.mul") and node.args == (x, x) and not node.kwargs
    )


def _is_last_mean(node: Any) -> bool:
    """Whether a node is ``mean(-1, keepdim=True)``."""
    if not _is_op(node, "aten.mean") or len(node.args) < 2:
        return False
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return list(dims) in ([-1], [len(local(node.args[0]).shape) - 1]) and bool(keepdim) and "dtype" not in node.kwargs


def _reciprocal_root(node: Any) -> tuple[fx.Node, float] | None:
    """The ``x`` and the ``eps`` of ``1 / sqrt(x + eps)``."""
    inner: Any = None
    if _is_op(node, "aten.rsqrt") or (_is_op(node, "aten.pow") and node.args[1] == -0.5):
        inner = node.args[0]
    elif _is_op(node, "aten.reciprocal") and _is_op(node.args[0], "aten.sqrt"):
        inner = node.args[0].args[0]
    if not _is_op(inner, "aten.add") or inner.kwargs:
        return None
    for x, eps in (inner.args, inner.args[::-1]):
        if isinstance(eps, (int, float)) and is_tensor(x):
            return x, float(eps)
    return None


def _normalization(node: fx.Node) -> tuple[fx.Node, float, bool] | None:
    """The ``x``, the ``eps`` and whether the mean is subtracted, of ``x`` normalized over its last dim; None if not."""
    for x, scale in _factors(node):
        if (root := _reciprocal_root(scale)) is None:
            continue
        mean, eps = root
        if _is_last_mean(mean) and _is_square(mean.args[0], x):
            if (source := _centered_input(x)) is not None:
                return source, eps, True
            return x, eps, False
        if (source := _centered_input(x)) is not None and _is_biased_variance(mean, source):
            return source, eps, True
    if _is_op(node, "aten.div") and not node.kwargs and is_tensor(node.args[0]):
        x, below = node.args
        if _is_op(below, "aten.sqrt") and _is_op(below.args[0], "aten.add"):
            mean, eps = below.args[0].args[:2]
            if isinstance(eps, (int, float)) and is_tensor(mean):
                if _is_last_mean(mean) and _is_square(mean.args[0], x):
                    source = _centered_input(x)
                    return (x, float(eps), False) if source is None else (source, float(eps), True)
                if (source := _centered_input(x)) is not None and _is_biased_variance(mean, source):
                    return source, float(eps), True
    return None


def _centered_input(node: fx.Node) -> fx.Node | None:
    """The ``x`` of ``x - x.mean(-1, True)``."""
    if not _is_op(node, "aten.sub") or node.kwargs or len(node.args) != 2:
        return None
    x, mean = node.args
    return x if is_tensor(x) and _is_last_mean(mean) and mean.args[0] is x else None


def _is_biased_variance(node: Any, x: fx.Node) -> bool:
    """Whether a node is ``x.var(-1, unbiased=False, keepdim=True)``."""
    if not _is_op(node, "aten.var") or node.args[0] is not x:
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    unbiased = node.args[2] if len(node.args) > 2 else node.kwargs.get("unbiased", node.kwargs.get("correction", 1))
    keepdim = node.args[3] if len(node.args) > 3 else node.kwargs.get("keepdim", False)
    return list(dims or []) in ([-1], [len(local(x).shape) - 1]) and not unbiased and bool(keepdim)


def _cast_to(node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The value if it has this dtype, or else the cast to it that is the value's only user; None if there is none."""
    if local(node).dtype == dtype:
        return node
    if len(node.users) == 1:
        (user,) = node.users
        if op_name(user) in ("aten.to", "aten._to_copy") and local(user).dtype == dtype:
            return user
    return None


def _fuse_norm(node: fx.Node, grad: bool) -> bool:
    """Fuse the norm that ends in this node, with a weight and a bias that follow; returns whether there is one."""
    normalization = _normalization(node)
    if normalization is None:
        return False
    wide, eps, centered = normalization
    if not centered and not grad and _on_cpu(node):  # torch has no kernel there, and the separate ops can reuse memory
        return False
    size = local(wide).shape[-1]
    if not isinstance(size, int):
        return False
    x = wide
    if op_name(wide) in ("aten.to", "aten._to_copy") and is_tensor(wide.args[0]):  # computed in a wider dtype
        x = wide.args[0]
    dtype = local(x).dtype
    last, weight, bias = _cast_to(node, dtype), None, None
    if last is None:  # scaled in the wider dtype, too
        x, dtype, last = wide, local(wide).dtype, node
    if (scaled := _vector_user(last, "aten.mul", size, dtype)) is not None:
        last, weight = scaled
        if centered and (moved := _vector_user(last, "aten.add", size, dtype)) is not None:
            last, bias = moved
    shape = local(node).shape
    if centered:
        args: tuple[Any, ...] = (x, [size], weight, bias, eps)
        new = call(last, aten.layer_norm.default, args, like=last, shape=shape, dtype=dtype)
    else:
        new = call(last, aten.rms_norm.default, (x, [size], weight, eps), like=last, shape=shape, dtype=dtype)
    replace(last, new)
    return True


def _vector_user(node: fx.Node, op: str, size: int, dtype: torch.dtype) -> tuple[fx.Node, fx.Node] | None:
    """The only user of a value, if it multiplies or adds a vector as long as the last dim, and that vector."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if op_name(user) != op or user.kwargs or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not is_tensor(other) or local(other).shape != (size,) or {local(other).dtype, local(user).dtype} != {dtype}:
        return None
    return user, other


def _on_cpu(node: fx.Node) -> bool:
    """Whether a value is on the CPU."""
    value = node.meta.get("global")
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def _is_close(x: Any, value: float) -> bool:
    return isinstance(x, (int, float)) and math.isclose(x, value, rel_tol=1e-6)


def _scaled_by(node: Any, value: float) -> fx.Node | None:
    """The ``x`` of ``x * value``."""
    return next((x for x, y in _factors(node) if _is_close(y, value)), None)


def _plus_one(node: Any) -> fx.Node | None:
    """The ``x`` of ``x + 1``."""
    if not _is_op(node, "aten.add") or node.kwargs:
        return None
    return next((x for x, y in (node.args, node.args[::-1]) if is_tensor(x) and _is_close(y, 1)), None)


def _fuse_gelu(node: fx.Node, grad: bool) -> bool:
    """Fuse ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` and ``0.5 x (1 + erf(x / sqrt(2)))``."""
    for half, other in _factors(node):
        x, curve = _scaled_by(half, 0.5), _plus_one(other)
        if x is None or curve is None or local(x) != local(node):
            continue
        kind = None
        if _is_op(curve, "aten.tanh") and (inner := _scaled_by(curve.args[0], math.sqrt(2 / math.pi))) is not None:
            kind = "tanh" if _is_cubic(inner, x) else None
        elif _is_op(curve, "aten.erf"):
            inner = curve.args[0]
            by_root = _scaled_by(inner, math.sqrt(0.5)) is x or (
                _is_op(inner, "aten.div") and inner.args[0] is x and _is_close(inner.args[1], math.sqrt(2))
            )
            kind = "none" if by_root else None
        if kind is not None:
            options = {"approximate": kind}
            replace(node, call(node, aten.gelu.default, (x,), options, like=node, shape=local(node).shape))
            return True
    return False


def _is_cubic(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is ``x + 0.044715 x^3``."""
    if not _is_op(node, "aten.add") or node.kwargs:
        return False
    for first, second in (node.args, node.args[::-1]):
        cube = _scaled_by(second, 0.044715)
        if first is x and _is_op(cube, "aten.pow") and cube is not None and cube.args[0] is x and cube.args[1] == 3:
            return True
    return False


_FUSIONS: dict[str, tuple[Callable[[fx.Node, bool], bool], ...]] = {
    "aten.mul": (_fuse_norm, _fuse_gelu),
    "aten.div": (_fuse_norm,),
}


def fuse(graph: fx.Graph, grad: bool) -> int:
    """Make one op of each RMS norm, layer norm or GELU that is written out in several.

    The fused ops round differently. Their results agree with those of the separate ops to a few units in the last
    place of the dtype (measured: 2e-16 relative in float64, 2e-7 in float32), and to one rounding in dtypes for
    which the norm was computed in float32.

    Args:
        graph: a rank's graph; changed in place.
        grad: whether a backward follows.

    Returns:
        The number of norms and GELUs that were fused.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and not node._erased:
            count += any(fusion(node, grad) for fusion in _FUSIONS.get(op_name(node), ()))
    remove_dead_code(graph)
    return count
