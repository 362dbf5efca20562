"""foreign_formats: name the formats of weights that cannot be read, so that a message can say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["ZIP", "format_of_file", "format_of_names"]

ZIP = b"PK\x03\x04"
"""How a zip archive begins."""

_BEGINNINGS = {
    b"GGUF": "a GGUF file, as llama.cpp reads them: its weights are mostly quantized",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as TensorFlow and Keras write them",
    b"\x93NUMPY": "a .npy file of numpy",
    b"\x80\x02\x8a\x0a": "a pickle, as torch.save wrote them before torch 1.6",
}
_EXTENSIONS = {
    ".gguf": "a GGUF file, as llama.cpp reads them",
    ".h5": "an HDF5 file, as TensorFlow and Keras write them",
    ".keras": "an archive of Keras",
    ".msgpack": "a msgpack file, as Flax writes them",
    ".npz": "an .npz archive of numpy",
    ".npy": "a .npy file of numpy",
    ".onnx": "an ONNX file",
    ".index": "a TensorFlow checkpoint",
    ".ckpt": "a checkpoint of TensorFlow or Lightning",
}
_QUANTIZED = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|SCB|weight_format)$": "bitsandbytes",
    r"\.(weight_scale_inv|weight_scale|input_scale|activation_scale|scale_inv)$": "fp8 with scales",
    r"\.(weight_packed|weight_zero_point|weight_shape|weight_g_idx)$": "compressed-tensors",
    r"_blocks$": "mxfp4",
    r"\.(_packed_params.*|zero_point|_data|_scale)$": "torch's or quanto's own quantization",
}
"""For each kind of quantization the ends of the names that its checkpoints have beside those of a model."""


def format_of_file(path: Path) -> str | None:
    """The format of a file that cannot be read, by its first bytes or else its extension; None for any other file."""
    with open(path, "rb") as file:
        begin = file.read(1024)
    for start, text in _BEGINNINGS.items():
        if begin.startswith(start):
            return text
    if begin.startswith(ZIP) and b".npy" in begin[:512]:
        return _EXTENSIONS[".npz"]
    if begin.startswith(ZIP) and path.suffix not in (".npz", ".keras"):
        return None
    return _EXTENSIONS.get(path.suffix)


def format_of_names(names: Iterable[str]) -> tuple[str, list[str]] | None:
    """A kind of quantization, and the names that show it, among names that a checkpoint has and the model lacks."""
    names = list(names)
    for pattern, kind in _QUANTIZED.items():
        if found := [name for name in names if re.search(pattern, name)]:
            return kind, found
    return None
