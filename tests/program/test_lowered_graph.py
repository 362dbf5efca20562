"""Lowered graphs: what they say of their values, each pass's switch, weights that lie side by side."""

from __future__ import annotations

import copy
import dataclasses
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autotp
from autotp.capture.capture import capture
from autotp.capture.captured_graph import DenseShapes
from autotp.program.lowered_graph import LoweredGraph
from autotp.program.rank_graph import RankGraph
from autotp.program.sharded_program import shard_graph
from autotp.runtime.graph_cache import GraphCache
from autotp.verification.measure import Float64, relative_error
from autotp.verification.simulation import Simulation
from autotp.weights.slicing import local_part, shards_of
from passes import Lowering, localize
from passes.lowering.cache_in_place import cat_in_place
from passes.ops.context import use_context
from tests.comparison import backward, outputs
from tests.models import make

NAMES = ("gpt", "gpt2", "llama", "neox", "bloom", "bert")
PASSES = [f.name for f in dataclasses.fields(Lowering)]


def programs_of(name: str, tp: int) -> tuple[Any, dict[str, Any], GraphCache]:
    with Float64():
        model, kwargs = make(name)
        programs = GraphCache(model, tp, DenseShapes.of(model))
        programs.bind((), kwargs)
    return model, kwargs, programs


class _Shapes(fx.Interpreter):
    """Compares what a lowered graph says of each value with what it is."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        said = n.meta.get("local")
        if isinstance(value, torch.Tensor) and said is not None:
            assert value.dtype == said.dtype, (n.format_node(), value.dtype, said)
            sizes = [s for s in said.shape if isinstance(s, int)]
            known = [a for a, s in zip(value.shape, said.shape, strict=True) if isinstance(s, int)]
            assert known == sizes, (n.format_node(), tuple(value.shape), said)
            self.compared = getattr(self, "compared", 0) + 1
        return value


class _Checked(RankGraph):
    """A rank's graph whose lowered graphs run node by node, and are compared."""

    def lowered(self, lowering: Lowering, grad: bool) -> Any:
        found = super().lowered(lowering, grad)
        found.run = _Shapes(found).run
        return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_values_are_as_said(name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotp.runtime.graph_cache.RankGraph", _Checked)
    model, kwargs, programs = programs_of(name, tp)
    with Float64():
        parallel = Simulation(model, tp, programs, lowering=Lowering())
        backward(outputs(parallel(**kwargs)))
        with torch.no_grad():
            parallel(**kwargs)


@pytest.mark.parametrize("off", [*PASSES, "nothing", "everything"])
def test_each_pass_can_be_switched_off(off: str) -> None:
    lowering = Lowering()
    if off != "nothing":
        lowering = Lowering.none() if off == "everything" else dataclasses.replace(lowering, **{off: False})
    model, kwargs, programs = programs_of("llama", 2)
    with Float64():
        expected = outputs(model(**kwargs))
        backward(expected)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        parallel = Simulation(model, 2, programs, lowering=lowering)
        found = outputs(parallel(**kwargs))
        backward(found)
        for a, b in zip(expected, found, strict=True):
            assert relative_error(a, b) < 1e-10
        for n, p in model.named_parameters():
            assert relative_error(gradients[n], p.grad) < 1e-10, n
    found_by = programs.graph(programs.last, 0).lowered(lowering, True).found
    assert off not in found_by
    assert all(found_by[n] for n in ("merge", "fuse_adjacent") if getattr(lowering, n) and lowering.merge)


def test_values_of_any_size_may_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["passes.lowering.rematerialize"], "WORTH", 1)
    test_each_pass_can_be_switched_off("nothing")


def test_a_pass_that_is_wrong_is_found() -> None:
    """The negative control: two parts of one product change places."""
    model, kwargs, programs = programs_of("llama", 2)
    with Float64(), torch.no_grad():
        expected = outputs(model(**kwargs))
        for rank in (0, 1):
            lowered = programs.graph(programs.last, rank).lowered(Lowering(), False)
            parts = [n for n in lowered.graph.nodes if n.target is operator.getitem]
            same = [n for n in parts if n.meta["local"] == parts[0].meta["local"] and n.args[0] is parts[0].args[0]]
            gate, up = same[:2] if len(same) > 1 else _equal_parts(parts)
            gate.args, up.args = up.args, gate.args
            lowered.recompile()
            lowered.run = lowered.forward
        found = outputs(Simulation(model, 2, programs, lowering=Lowering())(**kwargs))
    assert max(relative_error(a, b) for a, b in zip(expected, found, strict=True)) > 1e-6


