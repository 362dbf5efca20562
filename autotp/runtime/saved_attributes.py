"""saved_attributes: what saving writes into a config, left out of the guards.

``save_pretrained`` of transformers notes in the config how the model was saved, on the rank that saves. No forward
computes anything else for that. Compared as other attributes are, it would end the run at the next call.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

__all__ = ["NOTES", "is_noted_dtype"]

NOTES = frozenset(
    {
        "_commit_hash", "_name_or_path", "architectures", "auto_map", "name_or_path", "transformers_version",
        "transformers_weights",
    }
)  # fmt: skip
"""The attributes of a config that say where a checkpoint is, or who wrote it."""


def is_noted_dtype(name: str, value: Any, dtypes: Collection[torch.dtype]) -> bool:
    """Whether an attribute of a config only says which dtype the model's parameters have.

    Args:
        name: the attribute's name.
        value: its value: a dtype, or the name of one.
        dtypes: the dtypes of the parameters.
    """
    return name in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") in {
        str(d).removeprefix("torch.") for d in dtypes
    }
