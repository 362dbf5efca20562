"""empty_weights: make models without memory for their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["empty_weights"]


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Put the parameters of modules that are made here on the meta device, and leave their buffers as they are.

    Each parameter moves when it is assigned to a module, so that no more than one is in memory at a time. Buffers keep
    their values, since checkpoints lack those that are not persistent (a rotary embedding's frequencies);
    ``torch.device("meta")`` would lose them.

    ``from_pretrained`` of transformers works, too: the model has its dtype, mode and generation config, and the weights
    are not read. With a ``dtype`` that is not the checkpoint's, they are read, one at a time; ``model.to(dtype)``
    afterwards costs nothing.

    Example:
        >>> with autotp.empty_weights():
        ...     model = AutoModelForCausalLM.from_pretrained("path/to/checkpoint")
        >>> autotp.parallelize(model, tp=4, weights="path/to/checkpoint")
    """
    moved = WeakIdKeyDictionary()  # a parameter of several modules stays one

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or isinstance(parameter, UninitializedParameter):
            return None
        if parameter not in moved:
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            empty.__dict__.update(parameter.__dict__)
            moved[parameter] = empty
        return moved[parameter]

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # it may return one, as torch documents
    try:
        yield
    finally:
        hook.remove()
