"""naming: what transformers calls weights in its files, where that is not what it calls them in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from autotp.utils.value_types import is_a

__all__ = ["with_model_names"]

T = TypeVar("T")


def with_model_names(model: nn.Module, found: Mapping[str, T]) -> dict[str, T]:
    """What a checkpoint holds, by the model's own names.

    A transformers model says itself how names in files become its own (``embed_out`` is ``lm_head`` in GPT-NeoX), and
    which in files are of no use to it. What files hold in other pieces than the model has (experts one by one) keeps
    its name. Of other models there is nothing to do.
    """
    if not is_a(model, "transformers.modeling_utils.PreTrainedModel"):
        return dict(found)
    own = model.state_dict()
    if found.keys() <= own.keys():
        return dict(found)
    rename = _renaming(model)
    useless = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    kept = {name: stored for name, stored in found.items() if name in own}
    for name in [n for n in found if n not in own]:
        new = rename(name, own)
        if new in own or not any(pattern.search(new) for pattern in useless):
            kept[name if new in kept else new] = found[name]
    return kept


def _renaming(model: Any) -> Callable[[str, dict[str, Any]], str]:
    """What becomes of a name in a file."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers has moved it
        return lambda name, own: name
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    prefix = getattr(model, "base_model_prefix", None) or None
    return lambda name, own: str(rename_source_key(name, renamings, [], prefix, own)[0])
