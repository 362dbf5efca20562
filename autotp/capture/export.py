"""export: trace one call of a model with torch.export, on the branches that its Python takes in an eager run."""

from __future__ import annotations

import contextlib
import itertools
import os
import traceback
from collections.abc import Container, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.overrides import TorchFunctionMode

from autotp.arguments.boxed import ModuleState, unbox
from autotp.arguments.module_state import ModuleStateTracker
from autotp.arguments.object_tree import plain_leaves
from autotp.arguments.snapshot import ModuleMutation, Snapshot
from autotp.arguments.spec import CallSpec, sorted_by_key
from autotp.capture.custom_backward import RefuseOwnBackward, checked_functions, refuse_function, refuse_own_backward
from autotp.capture.outputs import OutputSpec
from autotp.capture.trace_cache import TraceCache
from autotp.errors import CaptureError
from autotp.modules.forward_patching import capturing

__all__ = ["trace"]


def _leaves_by_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, list[Any]]:
    """The leaves of each argument, by its position or keyword, in the order of the flattened call."""
    args, kwargs, _ = sorted_by_key(args, kwargs)
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: plain_leaves(x)[0] for key, x in arguments}


def _refuse_kept_arguments(
    objects: Sequence[Any], module_states: Sequence[ModuleState], mutations: Sequence[ModuleMutation]
) -> None:
    """Refuse a forward that keeps an object among its arguments on the model: a graph would keep a copy.

    Args:
        objects: the objects among the arguments.
        module_states: the tracked module state after the call.
        mutations: the other changes of the modules.
    """
    argument_ids, seen = set(map(id, objects)), set[int]()
    pending = [*(x.__dict__ for x in module_states), *(m.new for m in mutations)]
    while argument_ids and pending:
        x = pending.pop()
        if id(x) in argument_ids:
            raise CaptureError(
                f"forward keeps its argument, a {type(x).__name__}, on the model: a graph would keep a copy",
                reason="forward keeps an argument on the model",
            )
        content = x if isinstance(x, (list, tuple, dict)) else getattr(x, "__dict__", None)
        if id(x) not in seen and content and not isinstance(x, torch.Tensor) and not callable(x):
            seen.add(id(x))
            pending += content.values() if isinstance(content, dict) else content


class _TensorSignature(nn.Module):
    """A model behind a signature of tensors only, so that nothing else has to be exportable."""

    def __init__(
        self,
        model: nn.Module,
        leaves: list[Any],
        spec: CallSpec,
        outputs: OutputSpec,
        contexts: Sequence[contextlib.AbstractContextManager[Any]],
        state: ModuleStateTracker,
    ) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec, self._outputs, self._contexts = leaves, spec, outputs, contexts
        self._state = state

    def forward(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(x, torch.Tensor) else x for x in self._leaves]
        for i, slot in self._spec.slots.items():  # a tensor in an object may be changed in place
            leaves[i] = leaves[i] if slot.count else leaves[i].clone()
        versions = {id(leaves[i]): leaves[i]._version for i in self._spec.slots}
        args, kwargs = self._spec.unflatten(leaves)
        before = _leaves_by_argument(args, kwargs)
        snapshot = Snapshot(self.model)
        with contextlib.ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            own_args, own_kwargs = unbox(args, kwargs)
            own_kwargs, module_states = self._state.to_modules(own_kwargs)
            try:
                result = self.model.forward(*own_args, **own_kwargs)  # no call: the model's own hooks run around ours
                modes = [c.mode.inference_modes for c in self._contexts if isinstance(c, _EagerFlags)]
                self._outputs.inference = modes == [{True}]
            finally:
                self._state.from_modules(module_states)
                self._outputs.module_mutations = [
                    m for m in snapshot.diff() if not self._state.knows(m.container, m.key)
                ]
                snapshot.restore()
        after = _leaves_by_argument(args, kwargs)
        refills = {key for key, old in before.items() if list(map(id, old)) != list(map(id, after[key]))}
        plain = [x for argument in before.values() for x in argument]
        objects = [(s, x) for s, x in zip(self._spec.states, plain, strict=True) if s is not None]
        _refuse_kept_arguments(
            [x for _, x in objects if not isinstance(x, ModuleState)], module_states, self._outputs.module_mutations
        )
        positions = {i: n for n, i in enumerate(i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))}
        object_tensors = [(positions[i], t) for i, t in enumerate(leaves) if i in self._spec.slots]
        written = {id(t) for _, t in object_tensors if t._version != versions[id(t)]}
        results = self._outputs.record(result, objects, object_tensors, refills, written)
        computed = [x for x in results if isinstance(x, torch.Tensor)]
        weights = [*self.model.parameters(), *self.model.buffers()]
        refuse_own_backward(computed, [*weights, *tensors], self._outputs.agreeing)
        return tuple(results)


_CASTS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half,
          torch.Tensor.bfloat16, torch.Tensor.cpu, torch.Tensor.cuda}  # fmt: skip


