"""trace: torch.export of one call of a model, along the ways that its Python takes when it runs."""

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
    """The leaves of arguments, in the order in which calls have them, by the number or keyword of each."""
    args, kwargs, _ = sorted_by_key(args, kwargs)
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: plain_leaves(x)[0] for key, x in named}


def _refuse_passed_on(
    objects: Sequence[Any], remembered: Sequence[ModuleState], kept: Sequence[ModuleMutation]
) -> None:
    """Raise if forward puts an object that it is given where it keeps something: there would be two then."""
    given, seen = set(map(id, objects)), set[int]()
    pending = [*(x.__dict__ for x in remembered), *(k.new for k in kept)]
    while given and pending:
        x = pending.pop()
        if id(x) in given:
            raise CaptureError(
                f"forward keeps a {type(x).__name__} that it is given on the model: a graph would keep a copy",
                reason="forward keeps an argument on the model",
            )
        inside = x if isinstance(x, (list, tuple, dict)) else getattr(x, "__dict__", None)
        if id(x) not in seen and inside and not isinstance(x, torch.Tensor) and not callable(x):
            seen.add(id(x))
            pending += inside.values() if isinstance(inside, dict) else inside


class _TensorOnly(nn.Module):
    """A model behind a signature of tensors only, so that nothing else has to be exportable."""

    def __init__(
        self,
        model: nn.Module,
        leaves: list[Any],
        spec: CallSpec,
        outputs: OutputSpec,
        around: Sequence[contextlib.AbstractContextManager[Any]],
        memory: ModuleStateTracker,
    ) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec, self._outputs, self._around = leaves, spec, outputs, around
        self._memory = memory

    def forward(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, torch.Tensor) else x for x in self._leaves]
        for place, slot in self._spec.slots.items():  # what objects hold may be changed in place
            leaves[place] = leaves[place] if slot.count else leaves[place].clone()
        versions = {id(leaves[place]): leaves[place]._version for place in self._spec.slots}
        args, kwargs = self._spec.unflatten(leaves)
        before = _leaves_by_argument(args, kwargs)
        snapshot = Snapshot(self.model)
        with contextlib.ExitStack() as stack:
            for context in self._around:
                stack.enter_context(context)
            own_args, own_kwargs = unbox(args, kwargs)
            own_kwargs, remembered = self._memory.to_modules(own_kwargs)
            try:
                result = self.model.forward(*own_args, **own_kwargs)  # no call: the model's own hooks run around ours
                modes = [c.mode.modes for c in self._around if isinstance(c, _EagerFlags)]
                self._outputs.inference = modes == [{True}]
            finally:
                self._memory.from_modules(remembered)
                self._outputs.module_mutations = [
                    k for k in snapshot.diff() if not self._memory.knows(k.container, k.key)
                ]
                snapshot.restore()
        after = _leaves_by_argument(args, kwargs)
        refills = {key for key, was in before.items() if list(map(id, was)) != list(map(id, after[key]))}
        every = [x for leaves in before.values() for x in leaves]
        objects = [(s, x) for s, x in zip(self._spec.states, every, strict=True) if s is not None]
        _refuse_passed_on(
            [x for _, x in objects if not isinstance(x, ModuleState)], remembered, self._outputs.module_mutations
        )
        numbers = {i: n for n, i in enumerate(i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))}
        held = [(numbers[i], t) for i, t in enumerate(leaves) if i in self._spec.slots]
        written = {id(t) for _, t in held if t._version != versions[id(t)]}
        results = self._outputs.take(result, objects, held, refills, written)
        made = [x for x in results if isinstance(x, torch.Tensor)]
        refuse_own_backward(made, [*self.model.parameters(), *self.model.buffers(), *tensors], self._outputs.agreeing)
        return tuple(results)


_CASTS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half,
          torch.Tensor.bfloat16, torch.Tensor.cpu, torch.Tensor.cuda}  # fmt: skip


class _NoOpCasts(TorchFunctionMode):
    """A mode in which a cast to what a tensor is already gives that tensor; it notes what inference mode does.

    Attributes:
        modes: whether what was called was called in inference mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[bool] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result, or its operand."""
        self.modes.add(torch.is_inference_mode_enabled())
        found = func(*args, **(kwargs or {}))
        if (
            func in _CASTS
            and not (kwargs or {}).keys() & {"copy", "memory_format"}
            and all(x is not True for x in args)
        ):
            of = args[0]
            same = type(found) is type(of) and (found.dtype, found.device) == (of.dtype, of.device)
            return of if same else found
        return found


class _EagerFlags(contextlib.AbstractContextManager[None]):
    """Lets a model's Python take the ways that it takes when it just runs.

    ``torch.compiler.is_compiling()`` and ``is_exporting()`` are true while torch.export traces, and models
    then leave out what they think cannot be traced: a mask that is not needed is made all the same, so that
    no flash kernel takes the attention; a triangular system is solved in a loop of as many steps as rows. And a cast
    to what a tensor is already gives another tensor there, not itself, and so what is written into it is lost to it.
    """

    def __enter__(self) -> None:
        self._flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
        torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False
        self.mode = _NoOpCasts()
        self.mode.__enter__()

    def __exit__(self, *error: object) -> None:
        self.mode.__exit__(*error)
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = self._flags


def _causal_as_told(mask: Any = None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """In place of torch's look at the values of a mask, which finds out whether a causal kernel will do without it."""
    return bool(is_causal)


def trace(
    model: nn.Module,
    leaves: list[Any],
    spec: CallSpec,
    tensors: list[torch.Tensor],
    memory: ModuleStateTracker,
    fixed: Container[tuple[int, int]] = (),
) -> tuple[Any, OutputSpec]:
    """torch's export of a call, and how its outputs go together; dims of tensors that are ``fixed`` are constants.

    What the model is known to keep is in the call's objects, and where the modules have it while forward runs.

    The model's Python goes as it does when the model runs; where that cannot be traced, as it does for an
    export. What repeats is copied; where that fails, or may mislead, torch does all of it alone.
    """
    from torch._dynamo import config as settings  # a second's import, which torch.export does anyway

    auto = torch.export.Dim.AUTO
    shapes = (
        [{d: auto for d, n in enumerate(t.shape) if n > 1 and (i, d) not in fixed} for i, t in enumerate(tensors)],
    )
    first: Exception | None = None
    for eagerly, repeating in itertools.product((True, False), (True, False)):
        if eagerly and first:
            continue
        outputs, repeats = OutputSpec(), TraceCache()
        around: list[contextlib.AbstractContextManager[Any]] = [
            *([_EagerFlags()] if eagerly else []),
            *([repeats] if repeating else []),
        ]
        try:
            with (
                RefuseOwnBackward(),
                checked_functions(capturing, refuse_function) as outputs.agreeing,
                _use_lazy_graph_module(True),  # torch's passes each make a graph's code anew, and none runs it
                settings.patch(fake_tensor_cache_enabled=not repeating),  # what Repeats copies is never looked up there
                mock.patch.object(nn.modules.transformer, "_detect_is_causal_mask", _causal_as_told),
            ):
                flat = _TensorOnly(model, leaves, spec, outputs, around, memory)
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
    ours = os.path.dirname(os.path.dirname(__file__))  # the package of autotp
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
