"""Every text architecture of transformers, from its own mappings, built small with awkward weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto

from tests.zoo.small import HIDDEN, small_config

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "encoder": modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
}


@dataclass(frozen=True, order=True)
class Architecture:
    """One entry of transformers' mappings: what it is for, its model type, its class."""

    kind: str
    type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.type}"

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """A small model in float64 and eval mode, no weight of it zero or one, and inputs for it."""
        cls = getattr(transformers, self.class_name)
        config = small_config(cls.config_class, kind=self.kind)
        torch.manual_seed(0)
        model = cls(config).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
                else:
                    p.add_(0.3 * torch.randn_like(p))
        return model, _inputs(model)


def architectures() -> list[Architecture]:
    """All of them, each class once: one under several model types is the first's."""
    seen: set[tuple[str, str]] = set()
    found = []
    for kind, mapping in MAPPINGS.items():
        own = sorted(mapping.items(), key=lambda item: item[0].replace("-", "_") not in _module_of(item[1]))
        for type_, name in own:
            if (kind, name) not in seen:  # GPT-SW3 is GPT-2's class
                seen.add((kind, name))
                found.append(Architecture(kind, type_, name))
    return found


def _module_of(class_name: str) -> str:
    cls = getattr(transformers, class_name, None)
    return getattr(cls, "__module__", "")


def _inputs(model: nn.Module) -> dict[str, Any]:
    """Token ids, and labels where they make a loss."""
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": torch.randint(5, 90, (2, 12))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 90, (2, 7))
    if "use_cache" in takes or hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
        try:
            _run(model, inputs)
        except TypeError:
            del inputs["use_cache"]
    if "encoder_hidden_states" in takes and (states := _states_attended_to(model, inputs)) is not None:
        inputs["encoder_hidden_states"] = states
    if "labels" in takes:
        labelled = {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"]).clone()}
        try:
            _run(model, labelled)
        except Exception:  # labels of another kind than words
            return inputs
        return labelled
    return inputs


def _states_attended_to(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
    """States of an encoder, where a decoder has a use for them: where others change what it returns."""
    width = getattr(model.config, "hidden_size", None) or getattr(model.config, "d_model", HIDDEN)
    one, other = torch.randn(2, 2, 9, width, dtype=torch.float64)
    try:
        first, second = (_run(model, {**inputs, "encoder_hidden_states": x}) for x in (one, other))
    except Exception:  # the model is no decoder after all
        return None
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return one if any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs) else None


def _run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model(**inputs)
