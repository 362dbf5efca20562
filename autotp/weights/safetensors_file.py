"""safetensors_file: where the tensors of a safetensors file lie.

The file begins with the length of a JSON text, then the text. That has each tensor's dtype and shape, and the offsets
of its first byte and of the byte after its last, counted from the text's end. Here it is read as strictly as the
safetensors library reads it: the tensors fill the file without gaps.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import torch

from autotp.errors import WeightsError
from autotp.weights.tensor_source import FileTensor, WeightFile, contiguous_strides
from autotp.weights.torch_save_file import MOST_HEADER

__all__ = ["safetensors_tensors", "saved_offsets"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
           "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}  # fmt: skip


class _DamagedError(ValueError):
    """The text does not describe the file."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _DamagedError(f"its header has {twice} twice")
    return found


def _no_constant(text: str) -> None:
    raise _DamagedError(f"its header has {text}")


def _header(file: WeightFile) -> tuple[dict[str, Any], int]:
    """The JSON text's content, and the offset of the byte after it."""
    with open(file.path, "rb") as opened:
        start = opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > file.size - 8:
            raise _DamagedError(f"its header would have {length} bytes, and the file has {file.size}")
        if length > MOST_HEADER:
            raise _DamagedError(f"its header has {length} bytes, more than {MOST_HEADER}")
        text = opened.read(length)
    if not text.startswith(b"{"):
        raise _DamagedError("its header is no JSON object")
    decoded = text.decode()
    header = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant)
    json.dumps([*header, header.get("__metadata__")], ensure_ascii=False).encode()  # raises where halves of signs stand
    return header, 8 + length


def _entry(file: WeightFile, name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """A tensor's shape and dtype, and its offsets."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _DamagedError(f"at {name} it has no dtype, shape and data_offsets")
    shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not isinstance(kind, str) or len(numbers) != len(shape) + 2:
        raise _DamagedError(f"at {name} it has no dtype, shape and data_offsets")
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
        raise _DamagedError(f"at {name} shape or data_offsets are no sizes")
    dtype = getattr(torch, _DTYPES.get(kind, ""), None)
    if dtype is None:
        raise WeightsError(
            f"weights: {name} in {file.path} is of {kind}, which torch has no dtype for; quantized weights are of such "
            "types: pass weights that are not quantized"
        )
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise _DamagedError(f"at {name} a shape of {shape} does not fill {end - start} bytes")
    return tuple(shape), dtype, start, end


def _read(file: WeightFile) -> tuple[dict[str, FileTensor], Any]:
    """The tensors, and what else the header says."""
    try:
        header, begin = _header(file)
        extra = header.pop("__metadata__", None)
        if extra is not None and not (isinstance(extra, dict) and all(isinstance(v, str) for v in extra.values())):
            raise _DamagedError("its __metadata__ is no mapping from texts to texts")
        entries = {name: _entry(file, name, entry) for name, entry in header.items()}
        expected = 0
        for name, (_, _, start, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if start != expected:
                raise _DamagedError(f"{name} does not begin where the tensor before it ends")
            expected = end
        if begin + expected != file.size:
            lengths = f"its tensors need {begin + expected} bytes, and the file has {file.size}"
            raise _DamagedError(f"{lengths}: it is cut short" if begin + expected > file.size else lengths)
    except (ValueError, RecursionError) as error:
        is_told = isinstance(error, _DamagedError)
        reason = str(error) if is_told else f"its header is no JSON text ({type(error).__name__})"
        raise WeightsError(
            f"weights: {file.path} is neither a safetensors file nor one that torch.save has written since torch 1.6, "
            f"or it is damaged: {reason}. Copy or save it again, or load it and pass the mapping from names to tensors"
        ) from None
    tensors = {
        name: FileTensor(shape, contiguous_strides(shape), dtype, file, begin + start)
        for name, (shape, dtype, start, _) in entries.items()
    }
    return tensors, extra


def safetensors_tensors(file: WeightFile) -> dict[str, FileTensor]:
    """The tensors of a safetensors file.

    Raises:
        WeightsError: it is none, or damaged; the message names the file, and the tensor if it is one's description.
    """
    return _read(file)[0]


def saved_offsets(file: WeightFile) -> dict[str, tuple[FileTensor, tuple[int, ...]]] | None:
    """The tensors of a file that ``HuggingFaceStorageWriter`` of torch.distributed.checkpoint wrote.

    Returns:
        For each name the part of a tensor that is in this file, and the index of the part's first element in the
        tensor. None if the file does not say that: it has whole tensors.

    Raises:
        WeightsError: the file is damaged.
    """
    tensors, extra = _read(file)
    if not extra or "DCP_SHARDING_INFO" not in extra:
        return None
    found = {}
    try:
        told = json.loads(extra["DCP_SHARDING_INFO"])
        for name, tensor in tensors.items():
            offsets = tuple(told[name]["saved_offsets"])
            if len(offsets) != len(tensor.shape) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in offsets):
                raise ValueError
            found[name] = tensor, offsets
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"weights: {file.path} says wrongly which parts of tensors it has: save it again") from None
    return found
