"""integrations: what users and libraries do with a model besides calling it, each made to know of shards."""

from __future__ import annotations

from autotp.runtime.adapters import wrap_adapters
from autotp.runtime.generate import wrap_generate
from autotp.runtime.runtime import Runtime
from autotp.saving.pretrained import wrap_save_pretrained
from autotp.weights.data_parallel import guard_data_parallelism
from autotp.weights.fillers import patch_fillers
from autotp.weights.grad_norm import patch_grad_norms
from autotp.weights.load_state_dict import accept_dense_state
from autotp.weights.optimizer_state import check_optimizers
from autotp.weights.optimizer_state_dict import patch_optimizers
from autotp.weights.registry import register
from autotp.weights.state_dict import mark_shards
from autotp.weights.torch_checkpoint import patch_state_dict_functions

__all__ = ["integrate"]


def integrate(runtime: Runtime) -> None:
    """Let a model generate on all ranks alike, merge adapters and load dense tensors.

    Everything else that acts on parameters sees that they are shards, or refuses them.
    """
    wrap_generate(runtime)
    wrap_adapters(runtime, integrate)
    wrap_save_pretrained(runtime.model)
    accept_dense_state(runtime.model, runtime.shards_of, runtime.mesh.rank)
    mark_shards(runtime.model, runtime.shards_of, runtime.mesh.rank, runtime)
    patch_grad_norms()
    patch_state_dict_functions()
    patch_optimizers()
    patch_fillers()
    check_optimizers()
    if runtime.mesh.tp > 1:
        guard_data_parallelism()
    register(runtime)
