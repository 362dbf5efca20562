"""lower: run the passes that make one rank's graph faster."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import fx

from passes import ops
from passes.graphs import op_name
from passes.lowering.cache_in_place import cache_in_place
from passes.lowering.causal import causal
from passes.lowering.deduplicate import deduplicate
from passes.lowering.direct_calls import direct_calls
from passes.lowering.fold import fold
from passes.lowering.fuse import fuse
from passes.lowering.fuse_adjacent import fuse_adjacent
from passes.lowering.grouped_query import grouped_query
from passes.lowering.local_values import call, call_dense_ops, describe, is_tensor, local, remove_dead_code
from passes.lowering.merge import merge
from passes.lowering.overlap import overlap
from passes.lowering.rematerialize import rematerialize
from passes.lowering.repeat import repeat
from passes.lowering.reuse import reuse
from passes.lowering.split import split

__all__ = ["Lowered", "Lowering", "lower"]

aten = torch.ops.aten

_RENAMED = {"group": "grouped_query", "together": "fuse_adjacent", "lean": "rematerialize", "grow": "cache_in_place",
            "bind": "direct_calls"}  # fmt: skip
"""The options' names before version 0.2, and their present names."""


def _current_name(name: str) -> str:
    """The present name of an option with an old name, which is accepted with a warning."""
    warnings.warn(f"Lowering({name}=...) is now Lowering({_RENAMED[name]}=...)", DeprecationWarning, stacklevel=3)
    return _RENAMED[name]


def _accepts_old_names(cls: type[Lowering]) -> type[Lowering]:
    """The class, whose constructor takes the old names of options, too."""
    generated = cls.__init__

    @functools.wraps(generated)
    def init(self: Lowering, *args: bool, **options: bool) -> None:
        current = {name: value for name, value in options.items() if name not in _RENAMED}
        for name in options.keys() & _RENAMED.keys():  # after the others, as dataclasses.replace passes all of them on
            current[_current_name(name)] = options[name]
        generated(self, *args, **current)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@_accepts_old_names
@dataclass(frozen=True)
class Lowering:
    """Which passes run (:mod:`passes.lowering`); each can be switched off.

    Attributes:
        fold: remove no-ops, and compute constants once.
        causal: use ``is_causal`` in place of a causal mask.
        deduplicate: make equal calls one call.
        grouped_query: use grouped-query attention in place of repeated keys and values.
        fuse: make one op of each norm or GELU that is written out.
        merge: make one product of Linears with one input.
        fuse_adjacent: make one op of equal ops on adjacent slices of a value.
        split: make one ``split_with_sizes`` of slices that together are a value.
        rematerialize: with a backward, save only the inputs of norms and gated activations for it.
        cache_in_place: without a backward, write new tokens into caches that have room, without a copy.
        overlap: run computation beside an all-reduce whose result it does not need.
        reuse: without a backward, write results over operands that nothing reads any more.
        direct_calls: call torch's C functions.
        repeat: for a compiler, make equal layers calls of one region.
    """

    fold: bool = True
    causal: bool = True
    deduplicate: bool = True
    grouped_query: bool = True
    fuse: bool = True
    merge: bool = True
    fuse_adjacent: bool = True
    split: bool = True
    rematerialize: bool = True
    cache_in_place: bool = True
    overlap: bool = True
    reuse: bool = True
    direct_calls: bool = True
    repeat: bool = True

    @staticmethod
    def none() -> Lowering:
        """The options with every pass switched off."""
        return Lowering(**dict.fromkeys((f.name for f in fields(Lowering)), False))

    def __getattr__(self, name: str) -> bool:
        if name not in _RENAMED:
            raise AttributeError(f"Lowering has no option {name!r}; it has {', '.join(f.name for f in fields(self))}")
        value: bool = getattr(self, _current_name(name))
        return value

    def exactly(self) -> Lowering:
        """The options without the passes that call other kernels: the others keep every number to the bit."""
        return replace(self, causal=False, grouped_query=False, fuse=False, merge=False, rematerialize=False)


@dataclass
class Lowered:
    """A lowered graph.

    Attributes:
        graph: the graph, whose inputs are the rewritten graph's, and then the weights.
        weights: for each input that is a weight, the name of a parameter or buffer, or the names of several that are
            adjacent in memory.
        constants: the graph's constant tensors, by ``get_attr`` target.
        found: per pass, how often it applied.
        repeated: the regions that the graph calls, by ``call_module`` target.
    """

    graph: fx.Graph
    weights: list[tuple[str, ...]]
    constants: dict[str, torch.Tensor]
    found: dict[str, int] = field(default_factory=dict)
    repeated: dict[str, fx.Graph] = field(default_factory=dict)


