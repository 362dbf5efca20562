"""Work on real processes: checkpoints that all ranks write, compared with the dense model's byte by byte."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_model
from torch import nn

import autotp
from autotp.verification.measure import Float64
from tests.models import IDS, Grouped, make

Result = dict[str, Any]


def falcon() -> nn.Module:
    """Fused projections of groups: two key-value heads, each with two query heads."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_kv_heads=2,
            new_decoder_architecture=True, ffn_hidden_size=67,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    """A model that transformers saves, with biases, and without ``generate``."""
    return make("bert", 1, 9)[0]


class Mixed(Grouped):
    """A model of several dtypes: norms in float32, weights in bfloat16, and persistent buffers."""

    def __init__(self) -> None:
        super().__init__(3)
        self.bfloat16()
        self.norm.float()
        self.out.half()
        self.frozen = nn.Parameter(torch.randn(7, 3), requires_grad=False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids).float())
        h = x.bfloat16()
        return self.head(h + self.v(h).repeat(1, 1, 2) + self.out(x.half()).bfloat16())


class Transposed(Grouped):
    """Parameters that are stored transposed, in a mapped file, and frozen."""

    def __init__(self) -> None:
        super().__init__(2)
        for layer in (self.q, self.out, self.head):
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=layer is not self.q)


class Tied(Grouped):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__(2)
        self.head.weight = self.embed.weight


def model_of(name: str) -> tuple[nn.Module, Any]:
    """A model and inputs to capture it with."""
    plain = {"grouped": lambda: Grouped(2), "mixed": Mixed, "transposed": Transposed, "tied": Tied}
    if name in plain:
        torch.manual_seed(0)
        return plain[name](), (IDS,)
    if name == "falcon":
        return falcon(), {"input_ids": IDS, "use_cache": False}
    return make(name, 1, 9)


LIBRARY = ("llama", "gpt2", "neox", "bloom", "bert", "falcon")
PLAIN = ("grouped", "mixed", "transposed", "tied", "gpt", "encoder")
SIZES: tuple[int | str, ...] = ("5GB", "60KB")


def parallel(name: str, world: int, dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
    model, inputs = model_of(name)
    model = model.to(dtype) if dtype is not None else model
    is_float64 = next(model.parameters()).dtype == torch.float64
    with Float64() if is_float64 else contextlib.nullcontext():
        return autotp.parallelize(model, world, example_inputs=inputs, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def differing(expected: Path, found: Path) -> list[str]:
    a, b = files_of(expected), files_of(found)
    return sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))


def once(rank: int, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Let rank 0 write, and the others wait for it."""
    if rank == 0:
        write(*args, **kwargs)
    dist.barrier()


def same_bytes(rank: int, world: int, folder: Path, names: tuple[str, ...], dtypes: tuple[str | None, ...]) -> Result:
    """For each model, dtype and size of files: which files differ from the dense model's."""
    result: Result = {}
    for name in names:
        for dtype in dtypes:
            model = parallel(name, world, getattr(torch, dtype) if dtype else None)
            dense = model_of(name)[0]
            dense = dense.to(getattr(torch, dtype)) if dtype else dense
            for size in SIZES:
                case = f"{name} {dtype} {size}"
                expected, found = folder / f"dense {case}", folder / f"autotp {case}"
                once(rank, dense.save_pretrained, expected, max_shard_size=size)
                autotp.save(model, found, max_shard_size=size)
                result[case] = differing(expected, found)
                model.save_pretrained(found, max_shard_size=size)
                result[f"{case}, again, by save_pretrained"] = differing(expected, found)
    return result


def same_plain_bytes(rank: int, world: int, folder: Path, names: tuple[str, ...]) -> Result:
    """For each model that no library saves: whether the file is safetensors', and tensors are equal in several."""
    result: Result = {}
    for name in names:
        model, dense = parallel(name, world), model_of(name)[0]
        once(rank, save_model, dense, str(folder / f"{name}.safetensors"), metadata={"format": "pt"})
        autotp.save(model, folder / name)
        expected, found = (
            (folder / f"{name}.safetensors").read_bytes(),
            (folder / name / "model.safetensors").read_bytes(),
        )
        result[name] = _without_metadata(expected) == _without_metadata(found)
        autotp.save(model, folder / name, max_shard_size="20KB")
        index = json.loads((folder / name / "model.safetensors.index.json").read_text())
        result[f"{name}: files"] = (len(list((folder / name).iterdir())) - 1, len(set(index["weight_map"].values())))
        tensors = {n: x for path in (folder / name).glob("*.safetensors") for n, x in load_file(path).items()}
        state = dense.state_dict()
        result[f"{name}: several files"] = [n for n, x in tensors.items() if not torch.equal(x, state[n])]
        result[f"{name}: in the index"] = tensors.keys() == index["weight_map"].keys()
        again = parallel(name, world, weights=folder / name)
        full = autotp.full_state_dict(again)
        result[f"{name}: read back"] = [n for n, x in state.items() if not torch.equal(full[n], x)]
    return result


def _without_metadata(data: bytes) -> tuple[Any, bytes]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return sorted(header.pop("__metadata__").items()), json.dumps(header).encode() + data[8 + length :]


def _peak(call: Callable[[], Any]) -> int:
    """By how many bytes a call has raised the most memory that the process ever had, as the system counts it."""
    Path("/proc/self/clear_refs").write_text("5")  # the most is what it has now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) << 10


def memory(rank: int, world: int, folder: Path) -> Result:
    """The most memory that a save takes beside the shards, of which some are not contiguous."""
    model = nn.Sequential(nn.Linear(2048, 16384), nn.GELU(), nn.Linear(16384, 2048), nn.Linear(2048, 2048))
    model = autotp.parallelize(model, world, example_inputs=(torch.randn(2, 2048),))
    up = model[0]  # type: ignore[index]
    up.weight.data = up.weight.data.t().contiguous().t()
    autotp.save(model, folder / "first")
    result: Result = {"shards": sum(p.nbytes for p in model.parameters())}
    result["save"] = _peak(lambda: autotp.save(model, folder / "ckpt", max_shard_size="100MB"))
    kept: list[Any] = []
    result["full_state_dict"] = _peak(lambda: kept.append(autotp.full_state_dict(model)))
    return result
