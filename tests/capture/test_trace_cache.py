"""Copies of repeated calls: the capture is, node for node, the one that torch.export makes alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.arguments.mutations import StateMutation
from autotp.capture import export, trace_cache
from autotp.capture.capture import capture
from autotp.capture.captured_graph import CapturedGraph
from autotp.capture.trace_cache import TraceCache
from tests.models import CASES, make

X = torch.randn(2, 5, 8)


def _texts(captured: CapturedGraph) -> list[tuple[Any, ...]]:
    """All of a capture that a pass or a person may look at."""

    def kind(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()} {value.storage_offset()}"
        return str([kind(v) for v in value]) if isinstance(value, (tuple, list)) else str(value)

    place = {n: i for i, n in enumerate(captured.graph.nodes)}  # names are numbered, and fewer sizes come
    nodes = [
        (re.sub(r"_\d+$", "", n.name), n.op, str(n.target), str(fx.map_arg((n.args, n.kwargs), place.get)),
         kind(n.meta.get("val")), n.meta["grad"], str(n.meta.get("nn_module_stack")), n.meta.get("stack_trace"))
        for n in captured.graph.nodes
    ]  # fmt: skip
    constants = [(name, t.tolist() if t.device.type != "meta" else t.shape) for name, t in captured.constants.items()]
    rest = (constants, captured.parameters, captured.outputs.leaves, captured.static, captured.equal)
    return [*nodes, rest, sorted(str(where) for _, where in captured.guards)]


class _Alone:
    """In place of ``TraceCache``: torch.export alone."""

    misled = False

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class _Watched(TraceCache):
    """Remembers the modes that were made."""

    made: list[TraceCache]

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)


def both(monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]) -> Any:
    """The captures with and without copies, and the mode that made them."""
    _Watched.made = []
    found = []
    for mode in (_Watched, _Alone):
        torch.manual_seed(0)
        monkeypatch.setattr(export, "TraceCache", mode)
        model, args, kwargs = make()
        found.append(_texts(capture(model, args, kwargs)))
    return found, _Watched.made[0]


@pytest.mark.parametrize(
    ("name", "train"),
    [(name, False) for name in CASES if name not in ("tutorial", "neox")] + [("encoder", True), ("bert", True)],
)
def test_models(name: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def case() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        model, kwargs = make(name)
        return model.train(train), (), kwargs

    (copied, alone), mode = both(monkeypatch, case)
    assert copied == alone
    assert mode.copied > 0
    assert not mode.misled


@pytest.mark.parametrize("kind", ["T5", "Gemma2", "Albert", "GPT2"])
def test_more_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder and decoder; alternating layer kinds; one layer called often; a cache in the output."""
    import transformers

    options: dict[str, dict[str, Any]] = {
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
        "Gemma2": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "head_dim": 8, "intermediate_size": 48, "vocab_size": 100, "sliding_window": 4},
        "Albert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
                   "vocab_size": 100, "embedding_size": 16},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2},
    }  # fmt: skip
    auto = {"T5": "ForConditionalGeneration", "Gemma2": "ForCausalLM", "Albert": "Model", "GPT2": "LMHeadModel"}
    config = getattr(transformers, f"{kind}Config")(**options[kind])
    ids = torch.randint(3, 99, (2, 7))
    call: dict[str, Any] = {"input_ids": ids, "use_cache": kind == "GPT2"}
    if kind == "T5":
        call["labels"], config.decoder_start_token_id = ids, 0
    if kind == "Albert":
        del call["use_cache"]
        call["output_hidden_states"] = True

    (copied, alone), mode = both(monkeypatch, lambda: (getattr(transformers, kind + auto[kind])(config), (), call))
    assert copied == alone
    assert mode.copied > 0
    assert not mode.misled


class Layer(nn.Module):
    """A layer to which something is done before its forward, differently in each layer."""

    count = 0

    def __init__(self, index: int, forward: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.index, self.how, self.scale = index, forward, 1 / (index + 1)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8, eps=1e-5 if index != 2 else 1e-3)
        self.dropout = nn.Dropout(0.1 if index != 1 else 0.3)
        self.register_buffer("table", torch.full((8,), float(index)))
        self.tables = [torch.full((8,), float(index))]
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.how(self, self.norm(x), *more))))


class Stack(nn.Module):
    """Layers one after the other; ``prepare`` changes them first, ``parent`` reads them last."""

    def __init__(
        self, how: Callable[..., torch.Tensor] = lambda layer, x: x,
        prepare: Callable[[nn.ModuleList], Any] | None = None,
        parent: Callable[[Stack, torch.Tensor], torch.Tensor] | None = None,
        more: Callable[[], tuple[Any, ...]] = tuple,
    ) -> None:  # fmt: skip
        super().__init__()
        Layer.count = 0
        self.layers = nn.ModuleList(Layer(i, how) for i in range(4))
        if prepare is not None:
            prepare(self.layers)
        self.parent, self.more = parent, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = self.more()
        for layer in self.layers:
            x = layer(x, *more)
        return self.parent(self, x) if self.parent else x + len(more[0]) if more else x


