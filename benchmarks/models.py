"""The competitors: one Llama in the hands of each, with the same weights.

Each stands behind the same few calls (:class:`Competitor`), so that a case is the same work for all of them:
whole logits of the last position on every rank, and in training the loss alone, of which gradients flow
to every parameter.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

import autotp
from benchmarks.megatron import MegatronLlama

Once = dict[str, float]
"""Seconds of what happens once, by what it is."""

WITHOUT = {
    "autotp without all": autotp.Lowering.none(),
    "autotp without none": autotp.Lowering(),  # to compare with: "autotp" runs with another's code in the caches
    **{
        f"autotp without {f.name}": dataclasses.replace(autotp.Lowering(), **{f.name: False})
        for f in dataclasses.fields(autotp.Lowering)
    },
}
"""autotp's model without one of the lowering passes, or any, by its name in tables."""


class Llama(transformers.LlamaForCausalLM):
    """transformers' model, but in training it returns no logits beside the loss."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: transformers.Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        found = super().forward(
            input_ids=input_ids, labels=labels, past_key_values=past_key_values, use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )  # fmt: skip
        return found if labels is None else CausalLMOutputWithPast(loss=found.loss)


def config(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=2048, tie_word_embeddings=False,
        attention_dropout=0.0,
    )  # fmt: skip


class Count(TorchDispatchMode):
    """Counts the collectives that reach a process group, and the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its collectives come by themselves
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].strip("_")
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("barrier", "wait", "wrap")):
            tensors = torch.utils._pytree.tree_leaves(args[0] if func.namespace == "c10d" else result)
            name = name.replace("allreduce", "all_reduce").replace("allgather", "all_gather")
            kind = name.removesuffix("base").strip("_").removesuffix("_into_tensor").removesuffix("_tensor")
            self.calls[kind] += 1
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        return result


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference over the largest expected magnitude; infinite where that is no number."""
    apart = float((expected - found).abs().max() / expected.abs().max())
    return apart if math.isfinite(apart) else math.inf  # max() passes over NaN


class Competitor:
    """A model of transformers, however it was made parallel.

    Args:
        name: what tables call it.
        module: the model.
        call: what to call in its stead.
        alone: whether it is timed on rank 0 alone.
        failed: why there is none.
    """

    def __init__(
        self, name: str, module: Any, call: Callable[..., Any] | None = None, alone: bool = False, failed: str = ""
    ) -> None:
        self.name, self.module, self.alone, self.failed = name, module, alone, failed
        self.call: Callable[..., Any] = module if call is None else call
        self.cache: Any = None

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The last position's."""
        return self.whole(self.call(input_ids=ids, use_cache=False, logits_to_keep=1).logits)

    def begin(self, prompt: torch.Tensor) -> None:
        """Fill a new cache."""
        self.cache = transformers.DynamicCache(config=self.module.config)
        self.call(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def token(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after one more token."""
        return self.whole(self.call(input_ids=ids, past_key_values=self.cache, use_cache=True).logits)

    def back(self, tokens: int) -> None:
        """Take tokens from the cache."""
        self.cache.crop(-tokens)

    def train(self, ids: torch.Tensor) -> torch.Tensor:
        """Forward, loss and backward; the loss."""
        loss = self.call(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def gradient_error(self, dense: dict[str, torch.Tensor]) -> float:
        """The largest difference of a gradient, relative to the dense model's. Collective."""
        found = {n: p.grad for n, p in self.module.named_parameters()}
        return max(distance(g, self.whole(found[n])) for n, g in dense.items())

    def whole(self, value: Any) -> torch.Tensor:
        """A value of which this rank may hold a part. Collective."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def counting(self) -> AbstractContextManager[Any]:
        """Counts collectives: has ``calls`` and ``bytes``."""
        return Count()


class AutoTP(Competitor):
    """What ``autotp.parallelize`` returns."""

    def gradient_error(self, dense: dict[str, torch.Tensor]) -> float:
        whole = autotp.full_gradients(self.module)
        return max(distance(g, whole[n]) for n, g in dense.items())

    def counting(self) -> AbstractContextManager[Any]:
        return autotp.Tally()


class HandWritten(Competitor):
    """The model of megatron.py."""

    module: MegatronLlama

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.module.last_logits(ids)

    def begin(self, prompt: torch.Tensor) -> None:
        self.cache = self.module.cache(prompt.shape[0], prompt.shape[1] + 64)
        self.module.last_logits(prompt, self.cache)

    def token(self, ids: torch.Tensor) -> torch.Tensor:
        return self.module.last_logits(ids, self.cache)

    def back(self, tokens: int) -> None:
        self.cache.length -= tokens

    def train(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.module.loss(ids, ids)
        loss.backward()
        return loss.detach()

    def gradient_error(self, dense: dict[str, torch.Tensor]) -> float:
        found = {n: p.grad for n, p in self.module.named_parameters()}
        return max(distance(g, found[n]) for n, g in self.module.parts(dense.__getitem__))


class DTensors(Competitor):
    """torch's ``parallelize_module`` with the plan below; logits stay sharded up to the loss."""

    def train(self, ids: torch.Tensor) -> torch.Tensor:
        with loss_parallel():
            loss = self.call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        return self.whole(loss.detach())


def dtensor_plan() -> dict[str, ParallelStyle]:
    """A plan for transformers' Llama, written by hand as torchtitan writes its own; without sequence parallelism."""
    layer = "model.layers.*"
    column = {f"{layer}.{n}_proj": ColwiseParallel() for n in ("self_attn.q", "self_attn.k", "self_attn.v",
                                                              "mlp.gate", "mlp.up")}  # fmt: skip
    once: Any = (Replicate(),)  # one all-reduce of the gradient for all that read the value
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        f"{layer}.self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Replicate()},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        f"{layer}.mlp": PrepareModuleInput(input_layouts=once, desired_input_layouts=once),
        **column,
        f"{layer}.self_attn.o_proj": RowwiseParallel(),
        f"{layer}.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }


def by_hand(dense: nn.Module, rank: int, tp: int) -> HandWritten:
    hand = MegatronLlama(dense.config, rank, tp)
    hand.load(dense.get_parameter)
    return HandWritten("hand-written", hand)


def by_dtensor(module: nn.Module, tp: int) -> DTensors:
    return DTensors("DTensor", parallelize_module(module, init_device_mesh("cpu", (tp,)), dtensor_plan()))


def by_transformers(module: Any, tp: int) -> Competitor:
    """As ``from_pretrained(..., distributed_config=...)`` does it, which itself wants a checkpoint and accelerate.

    It follows its own plan for Llama, in which logits are gathered before the loss.
    """
    parallel, _, mesh = module.prepare_distribute_model(DistributedConfig(tp_size=tp))
    return Competitor("transformers TP", module.maybe_distribute_model(module, parallel, mesh))


def by_autotp(
    module: nn.Module, tp: int, example: dict[str, Any], training: bool, name: str = "autotp", **more: Any
) -> AutoTP:
    module.train(training)
    return AutoTP(name, autotp.parallelize(module, tp, example_inputs=example, **more))


def compiled(model: Competitor) -> Competitor:
    """A model under ``torch.compile``, with the weights that it has."""
    call = torch.compile(model.module) if model.module is not None else None
    return type(model)(f"{model.name} compiled", model.module, call, model.alone, model.failed)


def make(names: list[str], dense: Competitor, example: dict[str, Any], training: bool, once: Once) -> list[Competitor]:
    """The competitors, in the order of tables. Collective.

    Args:
        names: which.
        dense: the dense model.
        example: inputs to capture it with.
        training: whether these are of a training step.
        once: gets how long it took.
    """
    rank, tp = dist.get_rank(), dist.get_world_size()

    def split(name: str, way: Callable[[Any], Competitor]) -> Competitor:
        module = copy.deepcopy(dense.module)
        start = time.perf_counter()
        found = way(module)
        once[f"{name}: split"] = time.perf_counter() - start
        return found

    def by_us(name: str, **more: Any) -> Competitor:
        return split(name, lambda module: by_autotp(module, tp, example, training, name, **more))

    ways: dict[str, Callable[[], Competitor]] = {
        "dense": lambda: dense,
        "hand-written": lambda: by_hand(dense.module, rank, tp),
        "autotp": lambda: by_us("autotp"),
        "autotp compiled": lambda: compiled(made["autotp"]),
        "autotp gloo": lambda: by_us("autotp gloo", shared_memory=False),
        **{name: functools.partial(by_us, name, lowering=passes) for name, passes in WITHOUT.items()},
        "DTensor": lambda: split("DTensor", lambda module: by_dtensor(module, tp)),
        "transformers TP": lambda: split("transformers TP", lambda module: by_transformers(module, tp)),
    }
    made: dict[str, Competitor] = {}
    for name in names:
        made[name] = attempted(name, ways[name])
    return list(made.values())


def make_alone(dense: Competitor, example: dict[str, Any], with_compiled: bool, with_passes: bool) -> list[Competitor]:
    """The dense model and autotp's at tp=1, on rank 0 alone. Collective."""
    group = dist.new_group([0])

    def single(name: str, lowering: bool | autotp.Lowering = True) -> Competitor:
        if dist.get_rank():
            return AutoTP(name, None, alone=True)
        return by_autotp(copy.deepcopy(dense.module), 1, example, False, name, mesh=group, lowering=lowering)

    ways: dict[str, bool | autotp.Lowering] = {"autotp": True, **(WITHOUT if with_passes else {})}
    parallel = [attempted(name, functools.partial(single, name, passes)) for name, passes in ways.items()]
    for model in parallel:
        model.alone = True
    return [dense, *parallel, *(compiled(m) for m in (dense, parallel[0]) if with_compiled)]


def attempted(name: str, way: Callable[[], Competitor]) -> Competitor:
    """A competitor, or one that has failed on all ranks. Collective."""
    found, error = None, ""
    try:
        found = way()
    except Exception as raised:
        error = reason(raised)
    failed = first_failure(error)
    return Competitor(name, None, failed=failed) if failed or found is None else found


def reason(error: Exception) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def first_failure(error: str) -> str:
    """What any rank has to say, the same on all; nothing if none has. Collective."""
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, error)
    return next((f"{e} (rank {r})" if len(set(every)) > 1 else e for r, e in enumerate(every) if e), "")
