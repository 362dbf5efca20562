"""side_effects: what a forward does besides computing its outputs from weights and inputs.

A forward may write into tensors that it did not create, keep values on the model's modules, or update statistics in a
kernel whose schema does not declare it. A side effect that a graph can express becomes an argument: an
:class:`InputMutation` or a :class:`StateMutation` says which, and the call is captured again. Any other side effect is
an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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
    """The trace of a second call, made after the first one changed attributes of the modules.

    Args:
        outputs: the outputs of the first call.
        trace: traces a call.

    Returns:
        None if the first call left the modules unchanged. A StateMutation if it left tensors there, or if the second
        call changes the modules again.

    Raises:
        CaptureError: such a mutation cannot become an argument.
    """
    if not outputs.module_mutations:
        return None
    if any(mutation.has_tensors for mutation in outputs.module_mutations):
        return state_mutation(outputs.module_mutations)
    for mutation in outputs.module_mutations:
        mutation.apply()
    second = trace()
    if any(mutation.is_another for mutation in second[1].module_mutations):
        return state_mutation(outputs.module_mutations + second[1].module_mutations)
    return second


def state_mutation(mutations: Sequence[ModuleMutation]) -> StateMutation:
    """Mutations of the modules as one mutation whose locations can become arguments.

    Raises:
        CaptureError: one of them cannot become an argument.
    """
    refused = next((m.name for m in mutations if not m.can_be_argument), None)
    name = refused or mutations[0].name
    mutation = StateMutation(
        f"forward keeps something on the model ({name}), for a later call or for other code: a graph is a function of "
        "weights and inputs, and would lose it. Return it, or pass it in",
        frozenset(m.location for m in mutations if m.location is not None),
        f"forward keeps something on the module ({name})",
    )
    if refused is not None:
        raise mutation.error()
    return mutation


def computed_state(snapshot: Snapshot) -> StateMutation | None:
    """The mutation of tensors on the model by ops that depend on no input, and so are in no graph.

    Args:
        snapshot: the state of the modules before the call, with the values of their tensors.

    Raises:
        CaptureError: none of the written tensors is in an attribute or a buffer.
    """
    if not (written := snapshot.written()):
        return None
    locations = frozenset(replace(location, sharded=True) for location in snapshot.locations(written))
    names = ", ".join(sorted(location.name for location in locations))
    mutation = StateMutation(f"forward changes tensors in place that are no arguments ({names})", locations)
    if not locations:
        raise mutation.error()
    return mutation


def refuse_views(captured: CapturedGraph) -> None:
    """Refuse module state that shares memory with a parameter, or with other module state.

    A graph returns each as a tensor of its own, so that a later mutation of one would not reach the other.

    Raises:
        CaptureError: there is such state.
    """
    results = captured.graph.output_node().args[0]
    state = {results[i] for i in captured.outputs.own if isinstance(results[i], fx.Node) and is_tensor(results[i])}
    for node in state:
        for source in sources(node):
            parameter = source.op == "get_attr" and source.target in captured.parameters
            if parameter or (source is not node and source in state and source.op == "call_function"):
                owner = f"the parameter {source.target}" if parameter else "another tensor that it keeps"
                raise CaptureError(
                    f"forward keeps a view of {owner} on the model: a graph would keep a copy",
                    reason="forward keeps tensors on the module that share memory",
                )


def refuse_statistics(graph: fx.Graph) -> None:
    """Refuse kernels that update running statistics: torch's schemas do not declare it, so a graph would lose it.

    Raises:
        CaptureError: there is such a kernel; the message names its line.
    """
    for node in graph.nodes:
        if op_name(node) in ("aten.batch_norm", "aten.instance_norm") and node.args[3] is not None and node.args[5]:
            raise CaptureError(
                f"{where(node)} changes running statistics: a graph is a function of weights and inputs only",
                reason="forward changes running statistics",
            )


def written_inputs(
    captured: CapturedGraph, remaining: list[fx.Node], keys: Sequence[int | str], snapshot: Snapshot
) -> InputMutation | StateMutation | None:
    """The mutation of plain arguments, or of tensors on modules, by nodes that could not be made functional.

    Args:
        captured: the captured graph.
        remaining: the nodes that could not be made functional.
        keys: for each input tensor the position or keyword of its argument.
        snapshot: the state of the modules before the call.

    Raises:
        CaptureError: a node writes into a tensor that is neither in an argument nor on a module.
    """
    roots = {str(r.target): n for n in remaining for r in n.meta.get("roots", ()) if r.op == "get_attr"}
    if on_modules := {target: n for target, n in roots.items() if target not in captured.parameters}:
        buffers = (target.rpartition(".") for target in on_modules if target not in captured.constants)
        locations = {StateLocation(module, key, True, True) for module, _, key in buffers}
        tensors = snapshot.locations([captured.constants[t] for t in on_modules if t in captured.constants])
        locations |= {replace(location, sharded=True) for location in tensors}
        names = ", ".join(sorted(location.name for location in locations)) or "created outside of it"
        line = where(next(iter(on_modules.values())))
        mutation = StateMutation(
            f"{line} changes a tensor in place that is no argument ({names})", frozenset(locations)
        )
        if not locations:
            raise mutation.error()
        return mutation
    inputs = {n: i for i, n in enumerate(captured.graph.find_nodes(op="placeholder"))}
    written = {inputs[r]: n for n in remaining for r in n.meta.get("roots", ()) if r in inputs}
    plain = {i: n for i, n in written.items() if i not in captured.slots}
    if not plain:
        return None
    mutated = frozenset(keys[i] for i in plain)
    names = ", ".join(sorted(map(repr, mutated)))
    return InputMutation(f"{where(next(iter(plain.values())))} changes arguments in place ({names})", mutated)
