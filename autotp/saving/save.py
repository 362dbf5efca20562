"""save: write a checkpoint of the dense model from a parallelized one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from autotp.runtime.graph_runtime import runtime_of
from autotp.saving.dense_tensors import dense_tensors
from autotp.saving.pretrained import SavePretrained, has_save_pretrained
from autotp.saving.weight_file import DenseTensor, WeightFile, index_of, parse_size, split_by_size
from autotp.saving.write_checkpoint import write_checkpoint

__all__ = ["save"]


def save(model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Write a checkpoint of the dense model into a folder. Collective: all ranks must call it.

    The files are those that the dense model's ``save_pretrained`` writes, to the byte: safetensors with their index,
    config, and generation config. ``from_pretrained`` and ``parallelize(weights=folder)`` read them, at any number of
    ranks. Of any other ``nn.Module`` the safetensors and the index are written, under the names of its state dict; of
    tied weights the name that is first in the alphabet.

    No rank gathers anything: each writes the bytes of the tensors that it holds, and what several ranks hold is written
    once. The folder is written beside the old one, and takes its place when all ranks have written; other files in it
    stay. So a process that dies leaves the old checkpoint or the new one, and the next save removes what is left. Where
    the operating system cannot exchange two folders at once (it can on Linux, on most local file systems), the old
    folder is called ``.folder.saving-old`` for a moment. Files are not flushed to the disk: a machine that loses power
    may lose them.

    With several groups of ranks that hold the same model (data parallelism), the first group writes. The others, if
    they call it, wait for it. A model of peft is saved as its ``save_pretrained`` does it: the adapters only.

    Args:
        model: a parallelized model.
        folder: a folder on a file system that all ranks share; it need not exist.
        max_shard_size: the most bytes of tensors in a file, or a text such as ``"5GB"``. A larger tensor has a file of
            its own.

    Raises:
        AutoTPError: the model is not parallelized; or another rank has failed.
        WeightsError: the folder cannot be written (the disk is full, another process saves to it), or a rank does not
            see it. The old checkpoint is as it was.
        MismatchError: some ranks do not call it within the timeout, or pass another folder.
        ValueError: ``max_shard_size`` is no size.

    Example:
        >>> autotp.save(model, "checkpoint")
        >>> AutoModelForCausalLM.from_pretrained("checkpoint")  # in any process, without autotp
    """
    runtime = runtime_of(model)
    most = parse_size(max_shard_size)
    if has_save_pretrained(model):
        SavePretrained(model)(folder, max_shard_size=most)
        return

    def describe(path: Path) -> Sequence[WeightFile]:
        tensors, tied = _untied(model)
        files = [
            replace(f, metadata={**f.metadata, **{n: kept for n, kept in tied.items() if kept in f.keys}})
            for f in split_by_size(tensors, most)
        ]
        if len(files) > 1:
            (path / "model.safetensors.index.json").write_text(index_of(files))
        return files

    write_checkpoint(runtime, folder, describe, {"max_shard_size": str(most)})


def _untied(model: nn.Module) -> tuple[list[DenseTensor], dict[str, str]]:
    """The tensors of the state dict, of tied ones that with the first name in the alphabet; and the name of that one
    for each name left out, as safetensors' ``save_model`` notes them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    tied = {name: min(group) for group in names.values() for name in group if name != min(group)}
    return [t for t in dense_tensors(model) if t.key not in tied], tied
