"""torch_save_file: where the tensors lie that ``torch.save`` has written.

Such a file is a zip archive, not compressed: a pickle that describes the tensors, and each storage's bytes. The pickle
is read without running anything that it names.
"""

from __future__ import annotations

import io
import itertools
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autotp.errors import WeightsError
from autotp.weights.foreign_formats import ZIP
from autotp.weights.inert_pickle import Global, Made, unpickle
from autotp.weights.tensor_source import FileTensor, WeightFile

__all__ = ["MOST_HEADER", "read_saved", "state_dict_tensors"]

MOST_HEADER = 100_000_000
"""The most bytes of a description of tensors: it is held in memory. The safetensors library has the same bound."""
_ITEM = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
         "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
         "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
         "BoolStorage": torch.bool, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
         "ComplexFloatStorage": torch.complex64}  # fmt: skip
"""The dtypes of storages, by the names of their classes."""


_AFTER = (0, 12, 16, 20, 24)
"""How many bytes may stand between an entry's content and the next entry: its checksum and sizes once more."""


class Part(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a position."""
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise ValueError("a position before the start")
        self._at = at
        return at

    def readinto(self, out: Any) -> int:
        """Fill memory with the next bytes, and return their number."""
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(out)[: max(self._length - self._at, 0)]) or 0
        self._at += count
        return count

    def read(self, count: int | None = -1) -> bytes:
        """The next bytes."""
        rest = max(self._length - self._at, 0)
        return super().read(rest if count is None or count < 0 else min(count, rest)) or b""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    nbytes: int


class _Archive:
    """A zip archive in a part of a file, and where its entries lie."""

    def __init__(self, file: WeightFile, part: Part, start: int, length: int) -> None:
        self.file, self._part, self._start, self._length = file, part, start, length
        opened = zipfile.ZipFile(part)
        entries = opened.infolist()
        starts = [*sorted(entry.header_offset for entry in entries), opened.start_dir]
        self._next = dict(itertools.pairwise(starts))
        self._entries = {entry.filename: entry for entry in entries}
        pickles = [n for n in self._entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(self._entries) != len(entries) or len(pickles) != 1:
            raise ValueError("it has not one description of tensors but several, or none")
        self._root = pickles[0].removesuffix("data.pkl")
        if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
            raise ValueError("it is compressed")
        if self.has("byteorder") and self.content("byteorder") != sys.byteorder.encode():
            raise ValueError("its numbers are in another order of bytes than this machine's")

    def has(self, name: str) -> bool:
        """Whether there is an entry."""
        return self._root + name in self._entries

    def content(self, name: str) -> bytes:
        """An entry's bytes."""
        at, count = self.place(name)
        if count > MOST_HEADER:
            raise ValueError(f"{name} has {count} bytes, more than {MOST_HEADER}")
        self._part.seek(at)
        data, expected = self._part.read(count), self._entries[self._root + name].CRC
        if expected not in (0, zlib.crc32(data)):  # 0: saved without checksums
            raise ValueError(f"the checksum of {name} is another than its content's")
        return data

    def place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes start in the archive, and their number."""
        entry = self._entries.get(self._root + name)
        if entry is None:
            raise ValueError(f"{name} is missing in it")
        self._part.seek(entry.header_offset)
        header = self._part.read(30)
        lengths = [int.from_bytes(header[i : i + 2], "little") for i in (26, 28)]
        at = entry.header_offset + 30 + sum(lengths)
        is_named = header.startswith(ZIP) and self._part.read(lengths[0]) == entry.orig_filename.encode()
        if not is_named or self._next[entry.header_offset] - at - entry.file_size not in _AFTER:
            raise ValueError(f"{name} is not where its table of contents says")
        if at + entry.file_size > self._length:
            raise ValueError("it is cut short")
        return at, entry.file_size

    def storage(self, mark: Any) -> _Storage:
        """A storage that the pickle names."""
        kind, cls, key, _, count = mark
        dtype = _ITEM.get(cls.name.rpartition(".")[2]) if isinstance(cls, Global) else None
        if kind != "storage" or dtype is None:
            raise ValueError(f"it has numbers of a kind that cannot be read: {cls}")
        if not _are_sizes([count]):
            raise ValueError(f"a storage of {count} numbers")
        return _Storage(str(key), dtype, count * dtype.itemsize)

    def tensor(
        self, storage: _Storage, first: int, size: Sequence[int], stride: Sequence[int],
        dtype: torch.dtype | None, special: Any,
    ) -> FileTensor | Made:  # fmt: skip
        """A tensor of a storage."""
        if special:
            return Made("a conjugated or negated tensor", ())
        dtype = dtype or storage.dtype
        if not _are_sizes([first, *size, *stride]) or len(size) != len(stride):
            raise ValueError(f"a tensor of size {size} and stride {stride}")
        last = first + sum((n - 1) * s for n, s in zip(size, stride)) + 1 if 0 not in size else 0
        at, count = self.place(f"data/{storage.key}")
        if last * dtype.itemsize > min(storage.nbytes, count):
            raise ValueError(f"a tensor of size {tuple(size)} has more numbers than its storage")
        at += self._start + first * dtype.itemsize
        return FileTensor(tuple(size), tuple(stride), dtype, self.file, at)


def _are_sizes(numbers: Sequence[Any]) -> bool:
    return all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)


def read_saved(file: WeightFile, start: int = 0, length: int | None = None) -> Any:
    """What ``torch.save`` has written to a file, or a part of it, with a :class:`FileTensor` for each plain tensor.

    Args:
        file: the file.
        start: the first byte.
        length: the number of bytes; None: all.

    Raises:
        WeightsError: it cannot be read; the message names the file and the reason.
    """
    length = file.size - start if length is None else length
    try:
        with open(file.path, "rb", buffering=0) as opened:
            archive = _Archive(file, Part(opened, start, length), start, length)
            return unpickle(archive.content("data.pkl"), _known(archive), persistent=archive.storage)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"weights: torch.save has not written {file.path}, or it is damaged: {reason}") from error


def _known(archive: _Archive) -> dict[str, Callable[..., Any]]:
    """The functions with which torch makes plain tensors again; here they tell where each lies."""

    def rebuilt(storage: Any, first: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, special: Any = None) -> Any:
        return archive.tensor(storage, first, size, stride, None, special)

    def rebuilt_as(
        storage: Any, first: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, special: Any = None
    ) -> Any:
        return archive.tensor(storage, first, size, stride, dtype, special)

    def typed(function: Any, cls: Any, args: Any, _state: Any) -> Any:
        name = getattr(cls, "name", str(cls))
        make = known.get(getattr(function, "name", ""))
        if name not in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter") or make is None:
            return Made(name, ())
        return make(*args)

    known: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor_v2": rebuilt,
        "torch._utils._rebuild_tensor_v3": rebuilt_as,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": typed,
    }
    return known


def _kind(value: Any) -> str:
    return value.maker if isinstance(value, Made) else type(value).__name__


def state_dict_tensors(file: WeightFile) -> dict[str, FileTensor]:
    """The tensors of a state dict that ``torch.save`` wrote.

    Raises:
        WeightsError: it cannot be read, or has entries that are no plain tensors; the message names file and entries.
    """
    state = read_saved(file)
    if not isinstance(state, dict):
        raise WeightsError(f"weights: {file.path} holds a {_kind(state)}, not a state dict")
    others = {str(n): _kind(t) for n, t in state.items() if not isinstance(t, FileTensor) or not isinstance(n, str)}
    own = [f"{name} ({kind})" for name, kind in others.items() if kind.startswith("autotp.")]
    if own:
        raise WeightsError(
            f"weights: {file.path} holds one rank's shards, which are no plain tensors: {', '.join(own[:8])}. Save "
            "what autotp.full_state_dict(model) returns"
        )
    if others:
        entries = ", ".join([f"{name} ({kind})" for name, kind in others.items()][:8])
        raise WeightsError(
            f"weights: {file.path} has entries that are no plain tensors: {entries}. Pass the mapping from names to "
            "tensors that is in it, as torch.load(..., mmap=True) returns it"
        )
    return state
