"""reduced_config: smaller configs of the same structure, for machines that cannot hold a transformers model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["smaller_configs"]

_DEPTH = re.compile(r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_decoder_layers")
_WIDTH = re.compile(
    r"hidden_size|d_model|n_embd|head_dim|d_kv|v_head_dim|qk_(nope|rope)_head_dim|[qk]v?_lora_rank|"
    r"(moe_|shared_expert_)?intermediate_size|d_ff|ffn_dim|n_inner|(en|de)coder_ffn_dim|vocab_size"
)


def _fields(config: Any, pattern: re.Pattern[str]) -> dict[str, int]:
    """The config's positive integers whose names match a pattern."""
    values = config.to_dict()
    names = {config.attribute_map.get(n, n) for n in (*values, *config.attribute_map)}
    return {
        n: values[n] for n in sorted(names) if pattern.fullmatch(n) and type(values.get(n)) is int and values[n] > 0
    }


def _layers(config: Any, count: int) -> int:
    """The number of first layers that include each kind of layer; two at least."""
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, list) or not kinds:
        return min(count, 2)
    return min(count, max(2, *(kinds.index(k) + 1 for k in set(kinds))))


def smaller_configs(config: Any) -> Iterator[list[str]]:
    """Settings ``field=value`` that make a model smaller, the largest model first.

    First fewer layers, with at least one of each kind. Then also widths, vocabularies and head sizes divided by two,
    four and so on. The numbers of heads and of experts stay, and all else that decides how a model is split.

    Args:
        config: a transformers config.

    Example:
        >>> next(smaller_configs(LlamaConfig()))
        ['num_hidden_layers=2']
    """
    fewer = [f"{name}={_layers(config, value)}" for name, value in _fields(config, _DEPTH).items()]
    yield fewer
    widths = _fields(config, _WIDTH)
    for factor in (2, 4, 8, 16, 32, 64):
        if all(value % factor == 0 or name == "vocab_size" for name, value in widths.items()):
            yield [*fewer, *(f"{name}={max(value // factor, 1)}" for name, value in widths.items())]
