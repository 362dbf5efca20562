"""load_checkpoint: match a checkpoint to a model, and read this rank's shards of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from autotp.errors import AutoTPError, WeightsError
from autotp.utils.hashing import checksum
from autotp.weights.checkpoint_names import model_part, with_model_names
from autotp.weights.distributed_checkpoint import TrainingState
from autotp.weights.foreign_formats import format_of_names
from autotp.weights.progress import LARGE, Progress
from autotp.weights.shard_parameters import named_tensors
from autotp.weights.slicing import shards_of
from autotp.weights.tensor_source import Reader, TensorSource
from passes import Layout

__all__ = ["FIRST", "first_elements", "match_checkpoint", "read_shards", "refuse_empty"]

FIRST = 32
"""The most elements of each weight that ranks compare before they read their shards."""


def read_shards(
    model: nn.Module,
    sources: Mapping[str, TensorSource],
    layouts: Mapping[str, Layout],
    rank: int,
    device: torch.device | None,
) -> dict[str, torch.Tensor]:
    """This rank's shards of a checkpoint's tensors, by the names of the model's parameters and buffers.

    Args:
        model: the model.
        sources: the tensors to read, by the first names of parameters and buffers (:func:`match_checkpoint`).
        layouts: the split weights' layouts.
        rank: this rank.
        device: the shards' device; None: that of each parameter or buffer.

    Raises:
        WeightsError: a tensor cannot be read, or its file has been written meanwhile; the message names both.
    """
    tensors, results = named_tensors(model), {}
    shapes = {}
    for name in sources:
        shards = shards_of(layouts, name)
        shapes[name] = [len(shards[d].ranks[rank]) if d in shards else n for d, n in enumerate(tensors[name].shape)]
    whole = sum(math.prod(s.shape) * s.dtype.itemsize for s in sources.values())
    own = sum(math.prod(shape) * sources[name].dtype.itemsize for name, shape in shapes.items())
    first = not dist.is_initialized() or dist.get_rank() == 0
    with Progress(own, whole > LARGE, not first) as progress, Reader(progress.advance) as reader, torch.no_grad():
        for name in sorted(sources, key=lambda n: sources[n].position):
            tensor = tensors[name]
            results[name] = torch.empty(shapes[name], dtype=tensor.dtype, device=device or tensor.device)
            with _naming(name, sources[name]):
                reader.read_shard(sources[name], shards_of(layouts, name), rank, results[name])
    return results


@contextlib.contextmanager
def _naming(name: str, source: TensorSource) -> Iterator[None]:
    """Let errors be WeightsErrors that name a tensor and its file."""
    try:
        yield
    except Exception as error:
        text = str(error).removeprefix("weights: ") if isinstance(error, WeightsError) else f"{error!r}"
        file = source.position[0]
        where = f" ({file})" if file and file not in text else ""
        raise WeightsError(f"weights: {name}{where} cannot be read: {text}") from error


def first_elements(sources: Mapping[str, TensorSource]) -> dict[str, int]:
    """For each tensor of a checkpoint the checksum of its first elements.

    Raises:
        WeightsError: a tensor cannot be read; the message names it and its file.
    """
    checksums = {}
    with Reader() as reader, torch.no_grad():
        for name in sorted(sources, key=lambda n: sources[n].position):
            source = sources[name]
            inner = _innermost(source)
            box = tuple((0, min(n, FIRST if d == inner else 1)) for d, n in enumerate(source.shape))
            elements = torch.zeros([b for _, b in box], dtype=source.dtype)
            if elements.numel():
                with _naming(name, source):
                    reader.read_region(source, box, elements)
            checksums[name] = checksum(elements)
    return checksums


def _innermost(source: TensorSource) -> int | None:
    """The dim of several elements that lie next to each other; None if there is none."""
    return min((d for d, n in enumerate(source.shape) if n > 1), key=lambda d: source.stride[d], default=None)


def _named_tensors_and_aliases(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Parameters and buffers by each of their names, and whether they are in the state dict."""
    for path, module in model.named_modules(remove_duplicate=False):
        named: list[tuple[str, torch.Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in named:
            if tensor is not None:
                full = f"{path}.{name}" if path else name
                yield full, tensor, name not in module._non_persistent_buffers_set


def refuse_empty(model: nn.Module, loads: bool) -> None:
    """Raise if the model has tensors on the meta device that are not loaded.

    Raises:
        AutoTPError: there is one; the message names it, and says what to do.
    """
    for name, tensor, is_stored in _named_tensors_and_aliases(model):
        if not tensor.is_meta or (is_stored and loads):
            continue
        if is_stored:
            raise AutoTPError(
                f"{name} is on the meta device: pass weights=, a checkpoint of which each rank reads its shards, or "
                "load the model's weights (model.to_empty, load_state_dict) first"
            )
        raise AutoTPError(
            f"the buffer {name} is on the meta device and not persistent, so no checkpoint has it: make the model "
            "under autotp.empty_weights(), which leaves buffers as they are, in place of torch.device('meta')"
        )


def match_checkpoint(model: nn.Module, checkpoint: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The checkpoint's tensors by the first names of a model's parameters and persistent buffers.

    It is as strict as ``load_state_dict``, but one name of a tied weight suffices, and the checkpoint may have buffers
    that are not persistent in the model.

    Args:
        model: the model.
        checkpoint: the checkpoint's tensors, by the model's names or by those that transformers writes into files; of
            a training state the model's tensors are taken.

    Raises:
        WeightsError: the checkpoint does not fit; the message names the tensors that are missing, unexpected, or of
            another shape or kind.
    """
    is_part = isinstance(checkpoint, TrainingState)
    checkpoint = model_part(model, checkpoint) if is_part else with_model_names(model, checkpoint)
    names: dict[int, list[str]] = {}
    first: dict[int, torch.Tensor] = {}
    model_names = set()
    for name, tensor, is_stored in _named_tensors_and_aliases(model):
        if is_stored:
            names.setdefault(id(tensor), []).append(name)
            first.setdefault(id(tensor), tensor)
        model_names.add(name)
    sources: dict[str, TensorSource] = {}
    missing, wrong = [], []
    for key, tensor in first.items():
        present = [n for n in names[key] if n in checkpoint]
        if not present:
            missing.append(names[key][0])
            continue
        sources[names[key][0]] = checkpoint[present[-1]]  # the one that load_state_dict would take last
        for n in present:
            source = checkpoint[n]
            if source.shape != tuple(tensor.shape):
                wrong.append(f"{n} has shape {source.shape} there, {tuple(tensor.shape)} in the model")
            elif _kind(source.dtype) != _kind(tensor.dtype):
                wrong.append(f"{n} is of {source.dtype} there, of {tensor.dtype} in the model")
    unexpected = [n for n in checkpoint if n not in model_names]
    if quantized := format_of_names(unexpected):
        raise WeightsError(
            f"weights: the checkpoint is quantized ({quantized[0]}), as {_first_names(quantized[1])} show: pass "
            "weights that are not quantized"
        )
    lists = {"missing": missing, "unexpected": unexpected, "different": wrong}
    if any(lists.values()):
        lines = "\n".join(f"  {title}: {_first_names(entries)}" for title, entries in lists.items() if entries)
        raise WeightsError(
            f"the weights do not fit this {type(model).__name__}:\n{lines}\nNames are those of state_dict(). Pass the "
            "model's model_names checkpoint, or a mapping from the model's names to tensors"
        )
    return sources


def _kind(dtype: torch.dtype) -> str:
    """The kind of number; loading converts between dtypes of one kind."""
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