class _NoOpCasts(TorchFunctionMode):
    """A mode in which a cast that changes nothing returns its operand; it also records the use of inference mode.

    Attributes:
        inference_modes: whether inference mode was enabled, at each function that was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inference_modes: set[bool] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result, or its operand."""
        self.inference_modes.add(torch.is_inference_mode_enabled())
        result = func(*args, **(kwargs or {}))
        if (
            func in _CASTS
            and not (kwargs or {}).keys() & {"copy", "memory_format"}
            and all(x is not True for x in args)
        ):
            operand = args[0]
            no_op = type(result) is type(operand) and (result.dtype, result.device) == (operand.dtype, operand.device)
            return operand if no_op else result
        return result


class _EagerFlags(contextlib.AbstractContextManager[None]):
    """A context in which a model's Python takes the branches that it takes in an eager run.

    ``torch.compiler.is_compiling()`` and ``is_exporting()`` are true while torch.export traces. Models then avoid code
    that they consider untraceable: they create a mask that is not needed, which rules out the flash kernel of an
    attention, or they solve a triangular system in a loop over its rows. torch.export also returns a new tensor from a
    cast that changes nothing, so that a mutation of the result would be lost to the operand.
    """

    def __enter__(self) -> None:
        self._flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
        torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False
        self.mode = _NoOpCasts()
        self.mode.__enter__()

    def __exit__(self, *error: object) -> None:
        self.mode.__exit__(*error)
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = self._flags


def _declared_causal(mask: Any = None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """The caller's ``is_causal``; torch's own function reads the values of the mask, which a trace does not have."""
    return bool(is_causal)


def trace(
    model: nn.Module,
    leaves: list[Any],
    spec: CallSpec,
    tensors: list[torch.Tensor],
    state: ModuleStateTracker,
    static_dims: Container[tuple[int, int]] = (),
) -> tuple[Any, OutputSpec]:
    """Export a call with torch.export.

    The model's Python takes the branches of an eager run; if those cannot be traced, it takes the branches of an
    export. Nodes of repeated torch calls are copied; if that fails, or may mislead autograd, torch traces every call.

    Args:
        model: the model.
        leaves: the leaves of the call's arguments, tracked module state included.
        spec: how to unflatten the leaves.
        tensors: the tensors among the leaves, which the exported program takes.
        state: the tracked module state, which is put on the modules while forward runs.
        static_dims: the dims, as ``(input, dim)``, that are constants in the graph.

    Returns:
        torch's exported program, and how to rebuild the outputs from its results.

    Raises:
        CaptureError: the call cannot be captured as one graph.
    """
    from torch._dynamo import config as settings  # takes a second to import; torch.export imports it anyway

    auto = torch.export.Dim.AUTO
    shapes = (
        [
            {d: auto for d, n in enumerate(t.shape) if n > 1 and (i, d) not in static_dims}
            for i, t in enumerate(tensors)
        ],
    )
    first_error: Exception | None = None
    for eager, cached in itertools.product((True, False), (True, False)):
        if eager and first_error:
            continue
        outputs, cache = OutputSpec(), TraceCache()
        contexts: list[contextlib.AbstractContextManager[Any]] = [
            *([_EagerFlags()] if eager else []),
            *([cache] if cached else []),
        ]
        try:
            with (
                RefuseOwnBackward(),
                checked_functions(capturing, refuse_function) as outputs.agreeing,
                _use_lazy_graph_module(True),  # each of torch's passes would generate a graph's code, which never runs
                settings.patch(fake_tensor_cache_enabled=not cached),  # calls that TraceCache copies never look there
                mock.patch.object(nn.modules.transformer, "_detect_is_causal_mask", _declared_causal),
            ):
                flat = _TensorSignature(model, leaves, spec, outputs, contexts, state)
                exported = torch.export.export(flat, (tensors,), dynamic_shapes=shapes, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            first_error = first_error or error
            if not eager and (not cached or _is_data_dependent(error)):
                cause = error if _is_data_dependent(first_error) else first_error
                raise _capture_error(model, cause, error) from cause
        else:
            if not (cached and cache.misled):
                break
    return exported, outputs


def _is_data_dependent(error: Exception) -> bool:
    """Whether the model's Python read the values of a tensor."""
    return "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__


def _first_line(error: Exception) -> str:
    lines = [x for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _capture_error(model: nn.Module, error: Exception, export_error: Exception) -> CaptureError:
    """The error that a user sees of a failed trace.

    Args:
        model: the model.
        error: the error that the user is to see.
        export_error: the error on the branches of an export, which is told too if it differs.
    """
    message = _first_line(error)
    package = os.path.dirname(os.path.dirname(__file__))  # that of autotp
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and package not in f.filename
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    at = f" at {place}" if place else ""
    if _is_data_dependent(error):
        return CaptureError(
            f"{type(model).__name__} cannot be captured as one graph: its Python{at} depends on the values in a "
            f"tensor (an `if x.any():`, an `.item()`): {message}\n"
            "Move that out of forward, or use torch.where or torch.cond.",
            place=place,
            reason="Python that depends on the values in a tensor",
        )
    export_message = _first_line(export_error)
    also = f"On the branches for torch.export the error is {export_message}\n" if export_message != message else ""
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph: torch.export raised an error{at}: {message}\n{also}"
        "Check that the unchanged model runs on these inputs; if it does, the error chained below says what to change.",
        place=place,
        reason=message,
    )
