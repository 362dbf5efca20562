"""eager_region: a module's own Python between graphs, in which reads of shards are refused.

A model may be captured for the calls that it was seen with, and not for another, because its Python then depends on the
values in a tensor (how full a static cache is). What it computes there is whole, and the same on every rank; each of
its submodules that hold shards runs as it does when it is called by itself (:mod:`autotp.runtime.graph_runtime`), and
goes the same way where it cannot be captured either. Only without gradients: what recomputes a part of a forward in the
backward would find other random numbers.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autotp.distributed.process_context import ProcessContext
from autotp.errors import AutoTPError, CaptureError, PartialCaptureWarning
from autotp.modules.device import device_of
from autotp.modules.forward_patching import DeferredError

if TYPE_CHECKING:
    from autotp.runtime.graph_runtime import GraphRuntime

__all__ = ["Between", "ParameterReads", "inside_of_python", "outside_of_parts"]


class _Running(threading.local):
    touches: ParameterReads | None = None


_running = _Running()


@contextlib.contextmanager
def inside_of_python() -> Iterator[None]:
    """What a submodule does, which may read its shards while the Python around it may not."""
    touches = _running.touches
    if touches is None:
        yield
        return
    suspended, touches.suspended = touches.suspended, True
    try:
        yield
    finally:
        touches.suspended = suspended


class Between:
    """A module's own Python between the graphs of its submodules.

    Args:
        whole: the module's runtime.
    """

    def __init__(self, whole: GraphRuntime) -> None:
        self.whole = whole
        mesh, fabric = whole.mesh, whole.fabric
        self.random = ProcessContext(mesh, fabric.seed + 1 + mesh.tp, whole.agreement.missing, fabric.timeout, False)
        self._warned = False

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: CaptureError) -> Any:
        """A call of the module: its own forward.

        Args:
            args: the positional arguments, the same on all ranks.
            kwargs: those by keyword.
            why: why it cannot be captured.
        """
        model, whole = self.whole.model, self.whole
        if not self._warned:
            self._warned = True
            name = whole.programs.path or f"this {type(model).__name__}"
            warnings.warn(
                f"a call of {name} cannot be captured{f' ({why.place})' if why.place else ''}: {why.reason}. Its own "
                "Python runs, on whole values, and its submodules as graphs of their own",
                PartialCaptureWarning,
                stacklevel=2,
            )
        own = whole.own_forward or types.MethodType(type(model).forward, model)
        before, touches = _running.touches, outside_of_parts(model, whole.shards)
        result, held = None, DeferredError()
        try:
            with held, contextlib.ExitStack() as around:
                for device in {torch.device("cpu"), device_of(model)}:
                    around.enter_context(self.random.random(True, device))
                around.enter_context(touches)
                _running.touches = touches
                result = own(*args, **kwargs)
        finally:
            _running.touches = before
        assert whole.programs.comparison is not None
        whole.programs.comparison.end(result, held.error)
        whole.programs.watch.follow()
        return result


_GETTERS = ("dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_mps",
            "is_xpu", "is_sparse", "is_quantized", "names", "grad_fn", "output_nr")  # fmt: skip
_QUESTIONS: list[Any] = [
    torch.Tensor.dim, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device,
    torch.Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.is_tensor,
]  # fmt: skip
_HARMLESS = {*_QUESTIONS, *(getattr(torch.Tensor, name).__get__ for name in _GETTERS if hasattr(torch.Tensor, name))}
"""What says the same of a weight and of each of its shards."""
_SCALES = {torch.Tensor.mul_, torch.Tensor.div_, torch.Tensor.__imul__, torch.Tensor.__itruediv__}
"""What does to each shard what it does to the weight, if it does that by a number."""


class ParameterReads(TorchFunctionMode):
    """A mode that reports each torch function that is given one of some tensors, unless a shard would do as well.

    Args:
        tensors: the tensors to watch.
        report: called with such a tensor and the function, before it runs.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], report: Callable[[torch.Tensor, Any], None]) -> None:
        super().__init__()
        self._watched = {id(t): t for t in tensors}
        self._report = report
        self.suspended = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments, then call the function."""
        if not self.suspended and func not in _HARMLESS and not (func in _SCALES and _by_a_number(args, kwargs)):
            for value in (*args, *(kwargs or {}).values()):
                for each in value if isinstance(value, (tuple, list)) else (value,):
                    if id(each) in self._watched:
                        self._report(each, func)
        return func(*args, **(kwargs or {}))


def _by_a_number(args: Any, kwargs: Any) -> bool:
    return not kwargs and len(args) == 2 and isinstance(args[1], (int, float))


def outside_of_parts(model: nn.Module, split: Callable[[str], Any]) -> ParameterReads:
    """A mode for the Python between a model's parts: it raises where that reads a split weight.

    Args:
        model: the model.
        split: whether a parameter is split, by name.

    ``suspended`` is set while a part runs.
    """
    names = {id(p): n for n, p in model.named_parameters() if split(n)}

    def refuse(parameter: torch.Tensor, func: Any) -> None:
        raise AutoTPError(
            f"{names[id(parameter)]} is split over the ranks, and code outside of the part that has it reads it "
            f"({getattr(func, '__name__', func)}), which it did not do with the example inputs: pass "
            "example_inputs with which it does, and the weight stays whole"
        )

    return ParameterReads([p for p in model.parameters() if id(p) in names], refuse)
