"""trace: torch.export of one call of a model, along the ways that its Python takes when it runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import traceback
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from autotp.backward import OwnBackward, refuse_function, refuse_own_backward
from autotp.errors import CaptureError
from autotp.forwards import capturing
from autotp.functions import checked_functions
from autotp.repeats import Repeats

__all__ = ["Outputs", "trace"]


@dataclass
class Outputs:
    """How the outputs of a traced call go together: export undoes what forward sets on the module itself."""

    spec: Any = None
    leaves: list[tuple[bool, Any]] = field(default_factory=list)
    refills: bool = False
    agreeing: Container[type] = ()


class _Flat(nn.Module):
    """A model behind a signature of tensors only, so that nothing else has to be exportable."""

    def __init__(
        self,
        model: nn.Module,
        leaves: list[Any],
        spec: Any,
        outputs: Outputs,
        around: Sequence[contextlib.AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec, self._outputs, self._around = leaves, spec, outputs, around

    def forward(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, torch.Tensor) else x for x in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        with contextlib.ExitStack() as stack:
            for context in self._around:
                stack.enter_context(context)
            result = self.model.forward(*args, **kwargs)  # not a call: the model's own hooks run around ours
        after = pytree.tree_leaves((args, kwargs))
        self._outputs.refills = len(after) != len(leaves) or any(a is not b for a, b in zip(after, leaves, strict=True))
        outputs, self._outputs.spec = pytree.tree_flatten(result)
        results: list[torch.Tensor] = []
        self._outputs.leaves = []
        for leaf in outputs:
            if isinstance(leaf, torch.Tensor):
                self._outputs.leaves.append((True, len(results)))
                results.append(leaf)
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                self._outputs.leaves.append((False, leaf))
            else:
                raise CaptureError(
                    f"the model returns a {type(leaf).__module__}.{type(leaf).__name__}, into which torch's pytree "
                    "cannot see: register it with torch.utils._pytree.register_pytree_node, or return tensors, "
                    "tuples, dicts or dataclasses registered by torch.export.register_dataclass"
                )
        refuse_own_backward(
            results, [*self.model.parameters(), *self.model.buffers(), *tensors], self._outputs.agreeing
        )
        return tuple(results)


class _Eagerly(contextlib.AbstractContextManager[None]):
    """Lets a model's Python take the ways that it takes when it just runs.

    ``torch.compiler.is_compiling()`` and ``is_exporting()`` are true while torch.export traces, and models
    then leave out what they think cannot be traced: a mask that is not needed is made all the same, so that
    no flash kernel takes the attention; a triangular system is solved in a loop of as many steps as rows.
    """

    def __enter__(self) -> None:
        self._flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
        torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False

    def __exit__(self, *_: object) -> None:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = self._flags


def _causal_as_told(mask: Any = None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """In place of torch's look at the values of a mask, which finds out whether a causal kernel will do without it."""
    return bool(is_causal)


def trace(model: nn.Module, leaves: list[Any], spec: Any, tensors: list[torch.Tensor]) -> tuple[Any, Outputs]:
    """torch's export of a call, and how its outputs go together.

    The model's Python goes as it does when the model runs; where that cannot be traced, as it does for an
    export. What repeats is copied; where that fails, or may mislead, torch does all of it alone.
    """
    from torch._dynamo import config as settings  # a second's import, which torch.export does anyway

    shapes = ([{d: torch.export.Dim.AUTO for d, n in enumerate(t.shape) if n > 1} for t in tensors],)
    first: Exception | None = None
    for eagerly, repeating in itertools.product((True, False), (True, False)):
        if eagerly and first:
            continue
        outputs, repeats = Outputs(), Repeats()
        around: list[contextlib.AbstractContextManager[Any]] = [
            *([_Eagerly()] if eagerly else []),
            *([repeats] if repeating else []),
        ]
        try:
            with (
                OwnBackward(),
                checked_functions(capturing, refuse_function) as outputs.agreeing,
                _use_lazy_graph_module(True),  # torch's passes each make a graph's code anew, and none runs it
                settings.patch(fake_tensor_cache_enabled=not repeating),  # what Repeats copies is never looked up there
                mock.patch.object(nn.modules.transformer, "_detect_is_causal_mask", _causal_as_told),
            ):
                flat = _Flat(model, leaves, spec, outputs, around)
                exported = torch.export.export(flat, (tensors,), dynamic_shapes=shapes, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            first = first or error
            if not eagerly and (not repeating or _is_data_dependent(error)):
                said = error if _is_data_dependent(first) else first
                raise _explained(model, said, error) from said
        else:
            if not (repeating and repeats.misled):
                break
    return exported, outputs


def _is_data_dependent(error: Exception) -> bool:
    """Whether the model's Python asked for the values in a tensor."""
    return "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__


def _first_line(error: Exception) -> str:
    lines = [x for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _explained(model: nn.Module, error: Exception, as_export: Exception) -> CaptureError:
    """What a user is told of the error met on the way that the model takes, and of the one met on an export's."""
    said = _first_line(error)
    ours = os.path.dirname(__file__)
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and ours not in f.filename
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    at = f" at {place}" if place else ""
    if _is_data_dependent(error):
        return CaptureError(
            f"{type(model).__name__} cannot be captured as one graph: its Python{at} depends on the values in a "
            f"tensor (an `if x.any():`, an `.item()`): {said}\n"
            "Move that out of forward, or use torch.where or torch.cond.",
            place=place,
            reason="Python that depends on the values in a tensor",
        )
    other = _first_line(as_export)
    also = f"On the way that it takes for torch.export the error is {other}\n" if other != said else ""
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph: torch.export met an error{at}: {said}\n{also}"
        "Check that the model runs on these inputs as it is; if it does, the error chained below says what to change.",
        place=place,
        reason=said,
    )
