"""graph_text: rewritten and lowered graphs as text, and in Graphviz's language."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from passes import Shards
from passes.layouts.sharded_value import PerRank
from passes.ops.registry import COLLECTIVES

__all__ = ["graph_dot", "graph_text", "inputs_text", "lowered_text"]


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_argument(v) for v in value)
        left, right = ("(", ",)" if len(value) == 1 else ")") if isinstance(value, tuple) else ("[", "]")
        return left + inner + right
    if isinstance(value, PerRank):
        return f"<{'|'.join(_argument(v) for v in value.values)}>"
    if isinstance(value, (torch.dtype, torch.device, torch.layout)):
        return re.sub(r"^torch\.", "", str(value))
    if value == 9223372036854775807:
        return "end"
    return repr(value)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket).removeprefix("aten.")
    return getattr(node.target, "__name__", str(node.target))


def _shape(node: fx.Node, rank: int | None = None) -> str:
    """A node's type and shape: ``V[s0, s1, 4of16, 64]`` for one rank, ``4/4/3/3of14`` in a dim for all ranks."""
    value, layout = node.meta.get("global"), node.meta.get("layout")
    if not isinstance(value, torch.Tensor):
        return ""
    dims, virtual, text = layout.dims if layout is not None else {}, 0, []
    for size, factors in zip(value.shape, node.meta.get("axes") or [()] * value.dim(), strict=True):
        split = [dims.get(v) for v in range(virtual, virtual + len(factors))]
        virtual += len(factors)
        if not any(split):
            text.append(str(size))
            continue
        texts = [str(f) if s is None else f"{_counts(s, rank)}of{s.size}" for f, s in zip(factors, split, strict=True)]
        text.append("*".join(texts))
    return f"{node.meta.get('type', '')}[{', '.join(text)}]"


def _counts(shards: Shards, rank: int | None) -> str:
    if rank is not None:
        return str(shards.counts[rank])
    return "/".join(map(str, shards.counts if len(set(shards.counts)) > 1 else shards.counts[:1]))


def graph_text(graph: fx.Graph, title: str, rank: int | None = None) -> str:
    """A rewritten graph as text: one line a node, grouped by module, with each value's type and shape.

    A shape such as ``V[s0, s1, 4of16, 64]`` reads: varying over the ranks, and of the third dim's 16
    indices this rank holds 4. The types are I (invariant), R (replicated, partial gradient), V
    (varying) and P (partial sum).
    """
    lines, module = [f"# {title}"], None
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op != "output" and node.meta.get("module") != module:
            module = node.meta.get("module")
            lines += ["", f"# {module or 'the model'}"]
        args = [_weight(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
        if node.op == "output":
            lines += ["", f"return {_argument(node.args[0])}"]
        elif node.op == "placeholder":
            lines.append(f"{node.name:<100}  # {_shape(node, rank)}")
        else:
            text = f"{node.name} = {_target(node)}({', '.join(args)})"
            shape = _shape(node, rank)
            lines.append(f"{text:<100}  # {shape}" if shape else text)
    return "\n".join(lines)


def inputs_text(graph: fx.Graph, names: Sequence[str]) -> str:
    """The inputs of a captured graph with their shapes; for an object the number of its tensors.

    >>> inputs_text(graph, ["args[0]", "kwargs['cache'].keys", "kwargs['cache'].values"])
    'args[0][s0, 1], cache (2 tensors)'
    """
    shapes: dict[str, list[str]] = {}
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        name = re.sub(r"^kwargs\['(\w+)'\]", r"\1", name)
        argument, dot, _ = name.partition(".")
        shape = f"[{', '.join(map(str, node.meta['val'].shape))}]"
        shapes.setdefault(argument, []).append("" if dot else shape)
    return ", ".join(n + (s[0] or f" ({len(s)} tensor{'s' * (len(s) > 1)})") for n, s in shapes.items())


def lowered_text(graph: fx.Graph, title: str, repeated: Mapping[str, fx.Graph] | None = None) -> str:
    """A lowered graph as text: one line a node, grouped by module, with each value's local shape; then its regions."""
    lines, module = [f"# {title}"], None
    names = {n.name: f"self[{' | '.join(n.meta['weights'])}]" for n in graph.nodes if "weights" in n.meta}
    word = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b") if names else None

    def named(text: str) -> str:
        """The text with the weights' own names; replaced all at once, since a name may look like another's node."""
        return word.sub(lambda match: names[match[0]], text) if word is not None else text

    for node in graph.nodes:
        if node.op == "get_attr" or node.name in names:
            continue
        if node.op == "output":
            lines += ["", named(f"return {_argument(node.args[0])}")]
            continue
        if node.meta.get("module", module) != module:
            module = node.meta["module"]
            lines += ["", f"# {module or 'the model'}"]
        value = node.meta.get("local")
        shape = f"[{', '.join(map(str, value.shape))}]" if value is not None else ""
        args = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
        call = "" if node.op == "placeholder" else f" = {_target(node)}({named(', '.join(args))})"
        lines.append(f"{node.name + call:<100}  # {shape}" if shape else node.name + call)
    return "\n\n".join(
        ["\n".join(lines), *(lowered_text(g, f"{name}, as in its first call") for name, g in (repeated or {}).items())]
    )


def _weight(argument: Any) -> str:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return f"self.{argument.target}"
    if isinstance(argument, (tuple, list)) and any(isinstance(a, fx.Node) for a in argument):
        inner = ", ".join(_weight(a) for a in argument)
        return f"({inner})" if isinstance(argument, tuple) else f"[{inner}]"
    return _argument(argument)


_COLOURS = {"I": "white", "R": "lightgrey", "V": "lightblue", "P": "orange"}


def graph_dot(graph: fx.Graph, title: str) -> str:
    """A rewritten graph in Graphviz's language; colours stand for types, bold boxes for collectives."""
    lines = [f'digraph "{title}" {{', "  node [shape=box style=filled fontname=monospace fontsize=10];"]
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        collective = node.target in COLLECTIVES and COLLECTIVES[node.target].communicates
        colour = _COLOURS.get(node.meta.get("type", "I"), "white")
        label = f"{node.name}\\n{_target(node) if node.op == 'call_function' else node.op}\\n{_shape(node)}"
        lines.append(f'  "{node.name}" [label="{label}" fillcolor={colour}{" penwidth=3" if collective else ""}];')
        lines += [f'  "{n.name}" -> "{node.name}";' for n in node.all_input_nodes if n.op != "get_attr"]
    return "\n".join([*lines, "}"])