def _with_weight_inputs(graph: fx.Graph, attributes: Collection[str]) -> fx.Graph:
    """A copy of a graph that takes its weights as inputs, after its others; ``attributes`` stay attributes."""
    copy, copies, weights = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    for node in graph.find_nodes(op="placeholder"):
        copies[node] = copy.node_copy(node)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in attributes and name not in weights:
            identifier = name.replace(".", "_")
            weights[name] = copy.placeholder(identifier if identifier.isidentifier() else f"weight_{identifier}")
            weights[name].meta = {**node.meta, "weights": (name,)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in weights:
            copies[node] = weights[node.target]
        elif node.op != "placeholder":
            copies[node] = copy.node_copy(node, copies.__getitem__)
    return copy


_BACKWARD_ONLY = (ops.enter, ops.enter_overlapping, ops.deduplicate_gradient)


def _forward_only(graph: fx.Graph) -> None:
    """Remove the ops that do something in a backward only."""
    for node in list(graph.nodes):
        if node.target not in _BACKWARD_ONLY:
            continue
        source = node.args[0]
        if isinstance(source, tuple):
            for user in list(node.users):
                user.replace_all_uses_with(source[user.args[1]])
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(source)
        graph.erase_node(node)


_VIEWS = {"aten.slice", "aten.transpose", "aten.permute", "aten.reshape", "aten.view", "aten.unsqueeze", "aten.squeeze",
          "aten.select", "getitem", "aten.unflatten", "aten.flatten"}  # fmt: skip
_SLICES = {"aten.slice", "aten.select", "getitem"}


def _copy_sliced_results(graph: fx.Graph) -> None:
    """Copy results that are slices of larger values, so that these can be freed."""
    output = graph.output_node()
    for node in list(output.all_input_nodes):
        is_slice, source = False, node
        while op_name(source) in _VIEWS and isinstance(source.args[0], fx.Node):
            is_slice = is_slice or op_name(source) in _SLICES
            source = source.args[0]
        if (
            is_slice
            and is_tensor(node)
            and op_name(source) != ""
            and op_name(source) not in ("max", "min", "topk", "sort")
        ):
            options = {"memory_format": torch.contiguous_format}
            copy = call(node.next, aten.clone.default, (node,), options, like=node, shape=local(node).shape)
            output.replace_input_with(node, copy)


def lower(
    graph: fx.Graph,
    rank: int,
    constants: Mapping[str, torch.Tensor],
    regions: Collection[str] = (),
    lowering: Lowering | None = None,
    *,
    grad: bool,
    written: Mapping[int, int] | None = None,
) -> Lowered:
    """Make one rank's graph faster.

    Args:
        graph: the rank's graph (:func:`passes.localize`), which is not changed.
        rank: the rank.
        constants: the graph's constant tensors, by ``get_attr`` target.
        regions: the submodules that the graph calls, by ``get_attr`` target.
        lowering: which passes run; all of them by default.
        grad: whether a backward follows.
        written: for the results that are written back into the memory of an input, that input's number.

    Returns:
        The lowered graph.
    """
    lowering = lowering or Lowering()
    own_constants = dict(constants)
    lowered = _with_weight_inputs(graph, {*own_constants, *regions})
    describe(lowered, rank)
    call_dense_ops(lowered)
    if not grad:
        _forward_only(lowered)
    applied: dict[str, int] = {}

    def run(name: str, apply: Any, *args: Any) -> None:
        if getattr(lowering, name):
            applied[name] = applied.get(name, 0) + apply(lowered, *args)

    run("causal", causal)
    run("fold", fold, own_constants)
    run("deduplicate", deduplicate)
    run("grouped_query", grouped_query)
    run("fuse", fuse, grad)
    run("merge", merge, grad)
    run("fuse_adjacent", fuse_adjacent)
    run("deduplicate", deduplicate)
    run("split", split)
    _copy_sliced_results(lowered)
    if grad:
        run("rematerialize", rematerialize)
    else:
        run("cache_in_place", cache_in_place, written or {})
    run("overlap", overlap, grad)
    if not grad:
        run("reuse", reuse)
    run("direct_calls", direct_calls)
    remove_dead_code(lowered)
    for node in lowered.find_nodes(op="placeholder"):
        if "weights" in node.meta and not node.users:
            lowered.erase_node(node)
    repeated: dict[str, fx.Graph] = {}
    run("repeat", repeat, regions, repeated)
    weights = [n.meta["weights"] for n in lowered.find_nodes(op="placeholder") if "weights" in n.meta]
    used = {str(n.target) for n in lowered.find_nodes(op="get_attr")}
    return Lowered(lowered, weights, {n: t for n, t in own_constants.items() if n in used}, applied, repeated)
