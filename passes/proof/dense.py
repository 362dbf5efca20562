"""dense: the terms of the dense model, read off its captured graph."""

from __future__ import annotations

import itertools
import operator
import re
import sys
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.graphs import is_random, is_tensor, op_name
from passes.layouts.axes import Size, product, shape_of, size_of
from passes.proof.terms import ONE, Coefficient, Terms, canonical, named_arguments, static_int, with_positive_dims

__all__ = ["VIEWS", "Equation", "dims_of", "equation", "permutation", "read", "taken_indices"]

aten = torch.ops.aten
VIEWS = {"aten.reshape", "aten.view", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.unsqueeze",
         "aten.squeeze"}  # fmt: skip
PERMUTES = {"aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.swapaxes", "aten.numpy_T", "aten.mT"}
SLICES = {"aten.slice", "aten.select", "aten.narrow", "aten.flip"}
EXPANDS = {"aten.expand", "aten.broadcast_to"}
PRODUCTS = {"aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.addmm", "aten.baddbmm",
            "aten.einsum"}  # fmt: skip
CONVOLUTIONS = {"aten.conv1d", "aten.conv2d", "aten.conv3d"}
NORMS = {"aten.layer_norm", "aten.rms_norm"}
NO_GRADIENT = {
    "aten.detach",
    "aten.zeros_like",
    "aten.ones_like",
    "aten.full_like",
    "aten.rand_like",
    "aten.randn_like",
}


@dataclass(frozen=True)
class Equation:
    """A matrix product as an einsum.

    Attributes:
        operands: the tensors that are multiplied.
        letters: per operand, a letter for each dim.
        out: the result's letters.
        weight: a number that the product is multiplied by.
        addends: the tensors that are added, each with its weight.
    """

    operands: tuple[Any, ...]
    letters: tuple[tuple[str, ...], ...]
    out: tuple[str, ...]
    weight: Any = 1
    addends: tuple[tuple[Any, Any], ...] = ()

    def key(self, terms: Sequence[int]) -> Hashable:
        """The key of the product's term, which is the same for all ops that compute this product."""
        letters = dict.fromkeys(x for dims in (*self.letters, self.out) for x in dims)
        number = {x: i for i, x in enumerate(letters)}
        return (
            "product",
            tuple(tuple(number[x] for x in dims) for dims in self.letters),
            tuple(number[x] for x in self.out),
            tuple(terms),
        )


def equation(name: str, args: Mapping[str, Any], rank: Callable[[Any], int]) -> Equation | None:
    """A matrix product's einsum; None for one that takes a diagonal."""
    if name == "aten.linear":
        x, weight, bias = args["input"], args["weight"], args.get("bias")
        lead = tuple(f"b{i}" for i in range(rank(x) - 1))
        addends = () if bias is None else ((bias, 1),)
        rows = ("o", "i")[-rank(weight) :]
        return Equation((x, weight), ((*lead, "i"), rows), (*lead, *rows[:-1]), 1, addends)
    if name in ("aten.addmm", "aten.baddbmm"):
        left, right = [args[k] for k in (("mat1", "mat2") if name == "aten.addmm" else ("batch1", "batch2"))]
        lead = () if name == "aten.addmm" else ("b",)
        addends = ((args["self"], args.get("beta", 1)),) if args.get("beta", 1) else ()
        letters = (*lead, "m", "k"), (*lead, "k", "n")
        return Equation((left, right), letters, (*lead, "m", "n"), args.get("alpha", 1), addends)
    if name == "aten.einsum":
        return _einsum(args["equation"].replace(" ", ""), list(args["tensors"]), rank)
    left, right = list(args.values())[:2]
    a, b = rank(left), rank(right)
    batch = max(a - 2, b - 2, 0)
    names = [f"b{i}" for i in range(batch)]
    rows = (*names[batch - (a - 2) :], "m", "k") if a > 1 else ("k",)
    columns = (*names[batch - (b - 2) :], "k", "n") if b > 1 else ("k",)
    return Equation((left, right), (rows, columns), (*names, *["m"] * (a > 1), *["n"] * (b > 1)))


