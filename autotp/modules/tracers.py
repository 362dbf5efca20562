"""tracers: refuse to be traced or transformed by others.

A parallelized module's forward compares the ranks, looks up a graph, and runs collectives. That is no tensor code, so
no tracer can record it. Without these checks a tracer would stop at the first line that it does not know, deep in
autotp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from autotp.errors import AutoTPError

__all__ = ["refuse_export", "refuse_source", "refuse_tracers"]

_interpreter: Any = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_jit: Any = torch._C._is_tracing

_INSTEAD = "Trace the dense model before autotp.parallelize"


def refuse_export() -> None:
    """Raise if ``torch.export`` traces this call.

    Raises:
        AutoTPError: it does.
    """
    if torch.compiler.is_exporting():
        raise AutoTPError(
            "torch.export cannot export a parallelized model, whose call compares the ranks and runs collectives. "
            f"{_INSTEAD}; autotp.graph(model) is this rank's fx graph"
        )


def refuse_source() -> None:
    """Raise, as ``torch.jit.script`` would compile the source of the module's own forward, which knows of no shards.

    Raises:
        AutoTPError: always.
    """
    raise AutoTPError(
        "torch.jit.script, torch.export and make_fx cannot compile a parallelized model, whose call compares the ranks "
        f"and runs collectives. {_INSTEAD}; autotp.graph(model) is this rank's fx graph"
    )


def refuse_tracers() -> None:
    """Raise if this call is traced, or transformed by ``torch.func``.

    Raises:
        AutoTPError: it is; the message names the tracer, and what to do.
    """
    if _interpreter() is not None:
        raise AutoTPError(
            "torch.func transforms (grad, vmap, jvp, jacrev, ...) cannot see through the collectives of a parallelized "
            "model: use loss.backward() or torch.autograd.grad, and batches in place of vmap, or the dense model"
        )
    if forward_ad._current_level >= 0:
        raise AutoTPError(
            "forward-mode differentiation (torch.autograd.forward_ad) stops at the collectives of a parallelized "
            "model: use backward, or the dense model"
        )
    if _jit():
        raise AutoTPError(
            "torch.jit.trace, and torch.onnx.export through it, cannot trace a parallelized model, whose call compares "
            f"the ranks and runs collectives. {_INSTEAD}; autotp.graph(model) is this rank's fx graph"
        )
    if _modes():
        _refuse_modes()


def _refuse_modes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, (FakeTensorMode, ProxyTorchDispatchMode)):
            raise AutoTPError(
                f"a parallelized model was called under {type(mode).__name__} (make_fx, or fake tensors): its call "
                f"compares the ranks and runs collectives on real values. {_INSTEAD}; autotp.graph(model) is this "
                "rank's fx graph"
            )
