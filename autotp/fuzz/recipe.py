"""recipe: what a random dense transformer is made of."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class AttentionRecipe:
    """How a model attends.

    Attributes:
        kv_heads: heads of keys and values.
        queries: heads of queries for each head of keys and values.
        head_size: elements of a head.
        fused: how the weights of queries, keys and values are stored: apart, side by side, by group, by head, or those
            of keys and values as a pair.
        attention: how attention is computed.
        repeat: how each head of keys and values is repeated for its queries.
        mask: the kind of attention mask.
        written: how the mask is applied: as a boolean, added to the scores, or filled in.
        scores: what changes the scores: soft caps, sinks.
        gate: whether a gate multiplies the result, by feature or by head.
        qk_norm: a norm of queries and keys, for each head or over all of them.
        positions: the kind of positional information.
    """

    kv_heads: int = 1
    queries: int = 1
    head_size: int = 2
    fused: str = "apart"
    attention: str = "sdpa"
    repeat: str = "expand"
    mask: str = "none"
    written: str = "boolean"
    scores: str = "plain"
    gate: str = "none"
    qk_norm: str = "none"
    positions: str = "none"

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.kv_heads * self.queries


@dataclass(frozen=True, kw_only=True)
class BlockRecipe:
    """The parts of a block beside its attention.

    Attributes:
        hidden: features of the residual stream; 0 for as many as all heads together have.
        weights: how a product with a weight is written.
        bias: whether products have biases.
        ffn: neurons of an MLP.
        mlp: the kind of MLP.
        activation: its activation.
        norm: the kind of norms.
        place: where norms stand.
        parallel: whether attention and MLP read the same input, and their results are added.
        cross: whether blocks also attend to a memory.
        residual: the factor of each addition to the residual stream.
    """

    hidden: int = 0
    weights: str = "linear"
    bias: bool = False
    ffn: int = 5
    mlp: str = "plain"
    activation: str = "gelu"
    norm: str = "layer"
    place: str = "pre"
    parallel: bool = False
    cross: bool = False
    residual: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The model around the blocks, and the sizes of the inputs.

    Attributes:
        layers: the number of blocks.
        vocabulary: the number of words.
        embedding: what is done to embeddings.
        tied: whether the head's weight is the embedding's.
        loss: how the loss is written.
        batch: rows of the inputs.
        length: words in a row.
    """

    layers: int = 1
    vocabulary: int = 16
    embedding: str = "plain"
    tied: bool = False
    loss: str = "none"
    batch: int = 1
    length: int = 1


@dataclass(frozen=True, kw_only=True)
class Recipe(ModelRecipe, BlockRecipe, AttentionRecipe):
    """A dense transformer in a few words; the defaults are the simplest one."""

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return self.hidden or self.heads * self.head_size

    @property
    def valid(self) -> bool:
        """Whether there is such a model."""
        rotary = self.positions.startswith("rotary")
        return (
            self.heads <= 16
            and not (rotary and self.head_size % 2)
            and not (self.positions == "rotary half" and self.head_size % 4)
            and not (self.repeat == "enable_gqa" and self.attention != "sdpa")
            and not (self.repeat == "grouped" and self.attention == "sdpa")
            and not (self.scores != "plain" and self.attention == "sdpa")
            and not (self.qk_norm == "full" and self.fused not in ("apart", "pair"))
            and not (self.parallel and self.place != "pre")
            and not (self.loss == "shifted" and self.length == 1)
        )

    @staticmethod
    def draw(source: random.Random) -> Recipe:
        """Draw a random recipe."""
        while True:
            recipe = Recipe(**{name: source.choice(values) for name, values in CHOICES.items()})
            if recipe.valid:
                return recipe

    def simpler(self) -> Iterator[Recipe]:
        """The recipes that are simpler in one field, the simplest first."""
        for name, values in CHOICES.items():
            present = getattr(self, name)
            ordered = list(dict.fromkeys(values))
            for value in ordered[: ordered.index(present)] if present in ordered else ():
                recipe = replace(self, **{name: value})
                if recipe.valid:
                    yield recipe

    def __str__(self) -> str:
        """The Python expression that makes it; fields with their default values are left out."""
        defaults = {f.name: f.default for f in fields(self)}
        values = {name: getattr(self, name) for name in CHOICES}
        return f"Recipe({', '.join(f'{n}={value!r}' for n, value in values.items() if value != defaults[n])})"


CHOICES: dict[str, tuple[Any, ...]] = {
    "layers": (1, 2, 2, 3),
    "kv_heads": (1, 2, 2, 3, 4, 4, 5, 6, 7, 8),
    "queries": (1, 1, 1, 2, 3, 4),
    "head_size": (2, 5, 8, 8, 12, 12, 16),
    "hidden": (0, 0, 0, 30, 48, 65),
    "ffn": (5, 64, 67, 97, 130),
    "vocabulary": (16, 300, 401, 512),
    "fused": ("apart", "side by side", "by group", "by head", "pair"),
    "weights": ("linear", "linear", "conv1d", "transposed", "einsum"),
    "attention": ("sdpa", "matmul", "einsum", "baddbmm"),
    "repeat": ("expand", "repeat_interleave", "enable_gqa", "grouped"),
    "mask": ("none", "causal", "padding", "causal padding", "window"),
    "written": ("boolean", "additive", "filled"),
    "scores": ("plain", "plain", "capped", "sinks"),
    "gate": ("none", "none", "feature", "head"),
    "qk_norm": ("none", "none", "head", "full"),
    "positions": ("none", "learnt", "sinusoidal", "rotary", "rotary pairs", "rotary half", "alibi", "relative"),
    "norm": ("layer", "rms", "by hand"),
    "place": ("pre", "post", "sandwich"),
    "parallel": (False, False, True),
    "mlp": ("plain", "gated", "gated side by side", "gated pairs"),
    "activation": ("gelu", "silu", "relu", "tanh gelu", "squared relu"),
    "bias": (False, True),
    "cross": (False, False, False, True),
    "embedding": ("plain", "scaled", "normed", "padded", "typed"),
    "residual": (1.0, 1.0, 0.5),
    "tied": (False, True),
    "loss": ("none", "flattened", "shifted", "log softmax", "classes second"),
    "batch": (1, 2, 3),
    "length": (1, 5, 6, 7),
}
"""The values of each field, the simplest first, in the order in which fields are drawn. Some stand there twice and are
drawn more often. Most sizes are large enough that splitting pays."""
