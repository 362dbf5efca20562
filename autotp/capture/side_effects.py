"""side_effects: what a forward does besides computing its outputs from weights and inputs.

A forward may write into tensors that it did not make, keep something on the model's modules, or update statistics in a
kernel whose schema does not declare it. What a graph can give back becomes an argument, and the call is captured again
(an :class:`InputMutation` or a :class:`StateMutation` says which); everything else is an error that says what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autotp.arguments.mutations import InputMutation, StateLocation, StateMutation
from autotp.arguments.snapshot import ModuleMutation, Snapshot
from autotp.capture.captured_graph import CapturedGraph
from autotp.capture.outputs import OutputSpec
from autotp.errors import CaptureError
from passes.graphs import is_tensor, op_name, where
from passes.normalize.aliases import sources

__all__ = ["computed_state", "refuse_statistics", "refuse_views", "state_mutation", "trace_again", "written_inputs"]


def trace_again(outputs: OutputSpec, trace: Callable[[], tuple[Any, OutputSpec]]) -> Any:
    """The trace of a second call, which finds what the first one has left on the modules.

    Returns:
        None if the first call has left nothing; a StateMutation if it has left tensors, or the second one leaves
        something else again.

    Raises:
        CaptureError: such a mutation cannot be an argument.
    """
    if not outputs.module_mutations:
        return None
    if any(kept.has_tensors for kept in outputs.module_mutations):
        return state_mutation(outputs.module_mutations)
    for kept in outputs.module_mutations:
        kept.apply()
    again = trace()
    if any(kept.is_another for kept in again[1].module_mutations):
        return state_mutation(outputs.module_mutations + again[1].module_mutations)
    return again


def state_mutation(kept: Sequence[ModuleMutation]) -> StateMutation:
    """What a forward keeps on modules, as a mutation that can become an argument.

    Raises:
        CaptureError: something of it cannot.
    """
    cannot = next((k.name for k in kept if not k.can_be_argument), None)
    name = cannot or kept[0].name
    mutation = StateMutation(
        f"forward keeps something on the model ({name}), from one call to the next or for others to read: a graph is a "
        "function of weights and inputs, and would not. Return it, or pass it in",
        frozenset(k.location for k in kept if k.location is not None),
        f"forward keeps something on the module ({name})",
    )
    if cannot is not None:
        raise mutation.error()
    return mutation


def computed_state(written: Sequence[torch.Tensor], snapshot: Snapshot) -> StateMutation | None:
    """The tensors on the model that a forward writes into without any input, which shows in no graph.

    Raises:
        CaptureError: they are in no attribute or buffer.
    """
    if not written:
        return None
    places = frozenset(replace(place, sharded=True) for place in snapshot.locations(written))
    names = ", ".join(sorted(p.name for p in places))
    mutation = StateMutation(f"forward changes tensors in place that are no arguments ({names})", places)
    if not places:
        raise mutation.error()
    return mutation


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


def written_inputs(
    captured: CapturedGraph, left: list[fx.Node], keys: Sequence[int | str], snapshot: Snapshot
) -> InputMutation | StateMutation | None:
    """The plain arguments, or tensors on modules, that the nodes ``left`` write into.

    Args:
        captured: the captured graph.
        left: the nodes that could not be made functional.
        keys: the argument that each input tensor is in, by position or keyword.
        snapshot: the state of the modules before the call.

    Raises:
        CaptureError: what is written into is neither an argument nor on a module.
    """
    roots = {str(r.target): n for n in left for r in n.meta.get("roots", ()) if r.op == "get_attr"}
    if on_modules := {target: n for target, n in roots.items() if target not in captured.parameters}:
        buffers = (target.rpartition(".") for target in on_modules if target not in captured.constants)
        locations = {StateLocation(module, key, True, True) for module, _, key in buffers}
        tensors = snapshot.locations([captured.constants[t] for t in on_modules if t in captured.constants])
        locations |= {replace(location, sharded=True) for location in tensors}
        names = ", ".join(sorted(p.name for p in locations)) or "made outside of it"
        line = where(next(iter(on_modules.values())))
        mutation = StateMutation(
            f"{line} changes a tensor in place that is no argument ({names})", frozenset(locations)
        )
        if not locations:
            raise mutation.error()
        return mutation
    inputs = {n: i for i, n in enumerate(captured.graph.find_nodes(op="placeholder"))}
    written = {inputs[r]: n for n in left for r in n.meta.get("roots", ()) if r in inputs}
    plain = {i: n for i, n in written.items() if i not in captured.slots}
    if not plain:
        return None
    mutated = frozenset(keys[i] for i in plain)
    names = ", ".join(sorted(map(repr, mutated)))
    return InputMutation(f"{where(next(iter(plain.values())))} changes arguments in place ({names})", mutated)
