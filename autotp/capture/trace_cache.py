"""Repeats: while a model is traced, a torch function called as it was before is not analysed again.

Tracing one op takes torch.export milliseconds, most of them spent on the symbolic sizes of its result,
and a model of 80 equal layers repeats each of them 80 times. The model's own Python always runs, so that
whatever differs between layers differs in the capture too; only what torch makes of one call is kept: the
nodes that it added to the graph and the result's metadata. The next call of the same function, on tensors
of the same metadata and on equal other arguments, gets copies of those nodes.
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
Place = tuple[tuple[CodeType, int], ...]
"""Where a call stands: code and line of each ``forward`` on the stack, innermost first."""


class _UnknownError(Exception):
    """An argument, or a result, of which equality cannot be told."""


@dataclass(frozen=True)
class _Call:
    """What torch made of one call.

    Attributes:
        nodes: the nodes that it added to the graph, those for sizes aside.
        inputs: the node of each distinct tensor among its arguments, before the call.
        moved: by position, the inputs that another node stands for after it (``x.to(x.dtype)`` is ``x``).
        result: what it returned, tensors as a pair of their node and themselves, inputs as their position.
        kind: ``tuple`` or ``list`` where several were returned.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    moved: Mapping[int, fx.Node]
    result: tuple[Any, ...]
    kind: type | None


class _Computed(torch.autograd.Function):
    """Makes a tensor the result of a computation on others, as autograd sees it: it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, made: list[torch.Tensor], *of: torch.Tensor) -> torch.Tensor:
        return made[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("a traced tensor has no gradient")


def _expression(size: int | torch.SymInt) -> Hashable:
    return size if isinstance(size, int) else size.node.expr


def _described(x: Any, tensors: list[torch.Tensor]) -> Hashable:
    """What of an argument a function may depend on; its distinct tensors are added to ``tensors``.

    Raises:
        _UnknownError: it is of a type of which that is not known.
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
        return (type(x), *[_described(each, tensors) for each in x])
    if isinstance(x, dict):
        return (dict, *[(name, _described(each, tensors)) for name, each in x.items()])
    if isinstance(x, slice):
        return (slice, *[_described(each, tensors) for each in (x.start, x.stop, x.step)])
    if isinstance(x, float):
        return (float, x.hex())  # -0.0 is not 0.0
    if isinstance(x, _CONSTANTS):
        return (type(x), x)  # 1 is not True
    raise _UnknownError


def _settings() -> Hashable:
    """The settings of torch that functions depend on."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda", "xpu", "mps")]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *autocast)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _changes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value shares memory with its first argument, or a part of it does."""
    if node.target is operator.getitem:
        return _is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _views(node: fx.Node) -> set[fx.Node]:
    """All views of the value that a node's value is (a view of), the node itself included."""
    while _is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    found, stack = {node}, [node]
    while stack:
        new = [u for u in stack.pop().users if _is_view(u) and u not in found]
        found.update(new)
        stack += new
    return found


def _place(frame: FrameType | None) -> Place:
    found = []
    while frame is not None:
        if frame.f_code.co_name == "forward":  # the frames that torch puts into a node's stack trace
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