def _einsum(text: str, operands: list[Any], rank: Callable[[Any], int]) -> Equation | None:
    """``torch.einsum``'s equation, with letters for the dims under an ellipsis; None if it takes a diagonal."""
    inputs, arrow, out = text.partition("->")
    subscripts = inputs.split(",")
    if not arrow:
        names = sorted(set(re.sub(r"[^A-Za-z]", "", inputs)))
        out = ("..." if "..." in inputs else "") + "".join(x for x in names if inputs.count(x) == 1)
    dots = [rank(n) - len(t.replace("...", "")) for n, t in zip(operands, subscripts, strict=True)]
    most = max(dots)

    def dims(term: str, count: int) -> tuple[str, ...]:
        before, _, after = term.partition("...")
        return (*before, *(f"b{i}" for i in range(most - count, most)), *after) if "..." in term else tuple(term)

    letters = tuple(dims(t, d) for t, d in zip(subscripts, dots, strict=True))
    if any(len(set(x)) < len(x) for x in letters):
        return None
    return Equation(tuple(operands), letters, dims(out, most))


def permutation(target: Any, rank: int, rest: Sequence[Any]) -> tuple[int, ...]:
    """For each dim of a permuted value, its dim before the permutation."""
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    return tuple(n - 2 for n in target(probe, *rest).shape)


def dims_of(dims: Any, rank: int) -> tuple[int, ...]:
    """The dims that a call names, counted from the first one; all dims if it names none."""
    if dims is None or dims == [] or dims == ():
        return tuple(range(rank))
    return tuple(sorted(d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])))


def taken_indices(name: str, args: Mapping[str, Any], size: int) -> range | None:
    """The indices that a slice or a select takes of a static dim; None if they are not constant, or out of bounds."""
    if name == "aten.flip":
        return range(size - 1, -1, -1)
    if name == "aten.slice":
        start, stop, step = args.get("start"), args.get("end"), args.get("step", 1)
        stop = None if isinstance(stop, int) and stop >= sys.maxsize else stop
        if any(not isinstance(b, int) and b is not None for b in (start, stop, step)):
            return None
        return range(*slice(start, stop, step).indices(size))
    first = args["index"] if name == "aten.select" else args["start"]
    length = 1 if name == "aten.select" else args["length"]
    if not isinstance(first, int) or not isinstance(length, int) or not -size <= first < size:
        return None
    return range(first % size, first % size + length) if first % size + length <= size else None


