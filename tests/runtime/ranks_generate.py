"""Work on real processes: ``generate`` of transformers, caches between calls, submodules called by themselves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers.generation.streamers import BaseStreamer

import autotp
from autotp.verification.measure import Float64, relative_error
from tests.comparison import raised, same

Result = dict[str, Any]
VOCABULARY = 131
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 10}


def llama(heads: int = 4, layers: int = 2) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16 * heads, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
            intermediate_size=112, vocab_size=VOCABULARY, max_position_embeddings=128,
        )
    )  # fmt: skip


def sliding() -> Any:
    """One layer sees a window of 6 tokens, the other all."""
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=112, vocab_size=VOCABULARY, sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=112, vocab_size=VOCABULARY, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def bart() -> Any:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=112, decoder_ffn_dim=112, vocab_size=VOCABULARY, max_position_embeddings=128,
        )
    )  # fmt: skip


def pair(make: Callable[[], Any], world: int, **options: Any) -> tuple[Any, Any]:
    """A dense model, and the same parallelized; weights large enough that tokens vary."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    dense = make().double().eval()
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(0.1 * torch.randn_like(p))
    torch.set_rng_state(state)
    model = autotp.parallelize(copy.deepcopy(dense), world, timeout=timedelta(seconds=40), **options)
    return dense, model


