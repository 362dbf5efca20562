"""weight_file: where in a safetensors file each tensor of the dense model lies, before any of them is written.

The format: the length of a JSON text in 8 bytes, the text, then the tensors' bytes. The text has each tensor's dtype,
shape, and the offsets of its first byte and of the byte after its last, counted from the text's end
(https://github.com/huggingface/safetensors#format). Tensors are in the order in which the safetensors library writes
them, so that files are equal to those of the dense model to the byte.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from autotp.errors import WeightsError

__all__ = ["DenseTensor", "WeightFile", "index_of", "parse_size", "split_by_size"]

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
"""The format's names of dtypes. The library writes tensors of later ones first."""
_ORDER = {dtype: i for i, dtype in enumerate(_DTYPES)}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of a checkpoint: its name there, and which of the model's tensors it is.

    Attributes:
        key: the name in the file.
        source: the name in the model's state dict.
        shape: the dense shape.
        dtype: the dtype.
    """

    key: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFile:
    """A file of a checkpoint.

    Attributes:
        name: the file's name in the folder.
        tensors: its tensors.
        metadata: texts that go into the file, by name.
    """

    name: str
    tensors: tuple[DenseTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The tensors' names in the file."""
        return {t.key for t in self.tensors}

    @cached_property
    def ordered(self) -> list[DenseTensor]:
        """The tensors as they follow each other in the file.

        Raises:
            WeightsError: the format has no name for a tensor's dtype.
        """
        for tensor in self.tensors:
            if tensor.dtype not in _DTYPES:
                raise WeightsError(f"{tensor.source} is of {tensor.dtype}, which a safetensors file cannot hold")
        return sorted(self.tensors, key=lambda t: (-_ORDER[t.dtype], t.key))

    @cached_property
    def header(self) -> bytes:
        """The bytes before the tensors'."""
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        start = 0
        for t in self.ordered:
            offsets = [start, start + t.nbytes]
            entries[t.key] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
            start += t.nbytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The position of each tensor's first byte in the file, by its name there."""
        offsets, position = {}, len(self.header)
        for t in self.ordered:
            offsets[t.key] = position
            position += t.nbytes
        return offsets

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def parse_size(size: int | str) -> int:
    """A number of bytes, which may be a text such as ``"5GB"``.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", size.upper()) if isinstance(size, str) else None
    count = int(float(match[1]) * _UNITS[match[2].removesuffix("B")]) if match is not None else 0
    if not count:
        raise ValueError(f'max_shard_size is a number of bytes or a text such as "5GB", not {size!r}')
    return count


def split_by_size(tensors: Sequence[DenseTensor], most: int) -> list[WeightFile]:
    """Files of ``most`` bytes of tensors at most; a larger tensor has a file of its own.

    The rule and the names are those of transformers.
    """
    groups: list[list[DenseTensor]] = []
    current: list[DenseTensor] = []
    for tensor in tensors:
        if tensor.nbytes > most:
            groups.append([tensor])
            continue
        if current and sum(t.nbytes for t in current) + tensor.nbytes > most:
            groups.append(current)
            current = []
        current.append(tensor)
    groups += [current] if current or not groups else []
    if len(groups) == 1:
        return [WeightFile("model.safetensors", tuple(groups[0]), {"format": "pt"})]
    return [
        WeightFile(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group), {"format": "pt"})
        for i, group in enumerate(groups, 1)
    ]


def index_of(files: Sequence[WeightFile]) -> str:
    """The text of ``model.safetensors.index.json``, which says in which file each tensor is."""
    size = sum(t.nbytes for file in files for t in file.tensors)
    parameters = sum(math.prod(t.shape) for file in files for t in file.tensors)
    weight_map = {t.key: file.name for file in files for t in file.tensors}
    metadata = {"total_parameters": parameters, "total_size": size}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
