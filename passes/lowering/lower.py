"""lower: one rank's graph becomes one that computes the same faster."""

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
from passes.lowering.local_values import call, describe, is_tensor, local, plain, remove_dead_code
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
"""The names that options had before version 0.2, and those that they have."""


def _renamed(name: str) -> str:
    """The present name of an option; an old name is accepted with a warning."""
    if name not in _RENAMED:
        return name
    warnings.warn(f"Lowering({name}=...) is now Lowering({_RENAMED[name]}=...)", DeprecationWarning, stacklevel=3)
    return _RENAMED[name]


def _accepts_old_names(cls: type[Lowering]) -> type[Lowering]:
    own = cls.__init__

    @functools.wraps(own)
    def init(self: Lowering, *args: bool, **options: bool) -> None:
        own(self, *args, **{_renamed(name): value for name, value in options.items()})

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@_accepts_old_names
@dataclass(frozen=True)
class Lowering:
    """Which passes run (:mod:`passes.lowering`); each can be switched off.

    Attributes:
        fold: take out what computes nothing, or the same in every call.
        causal: ``is_causal`` instead of a mask that says just that.
        deduplicate: compute once what is computed twice.
        grouped_query: grouped-query attention instead of repeated keys and values.
        fuse: norms and GELUs that are written out as one op.
        merge: Linears of one input as one product.
        fuse_adjacent: do once what is done alike to adjacent parts of a value.
        split: cut out in one call the parts that make up a whole.
        rematerialize: with a backward, keep of norms and gated activations only what they are made of.
        cache_in_place: without a backward, let caches grow in memory that has room, without a copy.
        overlap: compute what needs no sum over the ranks while that is under way.
        reuse: without a backward, write over operands that nothing reads any more.
        direct_calls: call torch's C functions.
        repeat: for a compiler, layers that are alike as calls of one region.
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
        """No pass at all."""
        return Lowering(**dict.fromkeys((f.name for f in fields(Lowering)), False))

    def __getattr__(self, name: str) -> bool:
        if name not in _RENAMED:
            raise AttributeError(f"Lowering has no option {name!r}; it has {', '.join(f.name for f in fields(self))}")
        value: bool = getattr(self, _renamed(name))
        return value

    def exactly(self) -> Lowering:
        """Those of the passes that leave every number as it is, to the bit: not those that call other kernels."""
        return replace(self, causal=False, grouped_query=False, fuse=False, merge=False, rematerialize=False)


@dataclass
class Lowered:
    """A lowered graph.

    Attributes:
        graph: its inputs are the rewritten graph's, and then the weights.
        weights: for each input that is a weight the name of a parameter or buffer, or the names of several that lie
            side by side in memory.
        constants: the tensors that the graph has, by ``get_attr`` target.
        found: how much each pass found.
        repeated: the regions that the graph calls, by ``call_module`` target.
    """

    graph: fx.Graph
    weights: list[tuple[str, ...]]
    constants: dict[str, torch.Tensor]
    found: dict[str, int] = field(default_factory=dict)
    repeated: dict[str, fx.Graph] = field(default_factory=dict)


def _copied(graph: fx.Graph, kept: Collection[str]) -> fx.Graph:
    """A copy that takes weights as inputs, after its others, in place of all attributes but those kept."""
    own, copies, held = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    for node in graph.find_nodes(op="placeholder"):
        copies[node] = own.node_copy(node)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in kept and name not in held:
            spelled = name.replace(".", "_")
            held[name] = own.placeholder(spelled if spelled.isidentifier() else f"weight_{spelled}")
            held[name].meta = {**node.meta, "weights": (name,)}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in held:
            copies[node] = held[node.target]
        elif node.op != "placeholder":
            copies[node] = own.node_copy(node, copies.__getitem__)
    return own


_BACKWARD_ONLY = (ops.enter, ops.enter_overlapping, ops.deduplicate_gradient)


def _forward_only(graph: fx.Graph) -> None:
    """Take out what does something in a backward only."""
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
_CUTS = {"aten.slice", "aten.select", "getitem"}


def _own_results(graph: fx.Graph) -> None:
    """Let results that are parts of larger values be copies, so that these are not kept for them."""
    output = graph.output_node()
    for node in list(output.all_input_nodes):
        cut, source = False, node
        while op_name(source) in _VIEWS and isinstance(source.args[0], fx.Node):
            cut = cut or op_name(source) in _CUTS
            source = source.args[0]
        if cut and is_tensor(node) and op_name(source) != "" and op_name(source) not in ("max", "min", "topk", "sort"):
            options = {"memory_format": torch.contiguous_format}
            own = call(node.next, aten.clone.default, (node,), options, like=node, shape=local(node).shape)
            output.replace_input_with(node, own)


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
        graph: the rank's graph (:func:`passes.localize`), which stays as it is.
        rank: the rank.
        constants: the tensors that the graph has, by ``get_attr`` target.
        regions: the submodules that it calls, by ``get_attr`` target.
        lowering: which passes run; all of them by default.
        grad: whether a backward follows.
        written: the results that go back into the memory of an input, by its number.

    Returns:
        The lowered graph.
    """
    lowering = lowering or Lowering()
    held = dict(constants)
    own = _copied(graph, {*held, *regions})
    describe(own, rank)
    plain(own)
    if not grad:
        _forward_only(own)
    found: dict[str, int] = {}

    def run(name: str, apply: Any, *args: Any) -> None:
        if getattr(lowering, name):
            found[name] = found.get(name, 0) + apply(own, *args)

    run("causal", causal)
    run("fold", fold, held)
    run("deduplicate", deduplicate)
    run("grouped_query", grouped_query)
    run("fuse", fuse, grad)
    run("merge", merge, grad)
    run("fuse_adjacent", fuse_adjacent)
    run("deduplicate", deduplicate)
    run("split", split)
    _own_results(own)
    if grad:
        run("rematerialize", rematerialize)
    else:
        run("cache_in_place", cache_in_place, written or {})
    run("overlap", overlap, grad)
    if not grad:
        run("reuse", reuse)
    run("direct_calls", direct_calls)
    remove_dead_code(own)
    for node in own.find_nodes(op="placeholder"):
        if "weights" in node.meta and not node.users:
            own.erase_node(node)
    repeated: dict[str, fx.Graph] = {}
    run("repeat", repeat, regions, repeated)
    weights = [n.meta["weights"] for n in own.find_nodes(op="placeholder") if "weights" in n.meta]
    used = {str(n.target) for n in own.find_nodes(op="get_attr")}
    return Lowered(own, weights, {n: t for n, t in held.items() if n in used}, found, repeated)
