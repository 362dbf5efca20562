"""trace_cache: while a model is traced, copy the nodes of torch calls that repeat earlier ones.

torch.export takes milliseconds to trace one op, most of them for the symbolic sizes of its result, and a model of 80
equal layers repeats each op 80 times. The model's own Python always runs, so that any difference between layers is
captured. Only torch's work for a call is cached: the nodes that the call added to the graph, and the metadata of its
result. The next call of the same function gets copies of those nodes, if its tensors have the same metadata and its
other arguments are equal.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

__all__ = ["TraceCache"]

_CONSTANTS = (bool, int, str, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)
_TRACING = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)
_CallSite = tuple[tuple[CodeType, int], ...]
"""The code and line of each ``forward`` on the stack of a call, innermost first."""


class _UnknownError(Exception):
    """An argument that cannot be compared, or a result that cannot be copied."""


@dataclass(frozen=True)
class _CachedCall:
    """The nodes that torch added to the graph for one call.

    Attributes:
        nodes: the nodes that it added, except for those of sizes.
        inputs: the node of each distinct tensor among its arguments, before the call.
        moved: the new nodes of inputs whose node the call replaced, by position (``x.to(x.dtype)`` is ``x``).
        result: its results: a tensor as a pair of its node and itself, an input as its position.
        kind: ``tuple`` or ``list`` if there are several results.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    moved: Mapping[int, fx.Node]
    result: tuple[Any, ...]
    kind: type | None


class _Computed(torch.autograd.Function):
    """Makes a tensor a non-leaf for autograd, computed from other tensors, so that it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, result: list[torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
        return result[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a traced tensor has no gradient")


def _expression(size: int | torch.SymInt) -> Hashable:
    return size if isinstance(size, int) else size.node.expr


def _argument_key(x: Any, tensors: list[torch.Tensor]) -> Hashable:
    """The cache key of an argument: everything that a function may depend on.

    Args:
        x: the argument.
        tensors: the distinct tensors so far, to which those of the argument are added.

    Raises:
        _UnknownError: the argument has a type that is not known here.
    """
    if isinstance(x, torch.Tensor):
        for i, t in enumerate(tensors):
            if t is x:
                return ("again", i)
        if type(x) not in (FakeTensor, torch.nn.Parameter) or x.layout is not torch.strided:
            raise _UnknownError
        tensors.append(x)
        sizes = (*x.shape, *x.stride(), x.storage_offset())
        return (type(x), x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg(), *map(_expression, sizes))
    if isinstance(x, torch.SymInt):
        return (torch.SymInt, x.node.expr)
    if isinstance(x, (tuple, list)):
        return (type(x), *[_argument_key(item, tensors) for item in x])
    if isinstance(x, dict):
        return (dict, *[(name, _argument_key(item, tensors)) for name, item in x.items()])
    if isinstance(x, slice):
        return (slice, *[_argument_key(item, tensors) for item in (x.start, x.stop, x.step)])
    if isinstance(x, float):
        return (float, x.hex())  # -0.0 is not 0.0
    if isinstance(x, _CONSTANTS):
        return (type(x), x)  # 1 is not True
    raise _UnknownError


def _settings() -> Hashable:
    """torch's global settings that functions depend on."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda", "xpu", "mps")]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *autocast)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_mutation(node: fx.Node) -> bool:
    """Whether a node mutates one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value, or one of its results, shares memory with the node's first argument."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _views(node: fx.Node) -> set[fx.Node]:
    """The nodes whose values share memory with a node's: the base that it is a view of, and all views of the base."""
    while _is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    views, stack = {node}, [node]
    while stack:
        new = [u for u in stack.pop().users if _is_view(u) and u not in views]
        views.update(new)
        stack += new
    return views


def _call_site(frame: FrameType | None) -> _CallSite:
    site = []
    while frame is not None:
        if frame.f_code.co_name == "forward":  # torch puts these frames into a node's stack trace
            site.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(site)


