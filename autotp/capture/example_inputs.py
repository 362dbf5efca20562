"""example_inputs: the caller's inputs, a transformers model's dummy inputs, or a guess from the first layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import stateless

from autotp.errors import CaptureError
from autotp.modules.device import device_of

__all__ = ["ExampleInputs", "example_call"]

ExampleInputs = tuple[Any, ...] | Mapping[str, Any] | None


def example_call(model: nn.Module, example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The ``args`` and ``kwargs`` of the call that is captured.

    Args:
        model: the dense model.
        example_inputs: positional inputs as a tuple, keyword inputs as a mapping, a single tensor, or
            None to guess some: a transformers model's ``dummy_inputs``; for other models token ids for an
            embedding, or ``(batch, sequence, features)`` floats for a Linear, a norm or an attention. The first
            guess that runs on fake tensors is taken.

    Raises:
        CaptureError: ``example_inputs`` has the wrong type, or is None and no guess runs.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if example_inputs is not None:
        if not isinstance(example_inputs, (tuple, list)):
            raise CaptureError(
                f"example_inputs must be a tuple (positional) or a dict (keyword), not {type(example_inputs).__name__}"
            )
        return tuple(example_inputs), {}
    device = device_of(model)
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        parameters = inspect.signature(model.forward).parameters
        dummy = {**dummy, **({"use_cache": False} if "use_cache" in parameters else {})}
        return (), {
            k: _to_device(_without_unit_dims(v), device) if isinstance(v, torch.Tensor) else v for k, v in dummy.items()
        }
    failures = []
    for args in _guesses(model, device):
        failure = _failure(model, args)
        if failure is None:
            return args, {}
        failures.append(f"  {_describe(args)}: {failure}")
    raise CaptureError(
        f"cannot guess inputs for {type(model).__name__}: pass example_inputs, a tuple of positional or a dict of "
        f"keyword inputs for its forward{inspect.signature(model.forward)}."
        + ("\nTried:\n" + "\n".join(failures) if failures else "")
    )


def _to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; zeros for a meta tensor, which a model on the meta device may have as a dummy input."""
    return torch.zeros_like(value, device=device) if value.is_meta else value.to(device)


def _without_unit_dims(ids: torch.Tensor) -> torch.Tensor:
    """Dummy ids; if a dim is 1, as ids of shape (2, 16): a dim of 1 would be a constant in the graph."""
    return ids if ids.dim() != 2 or min(ids.shape) > 1 else ids.reshape(-1)[:1].expand(2, 16).contiguous()


def _guesses(model: nn.Module, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Possible positional inputs of a model, in the order in which to try them."""
    forward = inspect.signature(model.forward)
    required = [
        p
        for p in forward.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    count = max(len(required), 1)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    seen: set[tuple[Any, ...]] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            key: tuple[Any, ...] = ("ids", min(module.num_embeddings, 2))
        elif isinstance(module, nn.Linear):
            key = ("floats", module.in_features)
        elif isinstance(module, nn.LayerNorm):
            key = ("floats", module.normalized_shape[-1])
        elif isinstance(module, nn.MultiheadAttention):
            key = ("floats", module.embed_dim)
        elif isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.dim():
            key = ("floats", weight.shape[-1])
        else:
            continue
        if key in seen or len(seen) > 8:
            continue
        seen.add(key)
        shapes = ((2, 16), (2, 8)) if key[0] == "ids" else ((2, 16, key[1]), (16, key[1]))
        for shape in shapes:
            if key[0] == "ids":
                yield tuple(torch.randint(0, key[1], shape, device=device) for _ in range(count))
            else:
                yield tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(count))


def _failure(model: nn.Module, args: tuple[Any, ...]) -> str | None:
    """The error of a run on fake tensors, in one line; None if there is none."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake_tensors: dict[int, torch.Tensor] = {}

        def fake(t: torch.Tensor) -> torch.Tensor:
            if id(t) not in fake_tensors:
                fake_tensors[id(t)] = torch.empty(t.shape, dtype=t.dtype, device=args[0].device)
            return fake_tensors[id(t)]

        tensors = {n: fake(t) for n, t in model.named_parameters(remove_duplicate=False)}
        tensors |= {n: fake(t) for n, t in model.named_buffers(remove_duplicate=False)}
        inputs = tuple(torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in args)
        try:
            with stateless._reparametrize_module(model, tensors, stack_weights=True), torch.no_grad():
                model(*inputs)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _describe(args: tuple[Any, ...]) -> str:
    return ", ".join(f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}" for a in args)
