"""model_loader: load models named on the command line: directories, transformers model types, factories."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autotp.capture.example_inputs import ExampleInputs, example_call
from autotp.cli.options import BadModelError

__all__ = ["Loaded", "load"]


@dataclass
class Loaded:
    """A model, and example inputs to capture it with (None: autotp finds some)."""

    model: nn.Module
    example_inputs: ExampleInputs


def load(name: str, settings: Sequence[str], *, weights: bool, size: tuple[int, int]) -> Loaded:
    """The model that a command line names.

    Args:
        name: a directory with a ``config.json``, a transformers model type, or ``package.module:factory``.
        settings: ``field=value`` overrides of a transformers config.
        weights: whether weights are needed; without, transformers models are built on the meta device.
        size: batch and sequence length of example token ids.

    Raises:
        BadModelError: nothing of that name, a factory that fails, or a field that the config lacks.
    """
    if ":" in name and not os.path.exists(name):
        if settings:
            raise BadModelError("--set overrides fields of a transformers config; a factory makes its model itself")
        return _from_factory(name)
    with _quiet_transformers():
        return _from_transformers(name, settings, weights, size)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Let transformers log errors only."""
    transformers = _transformers()
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _transformers() -> Any:
    """The module transformers."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise BadModelError("transformers is not installed: pip install 'autotp[transformers]'") from None


def _from_factory(name: str) -> Loaded:
    """The model that ``package.module:factory`` returns, or is."""
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise BadModelError(f"{name}: cannot import {module_name}: {error}") from None
    finally:
        sys.path.pop(0)
    for part in attribute.split("."):
        if not hasattr(target, part):
            near = difflib.get_close_matches(part, dir(target), 1)
            raise BadModelError(f"{name}: {module_name} has no {part}" + (f"; did you mean {near[0]}?" if near else ""))
        target = getattr(target, part)
    try:
        result = target() if callable(target) and not isinstance(target, nn.Module) else target
    except Exception as error:
        raise BadModelError(f"{name}: the factory failed: {type(error).__name__}: {error}") from None
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise BadModelError(
            f"{name} gave a {type(model).__name__}; it must return a module or (module, example_inputs)"
        )
    return Loaded(model, inputs)


def _from_transformers(name: str, settings: Sequence[str], weights: bool, size: tuple[int, int]) -> Loaded:
    """The model of a directory or of a transformers model type."""
    transformers = _transformers()
    directory = Path(name)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise BadModelError(f"{name} has no config.json: give a directory that a transformers model was saved in")
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        except (ValueError, OSError) as error:
            raise BadModelError(f"{name}/config.json: {str(error).splitlines()[0]}") from None
    else:
        types = list(transformers.CONFIG_MAPPING.keys())
        if name not in types:
            near = difflib.get_close_matches(name, types, 3)
            raise BadModelError(
                f"{name!r} is no directory with a config.json, no package.module:factory and no transformers model type"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
        config = transformers.CONFIG_MAPPING[name]()
    for setting in settings:
        _override(config, setting)
    saved = directory.is_dir() and any(directory.glob("*.safetensors")) | any(directory.glob("*.bin"))
    auto = _auto_class(transformers, config)
    try:
        if weights and saved and not settings:
            model = auto.from_pretrained(directory, local_files_only=True)
        elif weights:
            torch.manual_seed(0)
            model = auto.from_config(config)
        else:
            with torch.device("meta"):
                model = auto.from_config(config)
    except Exception as error:
        raise BadModelError(
            f"{name}: the model cannot be built: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    return Loaded(model.eval(), _ids(model, size))


def _override(config: Any, setting: str) -> None:
    """Set a field of a config as ``field=value`` says."""
    field, equals, text = setting.partition("=")
    if not equals:
        raise BadModelError(f"--set {setting}: write --set field=value")
    if not hasattr(config, field):
        near = difflib.get_close_matches(field, list(config.to_dict()), 3)
        raise BadModelError(
            f"--set {field}: a {config.model_type} config has no such field"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    try:
        setattr(config, field, value)
    except Exception as error:
        raise BadModelError(f"--set {setting}: {' '.join(str(error).split())}") from None
    count = getattr(config, "num_hidden_layers", None)
    if field == "num_hidden_layers" and isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:count]


def _auto_class(transformers: Any, config: Any) -> Any:
    """The auto class for a config: the one that its ``architectures`` name, else one with a head."""
    heads = ["AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModel"]
    if getattr(config, "is_encoder_decoder", False):
        heads = ["AutoModelForSeq2SeqLM", *heads]
    elif not getattr(config, "is_decoder", False) and type(config) in transformers.AutoModelForMaskedLM._model_mapping:
        heads = ["AutoModelForMaskedLM", *heads]
    architecture = (getattr(config, "architectures", None) or [None])[0]
    classes = [getattr(transformers, h) for h in heads if type(config) in getattr(transformers, h)._model_mapping]
    for auto in classes:
        cls = auto._model_mapping[type(config)]
        if architecture and architecture in [c.__name__ for c in (cls if isinstance(cls, (tuple, list)) else (cls,))]:
            return auto
    if not classes:
        raise BadModelError(f"transformers has no language model or encoder for a {config.model_type} config")
    return classes[0]


def _ids(model: nn.Module, size: tuple[int, int]) -> ExampleInputs:
    """The model's own dummy inputs, with token ids of the size asked for."""
    _, kwargs = example_call(model, None)
    batch, length = size

    def resized(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            pattern = value.reshape(-1)
            return pattern[torch.arange(batch * length) % pattern.numel()].view(batch, length)
        return value

    return {k: resized(v) for k, v in kwargs.items()}
