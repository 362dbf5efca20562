"""model_checks: refuse models that a captured graph would not compute faithfully."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from autotp.errors import AutoTPError
from autotp.modules.hooks import refuse_global_hooks
from autotp.utils.value_types import DTENSOR, is_a

__all__ = ["check_model"]


def check_model(model: nn.Module) -> None:
    """Refuse a model whose graph would not compute what its Python does.

    Adapters, parametrizations and other changes by modules, tensors and functions of tensors are captured as any other
    model. Four kinds of models are refused. Wrappers and compiled code are no Python to capture. Packed or distributed
    weights cannot be sharded. Hooks on gradients of parameters would see shards. Hooks on all modules at once would not
    run (see :mod:`autotp.modules.hooks` for hooks on single modules).

    Raises:
        AutoTPError: the model is refused, unchanged. The message names the module or parameter, and what to do.
    """
    refuse_global_hooks()
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            _check_tensor(f"{kind} {name}", tensor)
    for name, module in model.named_modules():
        where = f"{name} ({type(module).__name__})" if name else f"this {type(module).__name__}"
        _check_class(where, module)
        for attribute, value in module.__dict__.items():
            if isinstance(value, torch.ScriptObject):
                raise AutoTPError(
                    f"{where} keeps weights packed in {attribute}: quantized kernels cannot be split. Parallelize the "
                    "model as it was before it was converted"
                )


def _check_class(where: str, module: nn.Module) -> None:
    if is_a(module, "torch._dynamo.eval_frame.OptimizedModule") or module._compiled_call_impl is not None:
        raise AutoTPError(
            f"{where} is compiled by torch.compile: autotp captures the model's own Python. Pass the model as it was "
            "before (torch.compile(model) keeps it as ._orig_mod)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise AutoTPError(f"{where} is a TorchScript module, not Python that autotp could capture: pass the original")
    fsdp = is_a(module, "torch.distributed.fsdp.FullyShardedDataParallel")
    if fsdp or isinstance(module, (DataParallel, DistributedDataParallel)):
        raise AutoTPError(f"{where} wraps a module for data parallelism: pass the module inside it")


def _check_tensor(where: str, tensor: torch.Tensor) -> None:
    kind: Any = type(tensor)
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise AutoTPError(f"{where} has no shape yet: run the model once, so that its lazy modules are made")
    if is_a(tensor, DTENSOR):
        raise AutoTPError(f"{where} is a DTensor, split already: pass the model as it was before")
    if isinstance(tensor, nn.Parameter) and tensor.is_inference():
        raise AutoTPError(f"{where} was made under torch.inference_mode and can never be trained: make it outside")
    if kind not in (torch.Tensor, nn.Parameter) or tensor.is_quantized or tensor.layout is not torch.strided:
        raise AutoTPError(
            f"{where} is a {kind.__name__} of {tensor.dtype} ({tensor.layout}), which may hold anything: autotp splits "
            "plain dense tensors. Dequantize first, or pass the model as it was before it was quantized"
        )
    if isinstance(tensor, nn.Parameter) and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks):
        raise AutoTPError(
            f"{where} has a hook on its gradient, which would see this rank's shard only: if it may, register it after "
            "parallelize"
        )
