"""checkpoint_names: from the names of weights in transformers' files to their names in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from autotp.utils.value_types import is_a

__all__ = ["model_part", "with_model_names"]

T = TypeVar("T")


def with_model_names(model: nn.Module, sources: Mapping[str, T]) -> dict[str, T]:
    """A checkpoint's tensors by the model's own names.

    A transformers model itself knows how names in files become its own (``embed_out`` is ``lm_head`` in GPT-NeoX), and
    which names in files it ignores. A tensor that the model has in other pieces (experts one by one) keeps its name.
    Names for other models stay as they are.
    """
    if not is_a(model, "transformers.modeling_utils.PreTrainedModel"):
        return dict(sources)
    own = model.state_dict()
    if sources.keys() <= own.keys():
        return dict(sources)
    rename = _renaming(model)
    ignored = [re.compile(text) for text in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    renamed = {name: source for name, source in sources.items() if name in own}
    for name in [n for n in sources if n not in own]:
        new = rename(name, own)
        if new in own or not any(pattern.search(new) for pattern in ignored):
            renamed[name if new in renamed else new] = sources[name]
    return renamed


def model_part(model: nn.Module, sources: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a training state that are a model's, by the model's own names.

    A state dict of the model stands in it as it is, or under ``model.``; the one of both counts that has more of the
    model's names. What stands beside it is left out. In a state dict as it is, that is each name of whose first word
    the model has none (``optim.state.0.exp_avg``).
    """
    own = model.state_dict().keys()
    under = {name.removeprefix("model."): t for name, t in sources.items() if name.startswith("model.")}
    plain, below = with_model_names(model, sources), with_model_names(model, under)
    fits = [(len(s.keys() & own), len(s_own.keys() & own)) for s, s_own in ((sources, plain), (under, below))]
    if fits[1] > fits[0]:
        return below
    words = {name.partition(".")[0] for name in own}
    return {name: t for name, t in plain.items() if name.partition(".")[0] in words}


def _renaming(model: Any) -> Callable[[str, dict[str, Any]], str]:
    """A function that returns the model's name for a name in a file."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers has moved it
        return lambda name, own: name
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    prefix = getattr(model, "base_model_prefix", None) or None
    return lambda name, own: str(rename_source_key(name, renamings, [], prefix, own)[0])