class _Reader:
    """Reads a captured graph into terms.

    Attributes:
        terms: the terms read so far.
        values: per node its term, its size, or another description.
        parameters: the ``get_attr`` targets of the parameters that need gradients.
    """

    def __init__(self, parameters: Collection[str]) -> None:
        self.terms, self.values = Terms(), dict[fx.Node, Any]()
        self.parameters = parameters
        self._fresh = itertools.count()

    def key(self, value: Any) -> Any:
        """An argument, with terms and sizes in place of nodes."""
        if isinstance(value, fx.Node):
            known = self.values[value]
            return ("term", known) if isinstance(known, int) else known
        if isinstance(value, (list, tuple)):
            return tuple(self.key(v) for v in value)
        return canonical(value)

    def run(self, graph: fx.Graph) -> None:
        """Read all nodes of a graph."""
        inputs = itertools.count()
        for node in graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                number = next(inputs)
                self.values[node] = self.terms.atom(("input", number), shape_of(value), value.requires_grad)
            elif node.op == "get_attr":
                if is_tensor(node):
                    grad = str(node.target) in self.parameters
                    self.values[node] = self.terms.atom(("attr", str(node.target)), shape_of(value), grad)
                else:
                    self.values[node] = ("region", str(node.target))
                    self.terms.regions[str(node.target)] = getattr(node.meta.get("region"), "graph", None)
            elif node.op == "call_function":
                self.values[node] = self.value(node, value)

    def value(self, node: fx.Node, value: Any) -> Any:
        """The term, the size or another description of a call's result."""
        if isinstance(value, torch.SymInt):
            size = size_of(value)
            self.terms.sizes.setdefault((op_name(node), self.key(node.args)), size)
            return size
        if isinstance(value, (int, float, bool)) or value is None or isinstance(value, (torch.SymFloat, torch.SymBool)):
            return ("number", op_name(node), self.key(node.args))
        if node.target is operator.getitem:
            return self.general(node, value)
        return self.tensor(node, value) if isinstance(value, torch.Tensor) else self.general(node, value)

    def grad(self, node: fx.Node, value: Any) -> bool:
        """Whether gradients flow through a call's result."""
        outs = value if isinstance(value, (tuple, list)) else [value]
        floats = any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in outs)
        inputs = node.all_input_nodes
        if op_name(node) == "aten.type_as" or node.target is aten.to.other:  # the second operand gives its dtype only
            inputs = inputs[:1]
        operands = [self.values.get(n) for n in inputs]
        flows = any(isinstance(term, int) and self.terms.grads[term] for term in operands)
        return floats and flows and op_name(node) not in NO_GRADIENT

    def general(self, node: fx.Node, value: Any) -> int:
        """The term of a call that is an atom, by op and arguments."""
        key = (op_name(node), _arguments_key(self, node))
        shape = shape_of(value) if isinstance(value, torch.Tensor) else ()
        if is_random(node):
            draw = self.terms.atom(("draw", next(self._fresh)), shape, self.grad(node, value))
            self.terms.draws[key].append(draw)
            return draw
        return self.terms.atom(key, shape, self.grad(node, value))

    def tensor(self, node: fx.Node, value: torch.Tensor) -> int:
        """The term of a call that returns one tensor."""
        name, shape = op_name(node), shape_of(value)
        args = named_arguments(node.target, node.args, node.kwargs)
        if name in ("aten.add", "aten.sub", "aten.neg", "aten.mul", "aten.div", "aten.mean", "aten.sum"):
            term = self.linear(node, name, args, shape)
            if term is not None:
                return term
        if name in PRODUCTS:
            term = self.product(name, args, shape)
            if term is not None:
                return term
        if name in VIEWS and node.target is not aten.view.dtype:
            if name in ("aten.reshape", "aten.view"):  # sizes as the call spells them, not as torch simplifies them
                sizes = [
                    self.values[n] if isinstance(n, fx.Node) else Size(n) if n > 0 else None
                    for n in list(args.values())[1]
                ]
                shape = tuple(n if isinstance(n, Size) else s for n, s in zip(sizes, shape, strict=True))
            viewed = self.terms.view(self.values[node.args[0]], shape, known=True)
            self.terms.variants["call", self.values[node.args[0]]][name, _arguments_key(self, node)] = viewed
            return viewed
        if name in PERMUTES:
            return self.permute(node, shape)
        if name in EXPANDS:
            source = self.values[node.args[0]]
            if self.terms.shapes[source] == shape:
                return source
            expanded = self.terms.atom(("expand", source, shape), shape, self.terms.grads[source])
            self.terms.variants["expand", source][shape] = expanded
            return expanded
        if name in SLICES:
            term = self.slice(node, name, args, shape)
            if term is not None:
                return term
        if name in CONVOLUTIONS and args.get("bias") is not None:
            return self.convolution(node, name, args, shape)
        term = self.general(node, value)
        if name in NORMS:
            self.terms.variants["norm", self.values[node.args[0]]][name, _arguments_key(self, node)] = term
        return term

    def linear(self, node: fx.Node, name: str, args: Mapping[str, Any], shape: tuple[Size, ...]) -> int | None:
        """The weighted sum that an addition, a multiple by a number, a mean or a sum is; None for another op."""
        items = list(args.values())
        if name in ("aten.mean", "aten.sum"):
            source = self.values[items[0]]
            sizes = self.terms.shapes[source]
            dims, keep = dims_of(args.get("dim"), len(sizes)), bool(args.get("keepdim", False))
            key = ("total", source, dims, keep, args.get("dtype"))
            total = self.terms.atom(key, shape, self.terms.grads[source])
            if name == "aten.sum":
                return total
            count = Coefficient.of(product(sizes[d] for d in dims))
            factor = count.inverse() if count else None
            return None if factor is None else self.terms.weighted_sum([(total, factor)], shape)
        weights = [ONE, Coefficient.of(args.get("alpha", 1)) or ONE]
        if set(args) - {"self", "other", "alpha"}:
            return None
        if name == "aten.neg":
            minus = Coefficient.of(-1)
            assert minus is not None
            return self.terms.weighted_sum([(self.values[items[0]], minus)], shape)
        if name in ("aten.mul", "aten.div"):
            left, right = args["self"], args["other"]
            if name == "aten.mul" and not is_tensor(left):
                left, right = right, left
            if not is_tensor(left) or is_tensor(right):
                return None
            factor = Coefficient.of(self.values[right] if isinstance(right, fx.Node) else right)
            factor = factor.inverse() if factor is not None and name == "aten.div" else factor
            if factor is None or not node.meta["val"].is_floating_point():
                return None
            return self.terms.weighted_sum([(self.values[left], factor)], shape)
        addends = list[tuple[int, Coefficient]]()
        for item, weight in zip((args["self"], args["other"]), weights, strict=True):
            minus = Coefficient.of(-1) if name == "aten.sub" and item is args["other"] and addends else None
            if is_tensor(item):
                term, factor = self.values[item], weight
            else:
                number = Coefficient.of(self.values[item] if isinstance(item, fx.Node) else item)
                if number is None:
                    return None
                term, factor = self.terms.number(), number * weight
            addends.append((term, factor * minus if minus is not None else factor))
        return self.terms.weighted_sum(addends, shape)

    def product(self, name: str, args: Mapping[str, Any], shape: tuple[Size, ...]) -> int | None:
        """The term of a matrix product with its addends; None if it has no einsum, or a weight is no number."""
        einsum = equation(name, args, lambda n: n.meta["val"].dim())
        if einsum is None:
            return None
        operands = [self.values[n] for n in einsum.operands]
        term = self.terms.atom(einsum.key(operands), shape, any(self.terms.grads[t] for t in operands))
        weights = [Coefficient.of(w) for w in (einsum.weight, *(w for _, w in einsum.addends))]
        if any(w is None for w in weights):
            return None
        pairs = zip([term, *(self.values[n] for n, _ in einsum.addends)], weights, strict=True)
        return self.terms.weighted_sum([(t, w) for t, w in pairs if w is not None], shape)

    def permute(self, node: fx.Node, shape: tuple[Size, ...]) -> int:
        """The term of a permutation of dims."""
        source = self.values[node.args[0]]
        order = permutation(node.target, len(shape), [*node.args[1:], *node.kwargs.values()])
        if order == tuple(range(len(shape))):
            return source
        return self.terms.atom(("permute", source, order), shape, self.terms.grads[source])

    def slice(self, node: fx.Node, name: str, args: Mapping[str, Any], shape: tuple[Size, ...]) -> int | None:
        """The term of a slice or a select of one static dim; None if its indices are not constant."""
        source = self.values[node.args[0]]
        sizes = self.terms.shapes[source]
        dim = args.get("dim", 0) if name != "aten.flip" else args["dims"]
        if isinstance(dim, (list, tuple)):
            if len(dim) != 1:
                return None
            (dim,) = dim
        dim %= len(sizes)
        if not sizes[dim].static:
            return None
        indices = taken_indices(
            name,
            {k: static_int(self.values.get(v, v) if isinstance(v, fx.Node) else v) for k, v in args.items()},
            sizes[dim].number,
        )
        if indices is None:
            return None
        removed = name == "aten.select"
        if indices == range(sizes[dim].number) and not removed:
            return source
        key = (dim, indices, removed)
        part = self.terms.atom(("part", source, key), shape, self.terms.grads[source])
        self.terms.variants["part", source][key] = part
        return part

    def convolution(self, node: fx.Node, name: str, args: Mapping[str, Any], shape: tuple[Size, ...]) -> int:
        """The term of a convolution, with its bias taken apart."""
        unbiased = (name, tuple((k, self.key(v)) for k, v in sorted(args.items()) if k != "bias"))
        operands = [self.values[n] for n in node.all_input_nodes if is_tensor(n)]
        term = self.terms.atom(unbiased, shape, any(self.terms.grads[t] for t in operands))
        kernel_dims = len(shape_of(node.args[1].meta["val"])) - 2
        bias = self.values[args["bias"]]
        shaped = self.terms.view(bias, (*self.terms.shapes[bias], *[Size(1)] * kernel_dims), known=True)
        return self.terms.weighted_sum([(term, ONE), (shaped, ONE)], shape)


def _arguments_key(reader: _Reader, node: fx.Node) -> Hashable:
    """All arguments of a call in the form that they have in the key of its term."""
    tensors = [n for n in node.all_input_nodes if isinstance(reader.values[n], int)]
    rank = len(reader.terms.shapes[reader.values[tensors[0]]]) if tensors else 0
    args = with_positive_dims(named_arguments(node.target, node.args, node.kwargs), rank)
    return tuple(sorted((k, reader.key(v)) for k, v in args.items()))


def read(graph: fx.Graph, parameters: Collection[str]) -> tuple[Terms, dict[fx.Node, Any]]:
    """The terms of a captured graph, and for each of its nodes the term, :class:`Size` or region it stands for."""
    reader = _Reader(parameters)
    reader.run(graph)
    return reader.terms, reader.values
