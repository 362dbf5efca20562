"""Work on real processes: training states of torch.distributed.checkpoint, and files that cannot be read."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import autotp
from autotp.verification.measure import Float64
from autotp.weights import load_checkpoint, tensor_source
from autotp.weights.checkpoint import open_checkpoint
from tests.comparison import apart, raised
from tests.models import make
from tests.weights.ranks import CountingReader, Result, Table


def distributed(state: dict[str, torch.Tensor], world: int) -> dict[str, Any]:
    """A state dict whose tensors are split over the ranks in several ways, unevenly too, or not."""
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    for i, (name, tensor) in enumerate(state.items()):
        dim = tensor.dim() - 1 if i % 2 else 0
        placement = Replicate() if i % 5 == 4 or not tensor.dim() else Shard(dim)
        found[name] = tensor if i % 7 == 6 else distribute_tensor(tensor, mesh, [placement])
    return found


def _loaded(dense: nn.Module, kwargs: dict[str, Any], world: int, folder: Path) -> Result:
    """What a model is after it was loaded from a folder."""
    with autotp.empty_weights():
        model, _ = make("llama")
    model.to(dense.dtype)
    CountingReader.count = 0
    autotp.parallelize(model, world, example_inputs=kwargs, weights=folder)
    full, state = autotp.full_state_dict(model), dense.state_dict()
    return {
        "equal": all(torch.equal(full[n], state[n]) for n in state),
        "apart": apart(dense, model, **kwargs),
        "read": CountingReader.count / sum(p.nbytes for p in model.parameters()),
        "share": sum(p.nbytes for p in model.parameters()) / sum(p.nbytes for p in dense.parameters()),
    }


def training_states(rank: int, world: int, folder: Path) -> Result:
    """Saved by as many ranks as load, in two dtypes."""
    found: Result = {}
    tensor_source.PIECE, tensor_source.ROW = 2048, 64
    load_checkpoint.Reader = CountingReader  # type: ignore[misc]
    for dtype in (torch.float64, torch.bfloat16):
        with Float64():
            dense, kwargs = make("llama")
        dense.to(dtype)
        parts = distributed(dense.state_dict(), world)
        whole = {"model": parts, "optim": {"state": {n: {"exp_avg": t} for n, t in parts.items()}}, "step": 3}
        own = {
            n: distribute_tensor(t, init_device_mesh("cpu", (world,)), [Shard(0)])
            for n, t in dense.state_dict().items()
        }
        ways: dict[str, Callable[[Path], object]] = {
            "under model": lambda path, whole=whole: dcp.save(whole, checkpoint_id=path),
            "plain": lambda path, parts=parts: dcp.save(dict(parts), checkpoint_id=path),
            "hf parts": lambda path, own=own: dcp.save(
                dict(own), storage_writer=HuggingFaceStorageWriter(path, save_distributed=True)
            ),
            "hf joined": lambda path, own=own: dcp.save(
                dict(own),
                storage_writer=HuggingFaceStorageWriter(path, save_distributed=True, enable_consolidation=True),
            ),
        }
        for name, save in ways.items():
            path = folder / f"{name} {dtype}"
            save(path)
            dist.barrier()
            with Float64() if dtype is torch.float64 else contextlib.nullcontext():
                found[f"{name} {dtype}"] = _loaded(dense, kwargs, world, path)
        path = folder / f"plain {dtype}"
        if rank == 0:
            _change_a_number(path)
        dist.barrier()
        with Float64() if dtype is torch.float64 else contextlib.nullcontext():
            found[f"control {dtype}"] = _loaded(dense, kwargs, world, path)
    return found


def pretrained(rank: int, world: int, folder: Path) -> Result:
    """The README's recipe, against the model that transformers loads."""
    import transformers

    dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with autotp.empty_weights():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found: Result = {"empty": all(p.is_meta for p in model.parameters())}
    autotp.parallelize(model, world, weights=folder)
    full, state, ids = autotp.full_state_dict(model), dense.state_dict(), torch.arange(8)[None]
    return found | {
        "equal": list(full) == list(state) and all(torch.equal(full[n], t) for n, t in state.items()),
        "buffers": all(torch.equal(b, dict(dense.named_buffers())[n]) for n, b in model.named_buffers()),
        "dtype": (model.dtype, {p.dtype for p in model.parameters()}),
        "training": any(m.training for m in model.modules()),
        "generation": model.generation_config.to_dict() == dense.generation_config.to_dict(),
        "eos": model.generation_config.eos_token_id,
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "apart": apart(dense, model, input_ids=ids, use_cache=False),
        "generated": model.generate(ids, max_new_tokens=4).shape,
    }