def prompt(batch: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokens(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found = model.generate(ids, **PLAIN | options)
    return found if isinstance(found, torch.Tensor) else found.sequences


def equal(dense: Any, model: Any, ids: torch.Tensor, **options: Any) -> bool:
    expected = tokens(dense, ids, **options)
    found = tokens(model, ids, **options)
    return torch.equal(expected, found) and same(found)


def held(cache: Any) -> tuple[int, int, list[int]]:
    """The bytes of a cache's tensors, those of the storages behind them, and how many heads each layer keeps.

    Room for a few more tokens behind a tensor (:mod:`passes.lowering.cache_in_place`) is not counted.
    """
    layers = getattr(cache, "layers", None) or [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    each = [t for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.dim() == 4]
    storages = {t.untyped_storage().data_ptr(): _behind(t) for t in each}
    return sum(t.nbytes for t in each), sum(storages.values()), [t.shape[1] for t in each]


def _behind(tensor: torch.Tensor) -> int:
    room = getattr(tensor, "_autotp_room", None)
    if room is not None:
        memory, used = room
        assert used >= tensor.shape[2]
        more = [a - b for a, b in zip(memory.shape, tensor.shape, strict=True)]
        assert more[:2] == [0, 0], "of this rank's heads"
        assert more[2] <= max(32, tensor.shape[2] // 8)
        assert more[3] == 0
        if memory.nbytes == tensor.untyped_storage().nbytes():
            return tensor.nbytes
    return tensor.untyped_storage().nbytes()


def captures(model: Any) -> int:
    return model.__dict__["_autotp"].cache.captures.count


class Collected(BaseStreamer):
    """A streamer that keeps what it gets, and may raise."""

    def __init__(self, limit: int = 1000) -> None:
        self.got: list[list[int]] = []
        self.limit = limit

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())
        if len(self.got) > self.limit:
            raise ValueError("the stream is closed")

    def end(self) -> None:
        self.got.append([])


def ways(rank: int, world: int) -> Result:
    """All ways of generating, dense against parallel."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: Result = {}
    with Float64():
        dense, model = pair(llama, world)
        ids = prompt()
        before = captures(model)
        found["greedy"] = equal(dense, model, ids)
        found["captures"] = captures(model) - before
        found["text"] = str(autotp.graph(model)).splitlines()[0]
        found["another prompt"] = equal(dense, model, prompt(3, 5, seed=4), max_new_tokens=14)
        found["beam"] = equal(dense, model, ids, num_beams=3, num_return_sequences=2)
        found["captures of all"] = captures(model) - before
        found["tokens vary"] = len(set(tokens(model, ids).flatten().tolist())) > 8
        _sampling(rank, dense, model, ids, found)
        _logits(model, ids, found)
        padded = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
        found["left-padded"] = equal(dense, model, ids, attention_mask=padded)
        found["padding matters"] = not torch.equal(tokens(dense, ids), tokens(dense, ids, attention_mask=padded))
        _caches(dense, model, ids, found)
        found["assisted"], found["prompt lookup"] = _assisted(dense, model)
        _streaming(rank, dense, model, ids, found)
        _submodules(dense, model, ids, found)
        twin = copy.deepcopy(model)
        found["a copy"] = equal(dense, twin, ids)
        found["a copy is its own"] = twin.generate.runtime.model is twin is not model
        for name, make in {"sliding": sliding, "t5": t5, "bart": bart}.items():
            dense, model = pair(make, world)
            for way, options in {"greedy": {}, "static": {"cache_implementation": "static"}}.items():
                found[f"{name}: {way}"] = equal(dense, model, ids, **options)
            found[f"{name}: beam"] = equal(dense, model, ids, num_beams=2)
            for way, options in {"": {}, "static ": {"cache_implementation": "static"}}.items():
                made = [m.generate(ids, **PLAIN, **options, return_dict_in_generate=True) for m in (dense, model)]
                found[f"{name}: {way}cache"] = tuple(held(each.past_key_values) for each in made)
            if name != "sliding":
                expected, state = (m.get_encoder()(ids).last_hidden_state for m in (dense, model))
                found[f"{name}: encoder"] = relative_error(expected, state)
        _in_parts(rank, world, ids, found)
    return found


def _in_parts(rank: int, world: int, ids: torch.Tensor, found: Result) -> None:
    """A model that runs its own Python between parts, because there is a hook in it."""

    def hooked() -> Any:
        model = llama()
        model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
        return model

    dense, model = pair(hooked, world)
    found["in parts"] = len(model.__dict__["_autotp"].parts)
    found["in parts: greedy"], found["in parts: beam"] = (equal(dense, model, ids, num_beams=n) for n in (1, 2))
    torch.manual_seed(7)
    expected = tokens(dense, ids, do_sample=True)
    torch.manual_seed(7 + rank)
    found["in parts: sampling"] = torch.equal(expected, tokens(model, ids, do_sample=True))
    found["in parts: prompts"] = raised(lambda: model.generate(prompt(seed=rank), **PLAIN))
    found["in parts: inputs"] = raised(lambda: model(prompt(seed=rank)))


def _sampling(rank: int, dense: Any, model: Any, ids: torch.Tensor, found: Result) -> None:
    options = PLAIN | {"do_sample": True, "temperature": 2.0}
    torch.manual_seed(7)
    expected = dense.generate(ids, **options)
    advanced = torch.get_rng_state()
    torch.manual_seed(7 + rank)
    own = torch.get_rng_state()
    drawn = model.generate(ids, **options)
    found["sampling"] = torch.equal(expected, drawn) and same(drawn)
    found["sampling: own numbers afterwards"] = torch.equal(torch.get_rng_state(), own if rank else advanced)
    found["sampling: without"] = raised(lambda: type(model).generate(model, ids, **options))
    torch.manual_seed(7)
    other = dense.generate(ids, **options | {"num_beams": 2, "top_k": 20})
    torch.manual_seed(7 + rank)
    found["sampling beams"] = torch.equal(other, model.generate(ids, **options | {"num_beams": 2, "top_k": 20}))


def _logits(model: Any, ids: torch.Tensor, found: Result) -> None:
    with autotp.Tally() as last:
        model.generate(ids, **PLAIN | {"max_new_tokens": 1})
    with autotp.Tally() as steps:
        model.generate(ids, **PLAIN)
    with torch.no_grad(), autotp.Tally() as three:
        model(ids, logits_to_keep=3)
    with torch.no_grad(), autotp.Tally() as whole:
        model(ids)
    found["gathered"] = [tally.elements["all_gather"] for tally in (last, steps, three, whole)]


def _caches(dense: Any, model: Any, ids: torch.Tensor, found: Result) -> None:
    """Caches that are passed in: what they hold, and that they can be used further."""
    early = [transformers.StaticCache(m.config, max_cache_len=40) for m in (dense, model)]
    for each in early:
        each.early_initialization(2, 2, 16, torch.float64, torch.device("cpu"))
    whole = model.get_input_embeddings()(ids)
    made = {
        "dynamic": [transformers.DynamicCache(config=m.config) for m in (dense, model)],
        "static": [transformers.StaticCache(config=m.config, max_cache_len=40) for m in (dense, model)],
        "initialized": early,
    }
    for name, caches in made.items():
        pairs = list(zip((dense, model), caches, strict=True))
        first, second = (tokens(m, ids, past_key_values=c) for m, c in pairs)
        found[f"{name} cache: tokens"] = torch.equal(first, second)
        found[f"{name} cache: held"] = tuple(map(held, caches))
        found[f"{name} cache: length"] = [int(c.get_seq_length()) for c in caches]
        longer = torch.cat([first, prompt(2, 3, seed=9)], dim=1)  # a turn of a conversation
        found[f"{name} cache: goes on"] = torch.equal(*(tokens(m, longer, past_key_values=c) for m, c in pairs))
        found[f"{name} cache: held then"] = tuple(map(held, caches))
    for cache in made["dynamic"]:
        cache.crop(12 - cache.get_seq_length())
    pairs = list(zip((dense, model), made["dynamic"], strict=True))
    found["cropped cache"] = torch.equal(*(tokens(m, ids.repeat(1, 2), past_key_values=c) for m, c in pairs))
    found["chunked prefill"] = equal(dense, model, ids, prefill_chunk_size=4, cache_implementation="static")
    with torch.no_grad():
        cache = model.model(inputs_embeds=whole, use_cache=True).past_key_values  # a submodule's, for the model
        found["a submodule's cache: held"] = held(cache)[2]
        expected = dense(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1]
        found["a submodule's cache"] = relative_error(expected, model(ids[:, :1], past_key_values=cache).logits[:, -1])


def _assisted(dense: Any, model: Any) -> tuple[bool, bool]:
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assistant = llama(layers=1).double().eval()
    torch.set_rng_state(state)
    ids = prompt(1, 9)
    assistants = [copy.deepcopy(assistant) for _ in range(2)]  # they learn how many tokens to propose
    one, other = (tokens(m, ids, assistant_model=a) for m, a in zip((dense, model), assistants, strict=True))
    looped = torch.cat([ids, ids], dim=1)
    return torch.equal(one, other) and same(other), equal(dense, model, looped, prompt_lookup_num_tokens=3)


def _streaming(rank: int, dense: Any, model: Any, ids: torch.Tensor, found: Result) -> None:
    streams = Collected(), Collected()
    dense.generate(ids[:1], **PLAIN, streamer=streams[0])
    model.generate(ids[:1], **PLAIN, streamer=streams[1] if rank == 0 else None)
    found["streaming"] = len(streams[0].got) == 12 and (rank > 0 or streams[0].got == streams[1].got)
    closed = Collected(limit=4) if rank == 1 else None
    found["a stream that breaks"] = raised(lambda: model.generate(ids[:1], **PLAIN, streamer=closed))
    found["after that"] = equal(dense, model, ids)


def _submodules(dense: Any, model: Any, ids: torch.Tensor, found: Result) -> None:
    """Submodules that hold shards, called by themselves: values and gradients."""
    calls: dict[str, Callable[[Any], torch.Tensor]] = {
        "inner model": lambda m: m.model(ids).last_hidden_state,
        "embeddings": lambda m: m.get_input_embeddings()(ids),
        "a layer's": lambda m: m.model.layers[1].mlp(m.model.embed_tokens(ids)),
        "head": lambda m: m.lm_head(torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 64)),
    }
    for name, call in calls.items():
        for m in (dense, model):
            m.zero_grad(set_to_none=True)
        expected, value = call(dense), call(model)
        expected.sin().sum().backward()
        value.sin().sum().backward()
        grads = autotp.full_gradients(model)
        there = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
        largest = max(float(g.abs().max()) for g in there.values())
        found[f"submodule: {name}"] = (
            relative_error(expected, value),
            max(relative_error(g, grads[n], 1e-6 * largest) for n, g in there.items()),
            {n for n, g in grads.items() if g is not None} == set(there),
        )
    found["graph of a submodule"] = str(autotp.graph(model.model.layers[1].mlp)).splitlines()[0]
    eps = model.model.norm.variance_epsilon
    unchanged = calls["inner model"](dense)
    model.model.norm.variance_epsilon = dense.model.norm.variance_epsilon = 0.5
    found["a changed submodule"] = relative_error(calls["inner model"](dense), calls["inner model"](model))
    found["the change matters"] = relative_error(unchanged, calls["inner model"](model)) > 1e-3
    model.model.norm.variance_epsilon = dense.model.norm.variance_epsilon = eps
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    found["a hook in a submodule"] = raised(lambda: model.model.layers[0].mlp(unchanged))
    handle.remove()


class Stops(transformers.StoppingCriteria):
    """Stops when it is told to; what tells it is seen by no comparison."""

    def __init__(self, at: list[int]) -> None:
        self.at = at

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.at[0])


class Branches(torch.nn.Module):
    """Captured whole for a call without a flag; with one its Python depends on the flag's value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = torch.nn.Embedding(131, 64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        self.mlp = torch.nn.Sequential(self.up, torch.nn.GELU(), self.down)
        self.asked: list[Any] = [self]  # no plain values only, so that the ranks do not compare it

    def forward(self, ids: torch.Tensor, flag: torch.Tensor | None = None) -> torch.Tensor:
        x = self.mlp(self.embed(ids))
        if flag is not None and int(flag) > 3:
            x = self.mlp(x) * 2
        if "raise" in self.asked:
            raise ValueError("in the middle")
        if "read" in self.asked:
            x = x + self.up.weight.sum()
        return x


def branches(rank: int, world: int) -> Result:
    """A call that cannot be captured, of a model that was captured whole for another."""
    ids, found = prompt(), Result()
    dense, model = pair(Branches, world, example_inputs=(ids,))
    found["whole"] = hasattr(model.__dict__["_autotp"], "cache")
    with torch.no_grad():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            errors = [relative_error(dense(ids, torch.tensor(n)), model(ids, torch.tensor(n))) for n in (1, 5, 7)]
        said = [str(w.message) for w in seen if isinstance(w.message, autotp.PartialCaptureWarning)]
        found["values"], found["warned"] = errors, said
        found["branches differ"] = relative_error(dense(ids, torch.tensor(1)), dense(ids, torch.tensor(5))) > 1e-3
        found["flags differ"] = raised(lambda: model(ids, torch.tensor(1 + rank)))
        for asked in ("raise", "read"):
            model.asked = [model, asked] if asked == "read" or rank == 1 else [model]
            found[asked] = raised(lambda: model(ids, torch.tensor(5)))
            model.asked = [model]
        found["after"] = relative_error(dense(ids, torch.tensor(5)), model(ids, torch.tensor(5)))
        twin = copy.deepcopy(model)
        found["a copy"] = relative_error(dense(ids, torch.tensor(5)), twin(ids, torch.tensor(5)))
    found["with gradients"] = raised(lambda: model(ids, torch.tensor(5)))
    found["captured as before"] = relative_error(dense(ids), model(ids))
    _, strict = pair(Branches, world, example_inputs=(ids,), strict=True)
    with torch.no_grad():
        found["strict"] = raised(lambda: strict(ids, torch.tensor(5)))
    return found


def differences(rank: int, world: int) -> Result:
    """Ranks that are given different prompts or arguments: errors, or rank 0's."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: Result = {}
    with Float64():
        dense, model = pair(lambda: llama(layers=1), world)
        ids, own = prompt(), prompt(seed=3 + rank)
        config = transformers.GenerationConfig(**PLAIN | {"max_new_tokens": 5 + rank})
        calls: dict[str, Callable[[], Any]] = {
            "values": lambda: model.generate(own, **PLAIN),
            "shapes": lambda: model.generate(prompt(2, 8 + rank), **PLAIN),
            "a mask": lambda: model.generate(ids, **PLAIN, attention_mask=torch.ones_like(ids) if rank else None),
            "a number": lambda: model.generate(ids, **PLAIN | {"max_new_tokens": 5 + rank}),
            "config": lambda: model.generate(ids, generation_config=config),
            "processors": lambda: model.generate(
                ids, **PLAIN, logits_processor=[transformers.TemperatureLogitsWarper(1.5 + rank)]
            ),
            "other calls": lambda: model.generate(ids, **PLAIN) if rank else model(ids),
            "criteria": lambda: model.generate(
                ids, **PLAIN, stopping_criteria=transformers.StoppingCriteriaList([Stops([12 + rank])])
            ),
            "call: values": lambda: model(own),
            "call: mask": lambda: model(ids, attention_mask=torch.arange(18).view(2, 9) >= rank),
            "call: submodule": lambda: model.model(own),
        }
        for name, call in calls.items():
            found[name] = raised(call)
            found[f"{name}: after"] = equal(dense, model, ids, max_new_tokens=3)
        model.generation_config.max_length = 20 + rank
        found["model's config"] = raised(lambda: model.generate(ids))
        model.generation_config.max_length = None
        _broadcast(rank, world, found)
    return found


def _broadcast(rank: int, world: int, found: Result) -> None:
    dense, model = pair(lambda: llama(layers=1), world, broadcast_inputs=True)
    first, own = prompt(), prompt(2 + rank, 9 - rank, seed=3 + rank)
    masks = {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])} if rank == 0 else {}
    found["broadcast: prompts"] = torch.equal(tokens(dense, first), tokens(model, own))
    expected = tokens(dense, first, attention_mask=torch.tensor([[0] * 3 + [1] * 6, [1] * 9]))
    found["broadcast: masks"] = torch.equal(expected, tokens(model, own, **masks))
    found["broadcast: numbers"] = torch.equal(tokens(dense, first), tokens(model, first, max_new_tokens=10 + rank))
    config = transformers.GenerationConfig(**PLAIN | {"max_new_tokens": 5 + rank})
    found["broadcast: config"] = model.generate(first, generation_config=config).shape[1] == 14
    cache = transformers.DynamicCache(config=model.config)
    found["broadcast: cache"] = torch.equal(tokens(dense, first), tokens(model, own, past_key_values=cache))
    found["broadcast: cache held"] = cache.get_seq_length(), held(cache)[2]
    with torch.no_grad():
        found["broadcast: call"] = relative_error(dense(first).logits, model(own).logits)
        cache = transformers.DynamicCache(config=model.config)
        model(own, past_key_values=cache)
        step = model(own[:2, :1] if rank == 0 else own[:1, :2], past_key_values=cache).logits
        found["broadcast: step"] = relative_error(dense(torch.cat([first, first[:, :1]], 1)).logits[:, -1:], step)
        found["broadcast: submodule"] = relative_error(
            dense.model(first).last_hidden_state, model.model(own).last_hidden_state
        )
    model.train(rank == 1)
    found["broadcast: modes"] = raised(lambda: model(own))
    model.eval()
    found["broadcast: other calls"] = raised(lambda: model.generate(own, **PLAIN) if rank else model(own))
    processors = [transformers.TemperatureLogitsWarper(1.5 + rank)]
    found["broadcast: processors"] = raised(lambda: model.generate(first, **PLAIN, logits_processor=processors))
    found["broadcast: after"] = torch.equal(tokens(dense, first), tokens(model, own))
    with autotp.Tally() as tally:
        model.generate(first, **PLAIN)
    found["broadcast: cost"] = dict(tally.calls)


def more_ranks_than_heads(rank: int, world: int) -> Result:
    """3 ranks of 2 key-value heads: two ranks keep the same."""
    warnings.simplefilter("ignore")
    found: Result = {}
    with Float64():
        dense, model = pair(lambda: llama(heads=6, layers=1), world)
        caches = [transformers.DynamicCache(config=m.config) for m in (dense, model)]
        one, other = (
            tokens(m, prompt(), past_key_values=c) for m, c in zip((dense, model), caches, strict=True)
        )  # fmt: skip
        found["greedy"] = torch.equal(one, other) and same(other)
        found["beam"] = equal(dense, model, prompt(), num_beams=2)
        found["static"] = equal(dense, model, prompt(), cache_implementation="static")
        found["held"] = tuple(map(held, caches))
        every: list[Any] = [None] * world
        dist.all_gather_object(every, held(caches[1])[2])
        found["heads"] = every
    return found
