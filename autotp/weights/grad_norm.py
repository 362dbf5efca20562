"""clipping: torch's norms of gradients, right where parameters are shards.

``torch.nn.utils.clip_grad_norm_`` and ``get_total_norm`` see a rank's tensors and know nothing of the other
ranks. From the first ``parallelize`` on they count every element of the dense model once, and give all ranks
the same bits. Tensors of other models are left to torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.utils import clip_grad

from autotp.errors import AutoTPError
from autotp.utils.hashing import stable_hash
from autotp.utils.value_types import DTENSOR, is_a
from autotp.weights.registry import Sharded, living
from passes import Shards, ops

__all__ = ["patch_grad_norms"]


def patch_grad_norms() -> None:
    """Let torch's gradient norms count the elements of parallelized models once over the ranks.

    Raises:
        AutoTPError: torch's functions are not as autotp knows them.
    """
    for function, ours in ((clip_grad._get_total_norm, _total_norm), (clip_grad.clip_grad_norm_, _clip)):
        _exchange(function, ours)


def _exchange(function: Any, ours: Callable[..., Any]) -> None:
    """Exchange what one of torch's functions calls inside its ``no_grad`` wrapper.

    The wrapper stays: a script that has it from ``from torch.nn.utils import clip_grad_norm_`` means it too.
    """
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if "func" not in names:
        raise AutoTPError(
            f"torch {torch.__version__} has a {function.__qualname__} that autotp does not know: gradient norms would "
            "count this rank's shards only. Use a torch release that autotp supports"
        )
    cell = function.__closure__[names.index("func")]
    if not isinstance(cell.cell_contents, functools.partial):
        cell.cell_contents = functools.partial(ours, cell.cell_contents)


def _listed(tensors: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _clip(
    torchs: Callable[..., torch.Tensor],
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """torch's ``clip_grad_norm_``, after the ranks have compared which parameters have a gradient.

    A rank without any gradient would not know that the others wait for it.
    """
    given = parameters if isinstance(parameters, torch.Tensor) else list(parameters)
    ids = {id(p) for p in _listed(given)}
    for model in living():
        mine = [(name, p, shards) for name, p, shards in model.placed() if id(p) in ids]
        if any(shards for _, _, shards in mine):
            there = {f"gradient of {name}": "None" if p.grad is None else "a tensor" for name, p, _ in mine}
            settings = {"max_norm": str(float(max_norm)), "norm_type": str(float(norm_type))}
            _compare(model, "clip_grad_norm_", settings | there)
    return torchs(given, max_norm, norm_type, error_if_nonfinite, foreach)


def _compare(model: Sharded, doing: str, what: Mapping[str, str]) -> None:
    model.agreement.check(doing, stable_hash(str(what)), lambda: what)


def _total_norm(
    torchs: Callable[..., torch.Tensor],
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """torch's ``get_total_norm`` over the dense tensors of which some given are shards.

    Shards are parameters of parallelized models or their ``.grad``, or share memory with one. Each rank takes
    torch's norm of the elements that no lower rank holds; the norms, and rank 0's of what is whole, are
    gathered, and torch's norm of those is the result, from the same numbers on every rank.
    """
    given, power = _listed(tensors), float(norm_type)
    every = _by_model(given)
    if not every:
        return torchs(given, norm_type, error_if_nonfinite, foreach)
    if any(is_a(t, DTENSOR) for t in given):
        raise AutoTPError("one norm over DTensors and a parallelized model's shards: take a norm of each, and combine")
    if power == 0:
        raise AutoTPError("norm_type=0 counts tensors, and a shard is not one: use autotp.full_gradients")
    dtype = functools.reduce(torch.promote_types, [t.dtype.to_real() for t in given])

    def norm(parts: list[torch.Tensor]) -> torch.Tensor:
        parts = [p for p in parts if p.numel()]  # torch knows no largest element of nothing
        found = torchs(parts, power, False, foreach) if parts else torch.tensor(0.0 if power > 0 else math.inf)
        return found.to(given[0].device, dtype)

    rest = set(range(len(given))) - {i for _, found in every for i, _, _ in found}
    scalars: list[torch.Tensor] = []
    for model, found in every:
        _compare(model, "get_total_norm", {"norm_type": str(power), "tensors": str([n for _, n, _ in found])})
        split = [_unshared(given[i], shards, model.mesh.rank) for i, _, shards in found if shards]
        whole = [given[i] for i, _, shards in found if not shards] + [given[i] for i in sorted(rest)]
        rest = set()
        pair = torch.stack([norm(split), norm(whole)])
        pairs = model.fabric.group("tp").all_gather(pair, [[2]] * model.mesh.tp)
        scalars += [p[0] for p in pairs] + [pairs[0][1]]
    return torchs(scalars, power, error_if_nonfinite, foreach)


def _memory(t: torch.Tensor) -> Any:
    """What ``p.grad`` and ``p.grad.detach()`` have in common."""
    plain = t.layout is torch.strided and not is_a(t, DTENSOR) and t.numel()
    return (t.data_ptr(), t.shape) if plain else id(t)


def _by_model(given: list[torch.Tensor]) -> list[tuple[Any, list[tuple[int, str, Mapping[int, Shards]]]]]:
    """Per parallelized model of which a shard is given: position, name and split dims of its tensors given."""
    if not living():
        return []
    positions: dict[Any, list[int]] = {}
    for i, t in enumerate(given):
        positions.setdefault(_memory(t), []).append(i)
    result = []
    for model in living():
        found = [
            (i, name, shards)
            for name, p, shards in model.placed()
            for t in (p, p.grad)
            if t is not None
            for i in positions.get(_memory(t), ())
        ]
        if any(shards for _, _, shards in found):
            result.append((model, sorted(found, key=lambda each: each[0])))
    return result


def _unshared(local: torch.Tensor, shards: Mapping[int, Shards], rank: int) -> torch.Tensor:
    """The elements of a shard that no lower rank holds."""
    for dim, s in shards.items():
        if not s.disjoint:
            own = s.ranks[rank].positions(s.owned.ranks[rank])
            local = ops.narrow(local, dim, own.runs) if len(own) else local.narrow(dim, 0, 0)
    return local