def _change_a_number(path: Path) -> None:
    """Write another number into a part of the folder."""
    chunk = open_checkpoint(path)["model.layers.1.mlp.down_proj.weight"].chunks[0]  # type: ignore[attr-defined]
    with open(chunk.tensor.file.path, "r+b") as file:
        file.seek(chunk.tensor.offset)
        file.write(b"\x11" * 8)


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def header_of(content: dict[str, Any] | bytes, length: int | None = None, data: bytes = b"\0" * 8) -> bytes:
    """A safetensors file."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(start: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


NAMES = "up.weight", "up.bias", "scale", "down.weight", "down.bias"

HEADERS: dict[str, tuple[bytes, str]] = {
    "length beyond the file": (header_of({"a": _entry()}, 1 << 20), "its header would have 1048576 bytes"),
    "huge length": (header_of({"a": _entry()}, 1 << 62), "its header would have"),
    "no header": (b"\1\2", "its header would have"),
    "negative offset": (header_of({"a": _entry(-8, 0)}), "at a shape or data_offsets are no sizes"),
    "overlapping": (header_of({"a": _entry(), "b": _entry()}), "b does not begin where the tensor before it ends"),
    "gap": (header_of({"a": _entry(4, 12)}, data=b"\0" * 12), "a does not begin where"),
    "wrong shape": (header_of({"a": _entry(shape=(3,))}), "at a a shape of [3] does not fill 8 bytes"),
    "shape of truths": (header_of({"a": _entry(shape=(True, 2))}), "at a shape or data_offsets are no sizes"),
    "huge shape": (header_of({"a": _entry(shape=(1 << 70, 0))}), "at a shape or data_offsets are no sizes"),
    "twice": (header_of(b'{"a":%b,"a":%b}' % ((json.dumps(_entry()).encode(),) * 2)), "its header has a twice"),
    "no json": (header_of(b"{'a': 1}"), "its header is no JSON text"),
    "no object": (header_of(b"[1, 2]"), "its header is no JSON object"),
    "nesting": (header_of(b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}"), "its header is no JSON text (Recursion"),
    "dtype": (header_of({"a": _entry(dtype="F4")}), "a in "),
    "an entry too few": (header_of({"a": {"dtype": "F32", "shape": [2]}}), "at a it has no dtype, shape and"),
    "too long": (header_of({"a": _entry()}, data=b"\0" * 9), "its tensors need"),
    "gguf": (b"GGUF\3\0\0\0" + b"\0" * 64, "is a GGUF file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 64, "is an HDF5 file"),
}  # fmt: skip
"""Files that are damaged, or of other formats, and what is said of them."""


def _saved_as_distributed(path: Path, state: dict[str, Any]) -> Path:
    if path.exists():
        shutil.rmtree(path)
    dcp.save({"model": state, "step": 3}, checkpoint_id=path, no_dist=True)
    return path


def _with_metadata(path: Path, change: Callable[[Any], None]) -> Path:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def _info(metadata: Any, **fields: Any) -> None:
    index = next(i for i in metadata.storage_data if i.fqn == "model.up.weight")
    metadata.storage_data[index].__dict__.update(fields)


def _chunk(metadata: Any, **fields: Any) -> None:
    metadata.state_dict_metadata["model.up.weight"].chunks[0].__dict__.update(fields)


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-400])
    return path


def _written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def _numpy(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", b"\x93NUMPY")
    return path


def _folder_of(path: Path, name: str) -> Path:
    _written(path / name, "x")
    return path


def _index(path: Path, content: Any) -> Path:
    return _written(path / "model.safetensors.index.json", json.dumps(content)).parent


def bad_sources(at: Path, state: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Weights that cannot be read, made in an empty folder, and a part of what is said of each."""
    from safetensors.torch import save_file

    at.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[Any, str]] = {n: (_written(at / n, text), said) for n, (text, said) in HEADERS.items()}
    save_file(state, at / "cut.safetensors")
    torch.save(state, at / "cut.pt")
    torch.save({**state, "evil": Evil(at / "ran")}, at / "evil.pt")
    torch.save(Evil(at / "ran"), at / "evil whole.pt")

    def dcp_with(name: str, change: Callable[[Any], None]) -> Path:
        return _with_metadata(_saved_as_distributed(at / name, state), change)

    cut, gone, evil, no_metadata = (
        _saved_as_distributed(at / name, state) for name in ("dcp cut", "dcp gone", "dcp evil", "dcp cut metadata")
    )
    _cut(cut / "__0_0.distcp")
    (gone / "__0_0.distcp").unlink()
    _written(evil / ".metadata", pickle.dumps(Evil(at / "ran")))
    _cut(no_metadata / ".metadata")
    quantized = {n: t for n, t in state.items() if n != "up.weight"}
    found |= {
        "short safetensors": (_cut(at / "cut.safetensors"), "it is cut short"),
        "short pt": (_cut(at / "cut.pt"), "torch.save has not written"),
        "evil pt": (at / "evil.pt", "no plain tensors: evil (posix.system)"),
        "evil whole pt": (at / "evil whole.pt", "holds a posix.system, not a state dict"),
        "dcp cut": (cut, "__0_0.distcp ends before model."),
        "dcp gone": (gone, "(for model."),
        "dcp evil": (evil, "names posix.system, which is nothing that torch.distributed.checkpoint writes"),
        "dcp cut metadata": (no_metadata, ".metadata is no description of a checkpoint"),
        "dcp outside": (dcp_with("dcp out", lambda m: _info(m, relative_path="../x")), "up.weight) names ../x"),
        "dcp absolute": (dcp_with("dcp abs", lambda m: _info(m, relative_path="/x")), "outside of its folder"),
        "dcp other place": (dcp_with("dcp off", lambda m: _info(m, offset=3)), "has at 3 no part of model.up.weight"),
        "dcp extension": (dcp_with("dcp ext", lambda m: _info(m, transform_descriptors=["zstd"])), "['zstd']"),
        "dcp gap": (dcp_with("dcp gap", lambda m: _chunk(m, sizes=torch.Size([31, 16]))), "the parts of model.up."),
        "dcp beyond": (dcp_with("dcp off2", lambda m: _chunk(m, offsets=torch.Size([1, 0]))), "model.up.weight"),
        "index outside": (_index(at / "i1", {"weight_map": {"a": "../cut.safetensors"}}), "outside of its folder"),
        "index absolute": (_index(at / "i2", {"weight_map": {"a": str(at / "cut.pt")}}), "outside of its folder"),
        "index of a list": (_index(at / "i3", {"weight_map": [1, 2]}), "it has no weight_map"),
        "index of numbers": (_index(at / "i4", {"weight_map": {"a": 3}}), "(for a) names 3, which is no name"),
        "index of lists": (_index(at / "i5", {"weight_map": {"a": ["b"]}}), "(for a) names ['b']"),
        "index is a list": (_index(at / "i6", [1]), "it has no weight_map"),
        "gptq": ({**quantized, "up.qweight": torch.ones(1), "up.g_idx": torch.ones(1)}, "(GPTQ or AWQ), as up.q"),
        "bitsandbytes": ({**state, "up.weight.absmax": torch.ones(1)}, "quantized (bitsandbytes), as up.weight.absmax"),
        "fp8": ({**state, "up.weight_scale_inv": torch.ones(1)}, "quantized (fp8 with scales), as up.weight_scale_inv"),
        "npz": (_numpy(at / "weights.npz"), "is an .npz archive of numpy"),
        "keras folder": (_folder_of(at / "tf", "tf_model.h5"), "One of these is an HDF5 file"),
        "flax folder": (_folder_of(at / "flax", "flax_model.msgpack"), "One of these is a msgpack file"),
        "nothing": (_folder_of(at / "empty", "x/y"), "but x: pass the file"),
    }  # fmt: skip
    return found


