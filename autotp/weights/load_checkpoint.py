"""load_checkpoint: match a checkpoint to a model, and read this rank's shards of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from autotp.errors import AutoTPError, WeightsError
from autotp.utils.hashing import checksum
from autotp.weights.checkpoint import Reader, TensorSource
from autotp.weights.checkpoint_names import with_model_names
from autotp.weights.shard_parameters import named_tensors
from autotp.weights.slicing import shards_of
from passes import Layout

__all__ = ["FIRST", "first_elements", "match_checkpoint", "read_shards", "refuse_empty"]

FIRST = 32
"""How many elements of each weight ranks compare before they read their shares."""


def read_shards(
    model: nn.Module,
    sources: Mapping[str, TensorSource],
    layouts: Mapping[str, Layout],
    rank: int,
    device: torch.device | None,
) -> dict[str, torch.Tensor]:
    """This rank's shares of a checkpoint's tensors, by the names of the parameters and buffers that are to have them.

    Args:
        model: the model.
        sources: what to read, by the first names of parameters and buffers (:func:`match_checkpoint`).
        layouts: the split weights' layouts.
        rank: this rank.
        device: where it goes; None: where the parameters and buffers are.
    """
    tensors, made = named_tensors(model), {}
    with Reader() as reader, torch.no_grad():
        for name in sorted(sources, key=lambda n: sources[n].place):
            tensor, shards = tensors[name], shards_of(layouts, name)
            shape = [len(shards[d].ranks[rank]) if d in shards else n for d, n in enumerate(tensor.shape)]
            made[name] = torch.empty(shape, dtype=tensor.dtype, device=device or tensor.device)
            reader.part(sources[name], shards, rank, made[name])
    return made


def first_elements(sources: Mapping[str, TensorSource]) -> dict[str, int]:
    """For each of a checkpoint's tensors a number that tells its first elements from others."""
    found = {}
    with Reader() as reader, torch.no_grad():
        for name in sorted(sources, key=lambda n: sources[n].place):
            each = sources[name]
            along = min((d for d, n in enumerate(each.shape) if n > 1), key=lambda d: each.stride[d], default=None)
            box = tuple((0, min(n, FIRST if d == along else 1)) for d, n in enumerate(each.shape))
            part = torch.zeros([b for _, b in box], dtype=each.dtype)
            if part.numel():
                each.read(reader, box, part)
            found[name] = checksum(part)
    return found


def _all_named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Parameters and buffers by each of their names, and whether a state dict has them."""
    for path, module in model.named_modules(remove_duplicate=False):
        own: list[tuple[str, torch.Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in own:
            if tensor is not None:
                full = f"{path}.{name}" if path else name
                yield full, tensor, name not in module._non_persistent_buffers_set


def refuse_empty(model: nn.Module, loads: bool) -> None:
    """Raise if the model has tensors without values that are not loaded.

    Raises:
        AutoTPError: it names one, and what to do.
    """
    for name, tensor, is_stored in _all_named(model):
        if not tensor.is_meta or (is_stored and loads):
            continue
        if is_stored:
            raise AutoTPError(
                f"{name} is on the meta device: pass weights=, a checkpoint of which each rank reads its share, or "
                "load the model's weights (model.to_empty, load_state_dict) first"
            )
        raise AutoTPError(
            f"the buffer {name} is on the meta device and not persistent, so no checkpoint has it: make the model "
            "under autotp.empty_weights(), which leaves buffers what they are, in place of torch.device('meta')"
        )


def match_checkpoint(model: nn.Module, found: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """What to read, by the first names of a model's parameters and persistent buffers.

    Args:
        model: the model.
        found: what the checkpoint holds, by the model's names, or by those that transformers gives in files.

    As strict as ``load_state_dict``, but that one name of a tied weight suffices, and names of buffers that are not
    persistent do no harm.

    Raises:
        WeightsError: the checkpoint does not fit; it names what is missing, unexpected, or has another shape or kind.
    """
    found = with_model_names(model, found)
    names: dict[int, list[str]] = {}
    first: dict[int, torch.Tensor] = {}
    own = set()
    for name, tensor, is_stored in _all_named(model):
        if is_stored:
            names.setdefault(id(tensor), []).append(name)
            first.setdefault(id(tensor), tensor)
        own.add(name)
    sources: dict[str, TensorSource] = {}
    missing, wrong = [], []
    for key, tensor in first.items():
        there = [n for n in names[key] if n in found]
        if not there:
            missing.append(names[key][0])
            continue
        sources[names[key][0]] = found[there[-1]]  # the one that load_state_dict would take last
        for n in there:
            if found[n].shape != tuple(tensor.shape):
                wrong.append(f"{n} has shape {found[n].shape} there, {tuple(tensor.shape)} in the model")
            elif _kind(found[n].dtype) != _kind(tensor.dtype):
                wrong.append(f"{n} is of {found[n].dtype} there, of {tensor.dtype} in the model")
    unexpected = [n for n in found if n not in own]
    lists = {"missing": missing, "unexpected": unexpected, "different": wrong}
    if any(lists.values()):
        said = "\n".join(f"  {what}: {_some(each)}" for what, each in lists.items() if each)
        raise WeightsError(
            f"the weights do not fit this {type(model).__name__}:\n{said}\nNames are those of state_dict(). Pass the "
            "model's own checkpoint, or a mapping from the model's names to tensors"
        )
    return sources


def _kind(dtype: torch.dtype) -> str:
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "whole"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