def _equal_parts(parts: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    return next(
        (a, b)
        for a in parts
        for b in parts
        if a is not b and a.args[0] is b.args[0] and a.meta["local"] == b.meta["local"]
    )


class _Log(TorchDispatchMode):
    """One of two ranks, whose sums are its own parts: what it computes, and when it begins and ends a sum."""

    rank, size = 0, 2

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))

    def group(self, name: str) -> _Log:
        return self

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.seen.append("sum of ranks")
        return tensor

    all_reduce_ = all_reduce

    def start_all_reduce(self, tensor: torch.Tensor) -> Any:
        self.seen.append("begin")

        def finish() -> torch.Tensor:
            self.seen.append("end")
            return tensor

        return finish

    def all_gather(self, tensor: torch.Tensor, shapes: Any) -> list[torch.Tensor]:
        return [tensor.new_zeros(shape) for shape in shapes]

    def beside(self) -> list[list[str]]:
        """What is computed beside each sum that was begun."""
        begun = [i for i, x in enumerate(self.seen) if x == "begin"]
        return [self.seen[i + 1 : self.seen.index("end", i)] for i in begun]


def test_sums_run_beside_what_does_not_need_them() -> None:
    model, kwargs, programs = programs_of("llama", 2)
    for name, parameter in model.named_parameters():
        parameter.data = local_part(parameter.data, shards_of(programs.weight_layouts, name), 0).clone()
    given, layers = programs.captures.flatten((), kwargs).tensors, model.config.num_hidden_layers

    def logged(lowering: Lowering) -> tuple[_Log, _Log]:
        graph = RankGraph(programs.last, 0, model)
        with Float64(), use_context(forward := _Log()), forward, torch.no_grad():
            graph.execute(lowering, given)
        with Float64(), use_context(backward := _Log()):
            results = graph.execute(lowering, given)
            backward.seen.clear()
            with backward:
                sum(r.sum() for r in results if r.requires_grad).backward()
        return forward, backward

    forward, backward = logged(Lowering())
    assert any("cos" in each for each in forward.beside()), "the rotary tables, beside the embedding's sum"
    assert len(backward.beside()) == 2 * layers + 1, "attention, MLP and head"
    assert all("mm" in each for each in backward.beside()), "the weights' gradients"
    for found, one_by_one in zip((forward, backward), logged(Lowering(overlap=False)), strict=True):
        assert not one_by_one.beside()
        begun = len(found.beside())
        assert begun + found.seen.count("sum of ranks") == one_by_one.seen.count("sum of ranks")


def test_merged_products_train_under_autocast() -> None:
    """Products of bfloat16, weights of float32: so are their gradients, as the dense model's."""
    model, kwargs = make("llama")
    model, dense = model.float(), copy.deepcopy(model.float())
    autotp.parallelize(model, 1, example_inputs=kwargs)
    for each in (model, dense):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = outputs(each(**kwargs))
        sum(y.float().square().mean() for y in found if y.requires_grad).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert relative_error(b.grad, a.grad) < 0.05, name