class TraceCache(TorchFunctionMode):
    """A mode for the model's forward under ``torch.export``: repeated calls of torch functions are copied.

    The graph is the one that torch.export makes without it, node for node, with the same sizes, module
    stacks and source lines. A call that is not certain to repeat (an argument of an unknown type, a
    constant tensor, an op that changes an argument or makes new symbols, a region, another tracer or
    dispatch mode) goes to torch as it is.

    Attributes:
        copied: how many calls were copied.
        misled: whether autograd may have been told less than the truth: a copied view and what it views
            do not know of each other, and one of them was then changed in place. The capture must be
            made again without this mode.

    Example:
        >>> with Repeats():  # within a module that torch.export traces
        ...     result = model(*args)
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied, self.misled = 0, False
        self._calls: dict[Hashable, _Call | None] = {}
        self._pass: set[Any] = set()  # functions that make a value but no nodes, such as a tensor's shape
        self._traces: dict[Place, str | None] = {}
        self._views: set[fx.Node] = set()

    def __enter__(self) -> TraceCache:
        mode = proxy_tensor.get_proxy_mode()
        self._tracer: Any = mode.tracer if mode is not None else None
        self._modes = torch._C._len_torch_dispatch_stack()
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Copy the call, or make it and keep what torch made of it."""
        kwargs = kwargs or {}
        if func in self._pass or not self._is_ours():
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
                self._pass.add(func)
            self.misled |= any(_changes(n) and self._misleads(n.args[0]) for n in nodes)
            if key is not None and key not in self._calls:
                try:
                    self._calls[key] = self._kept(nodes, tensors, inputs, result)
                except _UnknownError:
                    self._calls[key] = None
        return result

    def _misleads(self, changed: Any) -> bool:
        """Whether an op in place on a value may reach a copied view, or what it views."""
        return not isinstance(changed, fx.Node) or not self._views.isdisjoint(_views(changed))

    def _is_ours(self) -> bool:
        """Whether it is the model's own graph that is being traced, and nothing else looks on."""
        mode = proxy_tensor.get_proxy_mode()
        ours = mode is not None and mode.tracer is self._tracer
        return ours and torch._C._len_torch_dispatch_stack() == self._modes

    def _key(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Hashable | None:
        """What tells a call from another; None where that cannot be told."""
        if isinstance(module := getattr(func, "__module__", None), str) and module.partition(".")[0] != "torch":
            return None  # a function of the model's own that takes part in torch's protocol
        try:
            key = (func, _described(tuple(args), tensors), _described(dict(kwargs), tensors), _settings())
        except _UnknownError:
            return None
        slots = [proxy_tensor.get_proxy_slot(t, self._tracer, None) for t in tensors]
        return key if all(s is not None and s.constant is None for s in slots) else None

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        """The node that stands for a tensor.

        Raises:
            _UnknownError: there is none, or the tensor's values are known too.
        """
        slot = proxy_tensor.get_proxy_slot(tensor, self._tracer, None)
        if slot is None or slot.constant is not None:
            raise _UnknownError
        return slot.proxy.node

    def _kept(self, nodes: list[fx.Node], tensors: list[torch.Tensor], inputs: list[fx.Node], result: Any) -> _Call:
        """What torch made of a call.

        Raises:
            _UnknownError: copies of it would not do.
        """
        made = [n for n in nodes if not _is_size(n)]  # a size is the same wherever it is computed
        known = {*inputs, *made}
        for n in made:
            if not isinstance(n.target, torch._ops.OpOverload) and n.target is not operator.getitem:
                raise _UnknownError
            if _changes(n) or "unbacked_bindings" in n.meta or n.stack_trace != made[0].stack_trace:
                raise _UnknownError
            if any(a not in known and not _is_size(a) for a in n.all_input_nodes):
                raise _UnknownError
        if not made or len(set(inputs)) != len(inputs):
            raise _UnknownError
        now = [self._node(t) for t in tensors]
        moved = {i: n for i, (n, was) in enumerate(zip(now, inputs, strict=True)) if n is not was}
        kind = type(result) if type(result) in (tuple, list) else None
        results: list[Any] = []
        for each in result if kind else (result,):
            if isinstance(each, torch.Tensor):
                same = [i for i, t in enumerate(tensors) if t is each]
                if same:
                    results.append(same[0])
                    continue
                if type(each) is not FakeTensor or (each.requires_grad and each.is_leaf):
                    raise _UnknownError
                results.append((self._node(each), each))
            elif each is None and kind:
                results.append(None)
            else:
                raise _UnknownError
        if any(isinstance(r, tuple) and r[0] not in known for r in results) or not known.issuperset(moved.values()):
            raise _UnknownError
        self._traces[_place(sys._getframe(2))] = made[0].stack_trace
        return _Call(tuple(made), tuple(inputs), moved, tuple(results), kind)

    def _copy(self, call: _Call, tensors: list[torch.Tensor]) -> Any:
        """Copy a call's nodes for other tensors; its result, made of copies of its tensors."""
        self.copied += 1
        stands = dict(zip(call.inputs, map(self._node, tensors), strict=True))
        place, tracing = _place(sys._getframe(2)), self._tracer.record_stack_traces
        self._tracer.record_stack_traces = tracing and place not in self._traces
        try:
            for node in call.nodes:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: stands.get(n, n))
                new = self._tracer.create_node(node.op, node.target, args, kwargs, re.sub(r"_\d+$", "", node.name))
                trace = self._traces.setdefault(place, new.stack_trace)
                new.meta = {**node.meta, "nn_module_stack": new.meta["nn_module_stack"], "stack_trace": trace}
                stands[node] = new
                if _is_view(new):
                    self._views.add(new)
        finally:
            self._tracer.record_stack_traces = tracing
        for i, node in call.moved.items():
            self._stand(tensors[i], stands[node])
        found = [
            tensors[r] if isinstance(r, int) else self._like(r[1], stands[r[0]], tensors) if r is not None else None
            for r in call.result
        ]
        return call.kind(found) if call.kind else found[0]

    def _like(self, tensor: torch.Tensor, node: fx.Node, inputs: list[torch.Tensor]) -> torch.Tensor:
        """A tensor of another's metadata for which ``node`` stands, made of ``inputs``."""
        with torch._C._ExcludeDispatchKeyGuard(_TRACING):  # not disable_proxy_modes_tracing: it empties torch's caches
            new = proxy_tensor.snapshot_fake(tensor)
            assert new is not None
            if tensor.requires_grad:
                new = _Computed.apply([new], *[x for x in inputs if x.requires_grad])
        self._stand(new, node)
        return new

    def _stand(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Let a node stand for a tensor."""
        slot = proxy_tensor._ProxyTensor(self._tracer.proxy(node), None)
        proxy_tensor.set_proxy_slot(tensor, self._tracer, slot)
