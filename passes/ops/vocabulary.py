"""vocabulary: embedding and cross entropy over a split vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from passes.ops import context

__all__ = ["LossOptions", "cross_entropy_over", "vocab_parallel_cross_entropy", "vocab_parallel_embedding"]


def _check_range(inside: torch.Tensor, message: str) -> None:
    """Refuse an index out of range as torch does: on a CPU at once, elsewhere by an assertion on the device."""
    if inside.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(inside.all(), message)
    elif not inside.all():
        raise IndexError(message)


def vocab_parallel_embedding(
    weight: torch.Tensor, ids: torch.Tensor, start: int, words: int, padding_idx: int = -1
) -> torch.Tensor:
    """The rows of the words that the rank holds, and zeros for other words: a partial sum.

    Args:
        weight: ``(local words, features)``, the rows of the full table from ``start``.
        ids: any shape, integer.
        start: the first word that the rank holds.
        words: the number of words in the full table.
        padding_idx: a word (its index in the full table) whose row gets no gradient; -1 for none.

    Raises:
        IndexError: an id is not in the full table (on a CPU; on other devices an assertion fails).
    """
    _check_range((ids >= 0) & (ids < words), f"index out of range: token ids must be at least 0 and less than {words}")
    local = ids - start
    elsewhere = (local < 0) | (local >= weight.shape[0])
    padding = padding_idx - start if start <= padding_idx < start + weight.shape[0] else -1
    if not weight.shape[0]:  # more ranks than words
        weight = F.pad(weight, (0, 0, 0, 1))
    rows = torch.embedding(weight, local.masked_fill(elsewhere, 0), padding)
    return rows.masked_fill(elsewhere.unsqueeze(-1), 0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, start: int, classes: int, ignore: int,
        weight: torch.Tensor | None, smoothing: float, group: context.Communicator,
    ) -> torch.Tensor:  # fmt: skip
        wide = torch.promote_types(logits.dtype, torch.float32)
        none = not logits.shape[-1]  # more ranks than classes
        highest = logits.new_full(logits.shape[:-1], -torch.inf) if none else logits.amax(-1)
        total = (logits - highest.unsqueeze(-1)).exp_().sum(-1, dtype=wide)
        ignored = target == ignore
        local = target.to(torch.int64) - start
        here = (local >= 0) & (local < logits.shape[-1]) & ~ignored
        local = local.masked_fill(~here, 0)
        chosen = torch.zeros_like(highest) if none else logits.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        chosen = chosen.masked_fill(~here, 0)
        exchanged = [highest.to(wide), total, chosen.to(wide)]
        own = None if weight is None else weight.narrow(0, start, logits.shape[-1])
        if smoothing:
            exchanged.append(logits.sum(-1, dtype=wide) if own is None else (logits * own).sum(-1, dtype=wide))
        shape = (len(exchanged), *highest.shape)
        gathered = torch.stack(group.all_gather(torch.stack(exchanged), [shape] * group.size))
        top = gathered[:, 0].amax(0)
        log_sum = ((gathered[:, 0] - top).exp() * gathered[:, 1]).sum(0).log() + top
        certain = torch.full_like(log_sum, 1 - smoothing)
        if weight is not None:
            certain = certain * weight[target.masked_fill(ignored, 0).to(torch.int64)]
        certain = certain.masked_fill(ignored, 0)
        losses = certain * (log_sum - gathered[:, 2].sum(0))
        even, all_weights = None, classes if weight is None else weight.sum()
        if smoothing:
            even = torch.full_like(log_sum, smoothing / classes).masked_fill(ignored, 0)
            losses = losses + even * (all_weights * log_sum - gathered[:, 3].sum(0))
        ctx.save_for_backward(logits, log_sum, local, here, certain, even, own)
        ctx.all_weights = all_weights
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, log_sum, local, here, certain, even, own = ctx.saved_tensors
        if not logits.shape[-1]:
            return torch.zeros_like(logits), *[None] * 7
        grad = (logits - log_sum.unsqueeze(-1)).exp_()
        grad.mul_((certain if even is None else certain + even * ctx.all_weights).unsqueeze(-1))
        grad.scatter_add_(-1, local.unsqueeze(-1), -(certain * here).unsqueeze(-1))
        if even is not None:
            grad.sub_(even.unsqueeze(-1) if own is None else even.unsqueeze(-1) * own)
        return grad.mul_(grads[0].unsqueeze(-1)).to(logits.dtype), *[None] * 7


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    start: int,
    classes: int,
    reduction: int,
    ignore_index: int,
    group: str,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """V -> I: cross entropy of logits whose classes are split, with one small all-gather.

    The ranks exchange, per row, the maximum, the sum of exponentials and the target's logit
    (Megatron-LM, section 3, in one collective instead of three), for smoothed labels also the logits' sum.

    Args:
        logits: ``(rows, local classes)``, the classes from ``start``.
        target: ``(rows,)``, integer classes.
        start: the first class that the rank holds.
        classes: the number of classes on all ranks together.
        reduction: 0 none, 1 mean over the rows that count, 2 sum (torch's own numbers).
        ignore_index: rows with this target do not count.
        group: the group's name.
        weight: ``(classes,)``, for all classes, or None.
        label_smoothing: the fraction of each row's weight that is spread evenly over all classes.

    Raises:
        IndexError: a target is no class (on a CPU; on other devices an assertion fails).
    """
    options = LossOptions(start, classes, reduction, ignore_index, label_smoothing)
    return cross_entropy_over(logits, target, options, context.current().group(group), weight)


class LossOptions(NamedTuple):
    """The numbers that :func:`vocab_parallel_cross_entropy` takes, under the same names."""

    start: int
    classes: int
    reduction: int
    ignore_index: int
    label_smoothing: float


def cross_entropy_over(
    logits: torch.Tensor,
    target: torch.Tensor,
    options: LossOptions,
    group: context.Communicator,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`vocab_parallel_cross_entropy` among the ranks of a communicator."""
    start, classes, reduction, ignore_index, label_smoothing = options
    ignored = target == ignore_index
    inside = ((target >= 0) & (target < classes)) | ignored
    _check_range(inside, f"target is out of bounds: it must be at least 0 and less than {classes}, or {ignore_index}")
    losses = _CrossEntropy.apply(logits, target, start, classes, ignore_index, weight, label_smoothing, group)
    if reduction == 0:
        return losses.to(logits.dtype)
    counts = ~ignored if weight is None else weight[target.masked_fill(ignored, 0).to(torch.int64)] * ~ignored
    return (losses.sum() / counts.sum() if reduction == 1 else losses.sum()).to(logits.dtype)