class TraceCache(TorchFunctionMode):
    """A mode for the model's forward under ``torch.export``, in which repeated calls of torch functions are copied.

    The graph is the one that torch.export makes without this mode, node for node, with the same sizes, module stacks
    and source lines. torch traces every call that is not certain to be a repetition: one with an argument of an unknown
    type or a constant tensor, an op that mutates an argument or creates symbols, a region, and any call under another
    tracer or dispatch mode.

    Attributes:
        copied: the number of calls that were copied.
        misled: whether autograd may lack a dependency. A copied view and its base do not know of each other, and one
            of them was later changed in place: the call has to be captured again without this mode.

    Example:
        >>> with TraceCache():  # within a module that torch.export traces
        ...     result = model(*args)
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied, self.misled = 0, False
        self._calls: dict[Hashable, _CachedCall | None] = {}
        self._without_nodes: set[Any] = set()  # functions that add no nodes, such as a tensor's shape
        self._stack_traces: dict[_CallSite, str | None] = {}
        self._copied_views: set[fx.Node] = set()

    def __enter__(self) -> TraceCache:
        mode = proxy_tensor.get_proxy_mode()
        self._tracer: Any = mode.tracer if mode is not None else None
        self._modes = torch._C._len_torch_dispatch_stack()
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Copy the call, or let torch trace it and cache the nodes."""
        kwargs = kwargs or {}
        if func in self._without_nodes or not self._is_own_trace():
            return func(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        with torch._C.DisableTorchFunction():
            key = self._key(func, args, kwargs, tensors)
            call = self._calls.get(key) if key is not None else None
            if call is not None:
                return self._copy(call, tensors)
            inputs = [self._node(t) for t in tensors] if key is not None else []
            last = next(iter(reversed(self._tracer.graph.nodes)))
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            nodes = []
            while (last := last.next).op != "root":
                nodes.append(last)
            if not nodes and result is not None and not isinstance(result, torch.Tensor):
                self._without_nodes.add(func)
            self.misled |= any(_is_mutation(n) and self._reaches_copied_view(n.args[0]) for n in nodes)
            if key is not None and key not in self._calls:
                try:
                    self._calls[key] = self._cached_call(nodes, tensors, inputs, result)
                except _UnknownError:
                    self._calls[key] = None
        return result

    def _reaches_copied_view(self, mutated: Any) -> bool:
        """Whether a mutation of a value may change a copied view, or the base of one."""
        return not isinstance(mutated, fx.Node) or not self._copied_views.isdisjoint(_views(mutated))

    def _is_own_trace(self) -> bool:
        """Whether the model's own graph is being traced, and no other dispatch mode is active."""
        mode = proxy_tensor.get_proxy_mode()
        own = mode is not None and mode.tracer is self._tracer
        return own and torch._C._len_torch_dispatch_stack() == self._modes

    def _key(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Hashable | None:
        """The cache key of a call; None if the call cannot be compared with others."""
        if isinstance(module := getattr(func, "__module__", None), str) and module.partition(".")[0] != "torch":
            return None  # a function of the model's that implements torch's protocol
        try:
            key = (func, _argument_key(tuple(args), tensors), _argument_key(dict(kwargs), tensors), _settings())
        except _UnknownError:
            return None
        slots = [proxy_tensor.get_proxy_slot(t, self._tracer, None) for t in tensors]
        return key if all(s is not None and s.constant is None for s in slots) else None

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        """The node that represents a tensor.

        Raises:
            _UnknownError: there is none, or the tensor is a constant.
        """
        slot = proxy_tensor.get_proxy_slot(tensor, self._tracer, None)
        if slot is None or slot.constant is not None:
            raise _UnknownError
        return slot.proxy.node

    def _cached_call(
        self, nodes: list[fx.Node], tensors: list[torch.Tensor], inputs: list[fx.Node], result: Any
    ) -> _CachedCall:
        """The cache entry of a call that torch has traced.

        Args:
            nodes: the nodes that the call added to the graph.
            tensors: the distinct tensors among its arguments.
            inputs: the tensors' nodes before the call.
            result: its result.

        Raises:
            _UnknownError: copies of the nodes would not be what torch makes of the next call.
        """
        added = [n for n in nodes if not _is_size(n)]  # a size is the same wherever it is computed
        known = {*inputs, *added}
        for n in added:
            if not isinstance(n.target, torch._ops.OpOverload) and n.target is not operator.getitem:
                raise _UnknownError
            if _is_mutation(n) or "unbacked_bindings" in n.meta or n.stack_trace != added[0].stack_trace:
                raise _UnknownError
            if any(a not in known and not _is_size(a) for a in n.all_input_nodes):
                raise _UnknownError
        if not added or len(set(inputs)) != len(inputs):
            raise _UnknownError
        after = [self._node(t) for t in tensors]
        moved = {i: new for i, (new, old) in enumerate(zip(after, inputs, strict=True)) if new is not old}
        kind = type(result) if type(result) in (tuple, list) else None
        results: list[Any] = []
        for x in result if kind else (result,):
            if isinstance(x, torch.Tensor):
                same = [i for i, t in enumerate(tensors) if t is x]
                if same:
                    results.append(same[0])
                    continue
                if type(x) is not FakeTensor or (x.requires_grad and x.is_leaf):
                    raise _UnknownError
                results.append((self._node(x), x))
            elif x is None and kind:
                results.append(None)
            else:
                raise _UnknownError
        if any(isinstance(r, tuple) and r[0] not in known for r in results) or not known.issuperset(moved.values()):
            raise _UnknownError
        self._stack_traces[_call_site(sys._getframe(2))] = added[0].stack_trace
        return _CachedCall(tuple(added), tuple(inputs), moved, tuple(results), kind)

    def _copy(self, call: _CachedCall, tensors: list[torch.Tensor]) -> Any:
        """Copy a call's nodes for other input tensors; returns the copied call's result."""
        self.copied += 1
        copies = dict(zip(call.inputs, map(self._node, tensors), strict=True))
        site, tracing = _call_site(sys._getframe(2)), self._tracer.record_stack_traces
        self._tracer.record_stack_traces = tracing and site not in self._stack_traces
        try:
            for node in call.nodes:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
                new = self._tracer.create_node(node.op, node.target, args, kwargs, re.sub(r"_\d+$", "", node.name))
                trace = self._stack_traces.setdefault(site, new.stack_trace)
                new.meta = {**node.meta, "nn_module_stack": new.meta["nn_module_stack"], "stack_trace": trace}
                copies[node] = new
                if _is_view(new):
                    self._copied_views.add(new)
        finally:
            self._tracer.record_stack_traces = tracing
        for i, node in call.moved.items():
            self._set_node(tensors[i], copies[node])
        results = [
            None if r is None else tensors[r] if isinstance(r, int) else self._new_tensor(r[1], copies[r[0]], tensors)
            for r in call.result
        ]
        return call.kind(results) if call.kind else results[0]

    def _new_tensor(self, example: torch.Tensor, node: fx.Node, inputs: list[torch.Tensor]) -> torch.Tensor:
        """A new tensor with the metadata of an example, which ``node`` represents and which depends on ``inputs``."""
        with torch._C._ExcludeDispatchKeyGuard(_TRACING):  # not disable_proxy_modes_tracing: it empties torch's caches
            new = proxy_tensor.snapshot_fake(example)
            assert new is not None
            if example.requires_grad:
                new = _Computed.apply([new], *[x for x in inputs if x.requires_grad])
        self._set_node(new, node)
        return new

    def _set_node(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Make a node represent a tensor."""
        slot = proxy_tensor._ProxyTensor(self._tracer.proxy(node), None)
        proxy_tensor.set_proxy_slot(tensor, self._tracer, slot)
