"""The ways to read and save a checkpoint, each checked and timed in turn: one rank's part of checkpoints.py."""

from __future__ import annotations

import filecmp
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import autotp
from autotp.runtime.graph_runtime import runtime_of
from autotp.weights.checkpoint import open_checkpoint
from autotp.weights.load_checkpoint import first_elements, match_checkpoint, read_shards
from autotp.weights.shard_tensor import ShardTensor
from benchmarks.measure import largest, spread
from benchmarks.memory import forget, resident
from benchmarks.models import Llama, first_failure, reason

READ, SAVE = "reading", "saving"
"""The two kinds of rows, each of which has a table."""


@dataclass
class Row:
    """A way to read or save.

    Args:
        name: what tables call it.
        kind: ``READ`` or ``SAVE``; of the reference none.
        run: what is timed.
        check: given its result, says what is wrong with that. Collective.
        alone: whether rank 0 runs it alone.
    """

    name: str
    kind: str
    run: Callable[[], Any]
    check: Callable[[Any], str]
    alone: bool = False


@dataclass
class Found:
    """What was measured of a row.

    Attributes:
        kind: of the row.
        seconds: of each round, the slowest rank's.
        cpu: processor time of all ranks and of what they started, likewise.
        read: bytes that a rank got by system calls, the largest of the ranks.
        fetched: bytes of all ranks that were not in the page cache.
        written: bytes of the files that were there afterwards.
        peak: bytes of memory of a rank above what it held before, the largest of the ranks and rounds.
        failed: why there is nothing else.
    """

    kind: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    read: int = 0
    fetched: int = 0
    written: int = 0
    peak: int = 0
    failed: str = ""


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def io(entry: str) -> int:
    """Bytes of this process so far: ``rchar`` that it read, ``read_bytes`` of them from a disk."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{entry}:"))


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


class Files:
    """The tensors of a folder's safetensors files.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.paths: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.paths |= dict.fromkeys(file.keys(), path)

    def tensor(self, name: str) -> Any:
        with safe_open(self.paths[name], "pt") as file:
            return file.get_tensor(name)

    def difference(self, names: Iterable[str], value: Callable[[str], Any]) -> str:
        """How tensors, of which ranks may hold parts, differ from the files. Collective."""
        if missing := set(names) ^ self.paths.keys():
            return f"{min(missing)} is on one side only"
        for name in sorted(self.paths):
            found = value(name)
            whole = found.full() if isinstance(found, ShardTensor) else found
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if not torch.equal(whole, self.tensor(name)):
                return f"{name} differs"
        return ""


