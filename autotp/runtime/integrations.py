"""integrations: what users and libraries do with a model besides calling it, each made to know of shards."""

from __future__ import annotations

from autotp.runtime.adapters import wrap_adapters
from autotp.runtime.generate import wrap_generate
from autotp.runtime.runtime import Runtime
from autotp.weights.fillers import patch_fillers
from autotp.weights.grad_norm import patch_grad_norms
from autotp.weights.load_state_dict import accept_dense_state
from autotp.weights.optimizer_state import check_optimizers
from autotp.weights.registry import register

__all__ = ["integrate"]


def integrate(runtime: Runtime) -> None:
    """Let a model generate on all ranks alike, merge adapters and load dense tensors; let gradient norms, optimizers,
    and functions that fill parameters see shards."""
    wrap_generate(runtime)
    wrap_adapters(runtime, integrate)
    accept_dense_state(runtime.model, runtime.shards_of, runtime.mesh.rank)
    patch_grad_norms()
    patch_fillers()
    check_optimizers()
    register(runtime)
