"""eager_region: a module's own Python between graphs, in which reads of shards are refused.

Some Python cannot be captured: it branches on the values in a tensor (how full a static cache is), appends to a list,
calls a library. It runs as it is, on replicated values, and the modules in it that hold shards run as graphs of their
own. It must do the same on every rank: all draw the same random numbers from a stream of their own, and the ranks
compare whether all have come to its end.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autotp.distributed.process_context import ProcessContext
from autotp.errors import AutoTPError
from autotp.modules.device import device_of
from autotp.modules.forward_patching import DeferredError, in_call

__all__ = ["EagerRegion", "ParameterReads", "outside_of_parts", "within_graph"]


class _Current(threading.local):
    region: EagerRegion | None = None


_current = _Current()


@contextlib.contextmanager
def within_graph() -> Iterator[None]:
    """A graph runs, which may read shards that the Python around it may not read."""
    region = _current.region
    if region is None:
        yield
        return
    with region.reads.suspend():
        yield


class EagerRegion:
    """A module's own forward, run on every rank alike.

    Args:
        model: the module.
        own_forward: the forward that was set on the module itself; None: its class's.
        split: whether ranks hold shards of a parameter, by its name.
        stream: gives random numbers that are the same on all ranks.

    Attributes:
        running: whether the forward is running, in which shards may not be read.
        reads: the mode that refuses such reads.
    """

    def __init__(self, model: nn.Module, own_forward: Any, split: Callable[[str], Any], stream: ProcessContext) -> None:
        self.model, self.stream, self._split = model, stream, split
        self._own_forward = own_forward
        self.running = False
        self.reads = ParameterReads((), lambda *_: None)

    def run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], end: Callable[[Any, Exception | None], None]
    ) -> Any:
        """The result of the module's forward.

        Args:
            args: positional arguments, the same on all ranks.
            kwargs: arguments by keyword.
            end: compares the ranks at the end, given the result and an error that only this rank may have met.
        """
        outer, before = _current.region, (self.running, self.reads)
        self.running, self.reads = True, outside_of_parts(self.model, self._split)
        forward = self._own_forward or types.MethodType(type(self.model).forward, self.model)
        handled = sys.exc_info()[1]  # an earlier error, which the caller handles at present: its context is no news
        result, deferred = None, DeferredError(lambda error: in_call(error, handled))
        try:
            with deferred, contextlib.ExitStack() as around:
                for device in {torch.device("cpu"), device_of(self.model)}:
                    around.enter_context(self.stream.random(True, device))
                around.enter_context(self.reads)
                _current.region = self
                result = forward(*args, **kwargs)
        finally:
            (self.running, self.reads), _current.region = before, outer
        end(result, deferred.error)
        return result


_GETTERS = ("dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_mps",
            "is_xpu", "is_sparse", "is_quantized", "names", "grad_fn", "output_nr")  # fmt: skip
_QUESTIONS: list[Any] = [
    torch.Tensor.dim, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.get_device,
    torch.Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.is_tensor,
]  # fmt: skip
_HARMLESS = {*_QUESTIONS, *(getattr(torch.Tensor, name).__get__ for name in _GETTERS if hasattr(torch.Tensor, name))}
"""Functions whose result is the same for a weight and for each of its shards."""
_SCALES = {torch.Tensor.mul_, torch.Tensor.div_, torch.Tensor.__imul__, torch.Tensor.__itruediv__}
"""Functions that, given a number, change each shard as they change the weight."""


class ParameterReads(TorchFunctionMode):
    """A mode that reports reads of some tensors by torch functions, unless the function treats shards alike.

    Args:
        tensors: the tensors to watch.
        report: called with such a tensor and the function, before it runs.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], report: Callable[[torch.Tensor, Any], None]) -> None:
        super().__init__()
        self._watched = {id(t): t for t in tensors}
        self._report = report
        self.suspended = False

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Report nothing in this context."""
        before, self.suspended = self.suspended, True
        try:
            yield
        finally:
            self.suspended = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Report watched tensors among the arguments, then call the function."""
        if not self.suspended and func not in _HARMLESS and not (func in _SCALES and _by_a_number(args, kwargs)):
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    if id(tensor) in self._watched:
                        self._report(tensor, func)
        return func(*args, **(kwargs or {}))


def _by_a_number(args: Any, kwargs: Any) -> bool:
    return not kwargs and len(args) == 2 and isinstance(args[1], (int, float))


def outside_of_parts(model: nn.Module, split: Callable[[str], Any]) -> ParameterReads:
    """A mode for the Python between graphs, which raises where that reads a split weight.

    Args:
        model: the model.
        split: whether a parameter is split, by name.
    """
    names = {id(p): n for n, p in model.named_parameters() if split(n)}

    def refuse(parameter: torch.Tensor, func: Any) -> None:
        raise AutoTPError(
            f"{names[id(parameter)]} is split over the ranks, and code outside of the part that has it reads it "
            f"({getattr(func, '__name__', func)}), which it did not do with the example inputs: pass "
            "example_inputs with which it does, and the weight stays whole"
        )

    return ParameterReads([p for p in model.parameters() if id(p) in names], refuse)