class Group:
    """One rank's part in a group of processes.

    Args:
        within: the folder in which ``dense`` is.
        rounds: how many are timed.
        on_disk: whether files are written to a disk some time.
    """

    def __init__(self, within: Path, rounds: int, on_disk: bool) -> None:
        self.rank, self.tp = dist.get_rank(), dist.get_world_size()
        self.rounds, self.on_disk = rounds, on_disk
        self.dense, self.out, self.kept = (within / n for n in ("dense", "out", "dcp"))
        self.files = Files(self.dense)
        self.unread, self.model = self.empty(), self.parallelized()

    def empty(self) -> Any:
        with autotp.empty_weights():
            return Llama(transformers.LlamaConfig.from_pretrained(self.dense))

    def parallelized(self) -> Any:
        return autotp.parallelize(self.empty(), self.tp, weights=self.dense)

    def shards(self) -> dict[str, Any]:
        """The part of ``parallelize`` that depends on how many bytes there are."""
        sources = match_checkpoint(self.unread, open_checkpoint(self.dense))
        first_elements(sources)
        layouts = runtime_of(self.model).weight_layouts
        return read_shards(self.unread, sources, layouts, self.rank, torch.device("cpu"))

    def right_shards(self, found: dict[str, Any]) -> str:
        """What is wrong with what was read; the model, whose values are compared with, must be right."""
        wrong = self.right_model(self.model)
        mine = dict(self.model.named_parameters())
        different = [n for n in mine if n not in found or not bool((mine[n] == found[n]).all())]
        return wrong or next((f"the shard of {n} differs" for n in different), "")

    def right_model(self, model: Any) -> str:
        state = model.state_dict()
        return self.files.difference(state, state.__getitem__)

    def right_tensors(self, _: Any) -> str:
        """What is wrong with the weights that are written."""
        there = Files(self.out)
        return self.files.difference(there.paths, there.tensor)

    def right_files(self, _: Any) -> str:
        """What is wrong with the folder that is written."""
        names, there = (sorted(p.name for p in folder.iterdir()) for folder in (self.dense, self.out))
        if names != there:
            return f"the files are {there}, not {names}"
        _, different, unread = filecmp.cmpfiles(self.dense, self.out, names, shallow=False)
        return f"{different + unread} differ" if different + unread else ""

    def right_chunks(self, _: Any) -> str:
        """What is wrong with a checkpoint of torch's."""
        state = {n: torch.full(x.shape, torch.nan, dtype=x.dtype) for n, x in self.unread.state_dict().items()}
        dcp.load(state, checkpoint_id=self.out)  # whole, on each rank
        return self.files.difference(state, state.__getitem__)

    def reference(self) -> Row:
        def copy() -> None:
            subprocess.run(["cp", "-r", "--reflink=never", self.dense, self.out], check=True)

        return Row("cp", "", copy, self.right_files, alone=True)

    def first(self) -> list[Row]:
        """The rows of the first group."""

        def by_transformers() -> Any:
            parallel = DistributedConfig(tp_size=self.tp)
            return Llama.from_pretrained(self.dense, distributed_config=parallel, dtype="float32")

        def consolidated() -> Any:
            writer = HuggingFaceStorageWriter(str(self.out), save_distributed=True, enable_consolidation=True)
            return dcp.save(theirs.state_dict(), storage_writer=writer)  # autotp lets safetensors write no shards

        def touched() -> Any:
            model = by_transformers()
            for parameter in model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.detach().flatten()[:: 4096 // local.element_size()].sum()
            return model

        theirs = touched()
        return [
            self.reference(),
            Row("autotp weights=, reading", READ, self.shards, self.right_shards),
            Row("autotp weights=, whole", READ, self.parallelized, self.right_model),
            Row("transformers from_pretrained", READ, by_transformers, self.right_model),
            Row("from_pretrained and every page", READ, touched, self.right_model),
            Row("autotp.save", SAVE, lambda: autotp.save(self.model, self.out), self.right_files),
            Row("transformers save_pretrained", SAVE, lambda: theirs.save_pretrained(self.out), self.right_tensors),
            Row("dcp.save", SAVE, lambda: dcp.save(self.model.state_dict(), checkpoint_id=self.out), self.right_chunks),
            Row("dcp.save, consolidated", SAVE, consolidated, self.right_tensors),
        ]

    def second(self) -> list[Row]:
        """The rows of the second group."""
        target = self.parallelized()
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.fill_(torch.nan)

        def load() -> None:
            dcp.load(target.state_dict(), checkpoint_id=self.kept)

        return [
            self.reference(),
            Row("dcp.load", READ, load, lambda _: self.right_model(target)),
            Row("autotp weights=, reading", READ, self.shards, self.right_shards),
        ]

    def keep(self) -> None:
        """Write what the second group reads."""
        dcp.save(self.model.state_dict(), checkpoint_id=self.kept)

    def run(self, rows: list[Row]) -> dict[str, Any]:
        """All rows, checked and then timed round by round. Collective."""
        found = {row.name: Found(row.kind) for row in rows}
        before = os.getloadavg()[0]
        for number in range(-1, self.rounds):
            for row in rows if number % 2 else rows[::-1]:
                if not found[row.name].failed:
                    self.turn(row, found[row.name], is_checked=number < 0)
        return {"rows": {n: recorded(f, found["cp"]) for n, f in found.items()}, "load": [before, os.getloadavg()[0]]}

    def turn(self, row: Row, found: Found, is_checked: bool) -> None:
        """Run a row once; note whether it is right, or what it took. Collective."""
        error, result = "", None
        forget()
        held = resident("VmRSS")
        dist.barrier()
        read, fetched, busy, start = io("rchar"), io("read_bytes"), processor_time(), time.perf_counter()
        try:
            if not row.alone or self.rank == 0:
                result = row.run()
        except (Exception, CheckpointException) as raised:
            error = reason(raised if isinstance(raised, Exception) else RuntimeError(str(raised)))
        taken = time.perf_counter() - start, processor_time() - busy, io("rchar") - read, io("read_bytes") - fetched
        peak = resident("VmHWM") - held
        found.failed = first_failure(error)
        if is_checked and not found.failed:
            found.failed = first_failure(row.check(result))
        del result
        if not is_checked and not found.failed:
            every: list[Any] = [None] * self.tp
            dist.all_gather_object(every, taken)
            seconds, cpu, reads, fetches = zip(*every)
            found.seconds.append(max(seconds))
            found.cpu.append(sum(cpu))
            found.read, found.fetched = max(reads), max(found.fetched, sum(fetches))
            found.peak = max(found.peak, largest(peak))
        dist.barrier()
        if self.rank == 0 and self.out.exists():
            found.written = size_of(self.out)
            shutil.rmtree(self.out)
            if self.on_disk:
                os.sync()
        dist.barrier()


def recorded(found: Found, reference: Found) -> dict[str, Any]:
    """What was measured of a row, and what is reckoned from it."""
    record = asdict(found)
    if found.seconds:
        for name, mine, theirs in (("", found.seconds, reference.seconds), ("cpu_", found.cpu, reference.cpu)):
            low, record[f"{name}median"], high = spread(mine)
            record[f"{name}quartiles"] = [low, high]
            low, record[f"{name}ratio"], high = spread([a / b for a, b in zip(mine, theirs)])
            record[f"{name}ratio_quartiles"] = [low, high]
    return record
