"""empty: models made without memory for their weights."""

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
    """Make modules whose parameters are on the meta device, and whose buffers are what they always are.

    Each parameter moves there as a module gets it, so that no more than one is in memory at a time. Buffers stay, as
    checkpoints lack those that are not persistent (a rotary embedding's frequencies): ``torch.device("meta")`` would
    lose them.

    Example:
        >>> with autotp.empty_weights():
        ...     model = LlamaForCausalLM(config)
        >>> autotp.parallelize(model, tp=4, weights="path/to/checkpoint")
    """
    moved = WeakIdKeyDictionary()  # one that several modules get stays one

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or isinstance(parameter, UninitializedParameter):
            return None
        if parameter not in moved:
            made = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            moved[parameter] = made
        return moved[parameter]

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # it may return one, torch's text says
    try:
        yield
    finally:
        hook.remove()