def bad_files(rank: int, world: int, folder: Path) -> Result:
    """For each bad source, which the last rank is given and the others not, what is raised, and what the model is."""
    x, found = torch.ones(3, 16), {}
    torch.manual_seed(0)
    state = Table().state_dict()
    model = Table()
    expected, before = model(x), {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}

    def load(weights: Any) -> str:
        said = raised(lambda: autotp.parallelize(model, world, example_inputs=(x,), weights=weights))
        now = model.state_dict(keep_vars=True)
        same = all(now[n] is t and torch.equal(t, values) for n, (t, values) in before.items())
        dense = "_autotp" not in model.__dict__ and torch.equal(model(x), expected)
        return said if same and dense else f"changed: {said}"

    last = rank == world - 1
    sources = bad_sources(folder / str(rank), state)
    for name, (weights, _) in sources.items():
        found[name] = load(weights if last else state)
    found["ran"] = (folder / str(rank) / "ran").exists()
    found |= while_read(folder / f"{rank} read", state, load, last)
    found["control"] = load(state)
    return found


def while_read(at: Path, state: dict[str, Any], load: Callable[[Any], str], last: bool) -> Result:
    """Files that change after the first look at them, on the last rank only."""
    from safetensors.torch import save_file

    at.mkdir()
    found: Result = {}
    read_shards = autotp.parallel.read_shards

    def after(
        name: str, change: Callable[[Path], object], file: str, made: Callable[[Path], Any] | None = None
    ) -> None:
        path = at / f"{name} {file}"
        (made or (lambda p: torch.save(state, p) if file == "pt" else save_file(state, p)))(path)

        def first_change(*args: Any) -> Any:
            if last:
                change(path)
            return read_shards(*args)

        autotp.parallel.read_shards = first_change
        try:
            found[f"{name} {file}"] = load(path)
        finally:
            autotp.parallel.read_shards = read_shards

    for file in ("safetensors", "pt"):
        after("vanished", lambda p: p.unlink(), file)
        after("cut", lambda p: os.truncate(p, p.stat().st_size - 40), file)
        after("rewritten", lambda p: os.utime(p, (1, 1)), file)
    after("cut", lambda p: os.truncate(p / "__0_0.distcp", 3000), "dcp", lambda p: _saved_as_distributed(p, state))

    real, done = tensor_source.Reader.fill, []

    def growing(self: Any, file: Any, offset: int, out: torch.Tensor) -> None:
        real(self, file, offset, out)
        if last and out.numel() > 512:
            done.append(file.path.write_bytes(file.path.read_bytes() + b"more"))

    tensor_source.Reader.fill = growing  # type: ignore[method-assign]
    try:
        after("grows while it is read", lambda p: None, "safetensors")
    finally:
        tensor_source.Reader.fill = real  # type: ignore[method-assign]
    return found
