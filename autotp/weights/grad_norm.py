"""grad_norm: torch's norms of gradients, correct where parameters are shards.

``torch.nn.utils.clip_grad_norm_`` and ``get_total_norm`` see a rank's tensors and know nothing of the other ranks. From
the first ``parallelize`` on they count every element of the dense model once, and return the same bits on all ranks.
For tensors of other models they do what torch does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grad

from autotp.errors import AutoTPError
from autotp.utils.hashing import stable_hash
from autotp.utils.value_types import DTENSOR, is_a
from autotp.weights.registry import Sharded, living, memory_key
from passes import Shards, ops

__all__ = ["as_list", "by_model", "compare", "gathered", "patch_grad_norms"]

_Entries = list[tuple[int, str, Mapping[int, Shards]]]
"""The positions of tensors in a list, with the names and split dims of their parameters."""


def patch_grad_norms() -> None:
    """Let torch's gradient norms count the elements of parallelized models once over the ranks.

    Raises:
        AutoTPError: torch's functions are not those that autotp knows.
    """
    for function, replacement in ((clip_grad._get_total_norm, _total_norm), (clip_grad.clip_grad_norm_, _clip)):
        _replace(function, replacement)


def _replace(function: Any, replacement: Callable[..., Any]) -> None:
    """Replace the function inside the ``no_grad`` wrapper of one of torch's functions.

    The wrapper stays, so that the replacement also runs where a script has imported the wrapper before.
    """
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "func" not in names:
        raise AutoTPError(
            f"torch {torch.__version__} has a {function.__qualname__} that autotp does not know: gradient norms would "
            "count this rank's shards only. Use a torch release that autotp supports"
        )
    cell = function.__closure__[names.index("func")]
    if not isinstance(cell.cell_contents, functools.partial):
        cell.cell_contents = functools.partial(replacement, cell.cell_contents)


def as_list(tensors: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor or several as a list."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _clip(
    original: Callable[..., torch.Tensor],
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """torch's ``clip_grad_norm_``, after the ranks have compared which parameters have a gradient.

    Without the comparison, a rank that has no gradient would not know that the others wait for it.
    """
    parameters = parameters if isinstance(parameters, torch.Tensor) else list(parameters)
    ids = {id(p) for p in as_list(parameters)}
    for model in living():
        clipped = [(name, p, shards) for name, p, shards in model.placed() if id(p) in ids]
        if any(shards for _, _, shards in clipped):
            gradients = {f"gradient of {name}": "None" if p.grad is None else "a tensor" for name, p, _ in clipped}
            settings = {"max_norm": str(float(max_norm)), "norm_type": str(float(norm_type))}
            compare(model, "clip_grad_norm_", settings | gradients)
    return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def compare(model: Sharded, doing: str, details: Mapping[str, str]) -> None:
    """Raise on all ranks unless the details are the same on them."""
    model.agreement.check(doing, stable_hash(str(details)), lambda: details)


def _total_norm(
    original: Callable[..., torch.Tensor],
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """torch's ``get_total_norm``, in which each shard stands for its dense tensor.

    Shards are parameters of parallelized models, their ``.grad``, or tensors that share memory with one of these. Each
    rank takes torch's norm of the elements that no lower rank holds. These norms are gathered, with rank 0's norm of
    the unsplit tensors. The result is torch's norm of the gathered norms, which are the same numbers on every rank.
    """
    tensors, power = as_list(tensors), float(norm_type)
    models = by_model(tensors)
    if not models:
        return original(tensors, norm_type, error_if_nonfinite, foreach)
    if any(is_a(t, DTENSOR) for t in tensors):
        raise AutoTPError("one norm over DTensors and a parallelized model's shards: take a norm of each, and combine")
    if power == 0:
        raise AutoTPError("norm_type=0 counts tensors, and a shard is not one: use autotp.full_gradients")
    device, dtype = tensors[0].device, functools.reduce(torch.promote_types, [t.dtype.to_real() for t in tensors])

    def norm(operands: list[torch.Tensor]) -> torch.Tensor:
        operands = [t for t in operands if t.numel()]  # torch has no largest element of an empty tensor
        if not operands:
            return torch.tensor(0.0 if power > 0 else math.inf).to(device, dtype)
        return original(operands, power, False, foreach).to(device, dtype)

    for model, entries in models:
        compare(model, "get_total_norm", {"norm_type": str(power), "tensors": str([n for _, n, _ in entries])})
    return original(gathered(models, tensors, norm), power, error_if_nonfinite, foreach)


def gathered(
    models: Sequence[tuple[Any, _Entries]],
    tensors: Sequence[torch.Tensor],
    value: Callable[[list[torch.Tensor]], torch.Tensor],
) -> list[torch.Tensor]:
    """The values, on every rank, of lists of tensors in which each element of the dense tensors stands once.

    The lists are, for each model, one of every rank's shards without what a lower rank holds, and one of rank 0's
    unsplit tensors; the first of these has the tensors of no model, too.

    Args:
        models: what :func:`by_model` returns.
        tensors: the tensors.
        value: returns a scalar for a list of tensors, which may be empty; of the same dtype and device for all.
    """
    rest = set(range(len(tensors))) - {i for _, entries in models for i, _, _ in entries}
    values: list[torch.Tensor] = []
    for model, entries in models:
        split = [_owned(tensors[i], shards, model.mesh.rank) for i, _, shards in entries if shards]
        unsplit = [tensors[i] for i, _, shards in entries if not shards] + [tensors[i] for i in sorted(rest)]
        rest = set()
        pair = torch.stack([value(split), value(unsplit)])
        pairs = model.context.group("tp").all_gather(pair, [[2]] * model.mesh.tp)
        values += [p[0] for p in pairs] + [pairs[0][1]]
    return values


def by_model(tensors: list[torch.Tensor]) -> list[tuple[Any, _Entries]]:
    """The parallelized models with shards among the tensors, and the position, name and split dims of each tensor."""
    if not living():
        return []
    positions: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        positions.setdefault(memory_key(t), []).append(i)
    result = []
    for model in living():
        entries = [
            (i, name, shards)
            for name, p, shards in model.placed()
            for t in (p, p.grad)
            if t is not None
            for i in positions.get(memory_key(t), ())
        ]
        if any(shards for _, _, shards in entries):
            result.append((model, sorted(entries, key=lambda entry: entry[0])))
    return result


def _owned(local: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
    """The elements of a shard that no lower rank holds."""
    for dim, s in shards.items():
        if not s.disjoint:
            own = s.ranks[rank].positions(s.owned.ranks[rank])
            local = ops.narrow(local, dim, own.runs) if len(own) else local.narrow(dim, 0, 0)
    return local