def _counted(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    Layer.count += 1
    return x * Layer.count


def _appended(layer: Layer, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    seen.append(x)
    return x + seen[0]


def _remembered(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    layer.seen = x * 2
    return x


def _in_place(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y += 1
    y.mul_(x)
    return y


def _branched(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[1] > 3 and layer.index % 2 else x * 3


def _share(layers: nn.ModuleList) -> None:
    layers[2].up.weight = layers[0].up.weight


def _replace(layers: nn.ModuleList) -> None:
    layers[1].norm = nn.Identity()


def _freeze(layers: nn.ModuleList) -> None:
    layers[1].requires_grad_(False)


def _without_gradient(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = torch.sin(x)
    return y + x


def _constants(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0] * 2)[layer.index % 2] + torch.arange(8) * torch.full((8,), -0.0)


def _zeros(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return x * (1 if layer.index % 2 else True) + (0.0 if layer.index > 1 else -0.0)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


def _checkpointed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda y: torch.sin(y) * layer.scale, x, use_reentrant=False)


def _mapped(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(lambda y: y * y.sum() * layer.scale)(x)


def _cast(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=layer.index > 1):
        return layer.up(x)[..., :8].float()


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "equal layers": lambda: Stack(),
    "a scalar that differs": lambda: Stack(lambda layer, x: x * layer.scale),
    "an index that is read": lambda: Stack(lambda layer, x: x if layer.index else x * 2),
    "a counter on the class": lambda: Stack(_counted),
    "a buffer": lambda: Stack(lambda layer, x: x * layer.table),
    "a plain list of tensors": lambda: Stack(lambda layer, x: x * layer.tables[0]),
    "a parameter of another layer": lambda: Stack(prepare=_share),
    "a submodule replaced": lambda: Stack(prepare=_replace),
    "a layer that is frozen": lambda: Stack(prepare=_freeze),
    "dropout and eps that differ": lambda: Stack(lambda layer, x: layer.dropout(x)),
    "one layer in eval mode": lambda: Stack(lambda layer, x: layer.dropout(x), lambda layers: layers[3].eval()),
    "a list that grows": lambda: Stack(_appended, more=lambda: ([],)),
    "ops in place": lambda: Stack(_in_place),
    "a branch on a size": lambda: Stack(_branched),
    "the same tensor twice": lambda: Stack(lambda layer, x: torch.cat([x, x if layer.index else x + 1], 1)[:, :5]),
    "a region without gradients": lambda: Stack(_without_gradient),
    "constants": lambda: Stack(_constants),
    "numbers that are equal but not the same": lambda: Stack(_zeros),
    "several results": lambda: Stack(lambda layer, x: x.sort(-1).values + x.chunk(2, 1)[0].max() * x.amax()),
    "a cast to what it is": lambda: Stack(lambda layer, x: x.to(torch.float32) * x),
    "sizes computed": lambda: Stack(lambda layer, x: x + x.new_ones(x.shape[1] * 2, 8)[: x.shape[1]] * x.shape[0]),
    "an autograd function": lambda: Stack(lambda layer, x: Doubled.apply(x)),
    "checkpoints": lambda: Stack(_checkpointed),
    "vmap": lambda: Stack(_mapped),
    "autocast in some layers": lambda: Stack(_cast),
    "modules called again": lambda: Stack(lambda layer, x: layer.norm(layer.norm(x))),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied, alone), mode = both(monkeypatch, lambda: (TRAPS[name](), (X,), {}))
    assert copied == alone
    assert mode.copied > 0
    assert not mode.misled


def test_an_attribute_read_by_the_parent_is_no_function() -> None:
    mutation = capture(Stack(_remembered, parent=lambda s, x: x + s.layers[1].seen), (X,), {})
    assert isinstance(mutation, StateMutation)
    assert "keeps something on the model (layers.0.seen)" in mutation.message


def test_a_view_changed_in_place_is_captured_by_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 1:].add_(1)  # the second layer's view is a copy, of which autograd does not know that it is a view
        return y

    (copied, alone), mode = both(monkeypatch, lambda: (Stack(change), (X,), {}))
    assert copied == alone
    assert mode.misled


def test_a_failure_of_the_copies_is_no_failure_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("broken")

    expected = _texts(capture(Stack(), (X,), {}))
    monkeypatch.setattr(TraceCache, "_copy", fail)
    assert _texts(capture(Stack(), (X,), {})) == expected


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies that do not look at numbers."""
    key = trace_cache._argument_key
    monkeypatch.setattr(trace_cache, "_argument_key", lambda x, t: float if isinstance(x, float) else key(x, t))


def test_the_comparison_sees_a_wrong_copy(blind: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied, alone), _ = both(monkeypatch, lambda: (TRAPS["a scalar that differs"](), (X,), {}))
    assert copied != alone


def test_equal_to_dense() -> None:
    report = autotp.verify(TRAPS["a buffer"](), 2, example_inputs=(X,))
    assert report.ok, str(report)


def test_every_function_of_a_further_layer_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch analyses none of it again, so that a further layer costs its own Python and little more."""
    monkeypatch.setattr(export, "TraceCache", _Watched)

    def copied(layers: int) -> tuple[int, int]:
        _Watched.made = []
        model = nn.Sequential(*[Layer(0, lambda layer, x: x) for _ in range(layers)])
        captured = capture(model, (X,), {})
        return _Watched.made[0].copied, sum(n.op == "call_function" for n in captured.graph.nodes)

    (two, few), (many, all_of_them) = copied(2), copied(34)
    assert many - two >= all_of_them - few > 0