def test_what_grows_is_what_a_concatenation_gives() -> None:
    """Each value ever made keeps its numbers, whichever is put behind which, and memory is taken rarely."""
    torch.manual_seed(0)
    with torch.no_grad():
        start = torch.randn(2, 3, 5, 4)
        values, places = [(start, start.clone())], set()
        for i in range(120):
            old, expected = values[-1] if i % 7 else values[i // 2]  # now and then behind one that others are behind
            new = torch.randn(2, 3, 1 + i % 2, 4)
            found = cat_in_place(old, new, 2)
            values.append((found, torch.cat((expected, new), 2)))
            places.add(found.untyped_storage().data_ptr())
        assert all(torch.equal(a, b) for a, b in values)
        assert len(places) < 60, "most are not copies"
        last, expected = values[-1]
        copied = copy.deepcopy(last)
        first, second = (cat_in_place(x, torch.ones(2, 3, 1, 4), 2) for x in (last, copied))
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
        cropped = cat_in_place(first[:, :, :-1], torch.zeros(2, 3, 1, 4), 2)
        assert torch.equal(cropped, torch.cat((expected, torch.zeros(2, 3, 1, 4)), 2))
        assert bool((first[:, :, -1] == 1).all()), "cropping and going on elsewhere leaves it as it was"


def test_room_behind_a_tensor_is_used_only_while_it_lies_there(tmp_path: Path) -> None:
    with torch.no_grad():
        one = torch.ones(1, 1, 2, 4)
        for change in (
            lambda t: setattr(t, "data", t * 0.5),
            lambda t: t.set_(t * 0.5),
            lambda t: t.transpose_(0, 1),
            lambda t: t.mul_(3),
        ):
            old = cat_in_place(torch.ones(1, 1, 3, 4), one, 2)
            change(old)
            assert torch.equal(cat_in_place(old, one[:, :, :1], 2), torch.cat((old, one[:, :, :1]), 2))
        torch.save(old, tmp_path / "cache.pt")
        assert torch.equal(torch.load(tmp_path / "cache.pt", weights_only=True), old)


def test_what_grew_in_inference_mode_grows_elsewhere_outside() -> None:
    with torch.inference_mode():
        old = cat_in_place(torch.ones(1, 2, 4), torch.ones(1, 1, 4), 1)
    with torch.no_grad():
        new = cat_in_place(old, torch.zeros(1, 1, 4), 1)
        assert cat_in_place(new, torch.zeros(1, 1, 4), 1).data_ptr() == new.data_ptr()
    assert new.tolist() == [[[1.0] * 4] * 3 + [[0.0] * 4]]


def test_a_cache_is_not_copied_for_each_token() -> None:
    """Its memory stays where it is, but for the first token and after a crop; the tokens before stay as they were."""
    with torch.no_grad():
        model, _ = make("llama")
        torch.manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (2, 12))
        dense = copy.deepcopy(model)
        caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
        autotp.parallelize(model, 1)
        moved, before = 0, -1
        for each, cache in zip((model, dense), caches, strict=True):
            each(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        for i in range(1, 12):
            if i == 6:
                for cache in caches:
                    cache.crop(-2)
            kept = [layer.keys.clone() for layer in caches[0].layers]
            held = [layer.keys for layer in caches[0].layers]
            found, expected = (
                m(input_ids=ids[:, i : i + 1], past_key_values=c, use_cache=True)
                for m, c in zip((model, dense), caches, strict=True)
            )
            torch.testing.assert_close(found.logits, expected.logits)
            assert all(torch.equal(a, b) for a, b in zip(kept, held, strict=True))
            place = caches[0].layers[0].keys.data_ptr()
            moved, before = moved + (place != before), place
    assert moved == 2, "for the first of them, and after the crop"


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index_copy": lambda cache, rows, x: cache.index_copy(0, rows, x),
    "index_put": lambda cache, rows, x: cache.index_put((rows,), x),
    "a slice": lambda cache, rows, x: cache.slice_scatter(x, 0, 3, 5),
    "a slice from behind": lambda cache, rows, x: cache.slice_scatter(x, 0, -3, -1),
    "a slice of a slice": lambda cache, rows, x: cache.slice_scatter(
        cache[:, 1:3].slice_scatter(x[:, 1:3], 0, 1, 3), 1, 1, 3
    ),
    "rows of a slice": lambda cache, rows, x: cache.slice_scatter(cache[:, :3].index_put((rows,), x[:, :3]), 1, 0, 3),
    "every other row": lambda cache, rows, x: cache.slice_scatter(x, 0, 1, 5, 2),
}
READS_BEFORE: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "moved": lambda cache, rows, x: cache.slice_scatter(cache[1:], 0, 0, 5),
    "doubled": lambda cache, rows, x: cache.slice_scatter(cache[2:4] * 2, 0, 2, 4),
    "of another slice": lambda cache, rows, x: cache.slice_scatter(cache[:, 1:3].index_put((rows,), x[:, :2]), 1, 0, 2),
    "what is there": lambda cache, rows, x: cache.slice_scatter(
        cache[:, :2].index_put((rows,), cache[2:4, 2:]), 1, 0, 2
    ),
    "of the slice itself": lambda cache, rows, x: cache.slice_scatter(
        (part := cache[:, :2]).index_put((rows,), part[:2] + 1), 1, 0, 2
    ),
}


