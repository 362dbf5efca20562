"""impure: what of a captured call is no function of weights and inputs.

A forward may write into tensors that it did not make, keep something on the model's modules, or update statistics in a
kernel that does not say so. What a graph can give back becomes an argument more, and the call is captured again
(:class:`KeptError`, :class:`ChangedError`); all else is an error that says what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autotp.arguments.mutations import ChangedError, KeptError, StateLocation
from autotp.arguments.snapshot import Kept, Snapshot
from autotp.errors import CaptureError
from passes.graphs import is_tensor, op_name, where
from passes.normalize.aliases import sources

if TYPE_CHECKING:
    from autotp.capture.captured_graph import CapturedGraph
    from autotp.capture.outputs import OutputSpec

__all__ = [
    "more_than_a_function",
    "refuse_computed",
    "refuse_statistics",
    "refuse_views",
    "refuse_written",
    "traced_again",
]


def traced_again(outputs: OutputSpec, trace: Callable[[], tuple[Any, OutputSpec]]) -> Any:
    """The trace of a call that finds what the first one has kept on the modules; None if that is nothing.

    Raises:
        CaptureError: it keeps tensors, or something else again.
    """
    if not outputs.kept:
        return None
    if any(kept.has_tensors for kept in outputs.kept):
        raise more_than_a_function(outputs.kept)
    for kept in outputs.kept:
        kept.again()
    again = trace()
    if any(kept.is_another for kept in again[1].kept):
        raise more_than_a_function(outputs.kept + again[1].kept)
    return again


def more_than_a_function(kept: Sequence[Kept]) -> CaptureError:
    """The error that a forward keeps something; which may be an argument, if it can be."""
    cannot = next((k.name for k in kept if not k.can_be_argument), None)
    name = cannot or kept[0].name
    said = (
        f"forward keeps something on the model ({name}), from one call to the next or for others to read: a graph is a "
        "function of weights and inputs, and would not. Return it, or pass it in"
    )
    reason = f"forward keeps something on the module ({name})"
    if cannot is not None:
        return CaptureError(said, reason=reason)
    return KeptError(said, {k.place for k in kept if k.place is not None}, reason=reason)


def refuse_computed(written: Sequence[torch.Tensor], snapshot: Snapshot) -> None:
    """Raise if a forward has written into tensors on the model, of tensors on the model alone: no graph shows it."""
    if not written:
        return
    places = {replace(place, sharded=True) for place in snapshot.places(written)}
    said = f"forward changes tensors in place that are no arguments ({', '.join(sorted(p.name for p in places))})"
    raise KeptError(said, places) if places else CaptureError(said)


def refuse_views(captured: CapturedGraph) -> None:
    """Raise if what a forward keeps is a parameter, or shares memory with one, or with something else that it keeps:
    each would be a tensor of its own, and what happens to one later would not happen to the other."""
    results = captured.graph.output_node().args[0]
    kept = {results[i] for i in captured.outputs.own if isinstance(results[i], fx.Node) and is_tensor(results[i])}
    for node in kept:
        for source in sources(node):
            parameter = source.op == "get_attr" and source.target in captured.parameters
            if parameter or (source is not node and source in kept and source.op == "call_function"):
                what = f"the parameter {source.target}" if parameter else "a view of something else that it keeps"
                raise CaptureError(
                    f"forward keeps {what} on the model, or a part of it: a graph would keep a copy",
                    reason="forward keeps tensors on the module that share memory",
                )


def refuse_statistics(graph: fx.Graph) -> None:
    """Raise if a kernel writes running statistics: torch's schemas do not say so, and a graph would lose them."""
    for node in graph.nodes:
        if op_name(node) in ("aten.batch_norm", "aten.instance_norm") and node.args[3] is not None and node.args[5]:
            raise CaptureError(
                f"{where(node)} changes running statistics: autotp runs functions of weights and inputs only",
                reason="forward changes running statistics",
            )


def refuse_written(captured: CapturedGraph, left: list[fx.Node], keys: Sequence[int | str], snapshot: Snapshot) -> None:
    """Raise if what changes tensors in place are plain arguments, or are on the model's modules: a graph gives them
    back, if they are opened."""
    roots = {str(r.target): n for n in left for r in n.meta.get("roots", ()) if r.op == "get_attr"}
    if on_modules := {target: n for target, n in roots.items() if target not in captured.parameters}:
        buffers = (target.rpartition(".") for target in on_modules if target not in captured.constants)
        kept = {StateLocation(module, key, True, True) for module, _, key in buffers}
        held = snapshot.places([captured.constants[t] for t in on_modules if t in captured.constants])
        kept |= {replace(place, sharded=True) for place in held}
        names = ", ".join(sorted(p.name for p in kept)) or "made outside of it"
        said = f"{where(next(iter(on_modules.values())))} changes a tensor in place that is no argument ({names})"
        raise KeptError(said, kept) if kept else CaptureError(said)
    inputs = {n: i for i, n in enumerate(captured.graph.find_nodes(op="placeholder"))}
    written = {inputs[r]: n for n in left for r in n.meta.get("roots", ()) if r in inputs}
    places = {keys[i] for i in written if i not in captured.slots}
    if places:
        first = next(n for i, n in written.items() if i not in captured.slots)
        said = ", ".join(sorted(map(repr, places)))
        raise ChangedError(f"{where(first)} changes arguments in place ({said})", places)