@pytest.mark.parametrize("how", [*WRITES, *READS_BEFORE])
@pytest.mark.parametrize("read_again", [False, True])
def test_a_cache_of_one_size_is_written_where_it_is(read_again: bool, how: str) -> None:
    """Unless something reads what was there before."""
    write = (WRITES | READS_BEFORE)[how]

    class Rows(nn.Module):
        def forward(self, cache: torch.Tensor, rows: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            new = write(cache, rows, x)
            return new, new.sum(0) + (cache.sum(0) if read_again else 0)

    cache, rows, x = torch.randn(6, 4), torch.tensor([2, 3]), torch.randn(2, 4)
    captured = capture(Rows(), (cache, rows, x), {})
    graph = localize(shard_graph(captured, 1).graph, 0)
    lowered = LoweredGraph(graph, 0, captured.constants, captured.regions, {0: 0}, Lowering(), False)
    before = cache.clone()
    with torch.no_grad():
        expected = Rows()(before, rows, x)
        found = lowered.run(cache, rows, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    in_place = how in WRITES and not read_again
    assert (found[0] is cache) is in_place
    assert torch.equal(cache, before) is not in_place


def test_a_static_cache_is_written_where_it_is() -> None:
    with torch.no_grad():
        model, _ = make("llama")
        ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
        dense = copy.deepcopy(model)
        caches = [transformers.StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
        autotp.parallelize(model, 1)
        for start, end in ((0, 5), (5, 6), (6, 8), (8, 9)):
            found, expected = (
                m(input_ids=ids[:, start:end], past_key_values=c, use_cache=True)
                for m, c in zip((model, dense), caches, strict=True)
            )
            torch.testing.assert_close(found.logits, expected.logits)
        for a, b in zip(*(c.layers for c in caches), strict=True):
            torch.testing.assert_close(a.keys, b.keys)
            torch.testing.assert_close(a.values, b.values)
        graph = autotp.graph(model).lowered(Lowering(), False)
        assert graph.found["cache_in_place"] == 2 * model.config.num_hidden_layers


def test_exact_passes_leave_every_bit() -> None:
    for name in NAMES:
        model, kwargs, programs = programs_of(name, 1)
        with Float64(), torch.no_grad():
            plain = outputs(Simulation(model, 1, programs, lowering=Lowering.none())(**kwargs))
            exact = outputs(Simulation(model, 1, programs, lowering=Lowering().exactly())(**kwargs))
        assert all(torch.equal(a, b) for a, b in zip(plain, exact, strict=True)), name


def test_merged_weights_stay_parameters() -> None:
    """Their names, values, steps, casts and assignments; and copies of the model have their own."""
    with Float64():
        dense, kwargs = make("llama")
        model = autotp.parallelize(copy.deepcopy(dense), 1, example_inputs=kwargs)
        assert list(model.state_dict()) == list(dense.state_dict())
        steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (dense, model)]
        for _ in range(2):
            for m, step in zip((dense, model), steps, strict=True):
                step.zero_grad()
                backward(outputs(m(**kwargs)))
                step.step()
        assert all(relative_error(a, b) < 1e-10 for a, b in zip(dense.parameters(), model.parameters(), strict=True))
        twin = copy.deepcopy(model)
        name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("k_proj.weight"))
        replaced = torch.nn.Parameter(torch.randn_like(weight))
        for m in (dense, model):
            m.get_submodule(name.removesuffix(".weight")).weight = replaced
        with torch.no_grad():
            assert relative_error(outputs(dense(**kwargs))[0], outputs(model(**kwargs))[0]) < 1e-10
            assert relative_error(outputs(model(**kwargs))[0], outputs(twin(**kwargs))[0]) > 1e-6
            dense.get_parameter(name).mul_(2)
            assert relative_error(outputs(dense(**kwargs))[0], outputs(model(**kwargs))[0]) < 1e-10
        for m in (dense, model):
            m.to(torch.float32).to(torch.float64)
        with torch.no_grad():
            assert relative_error(outputs(dense(**kwargs))[0], outputs(model(**kwargs))[0]) < 1e-10


class _RootWeight(nn.Module):
    """A weight whose name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 4))
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(x @ self.weight.t()))  # type: ignore[no-any-return]


def test_the_text_names_each_weight_once() -> None:
    model = autotp.parallelize(_RootWeight(), 1, example_inputs=(torch.ones(3, 4),))
    text = str(autotp.graph(model).lowered(Lowering(), False))
    assert "(self[weight])" in text
    assert "(relu, self[out.weight], self[out.bias])" in text
