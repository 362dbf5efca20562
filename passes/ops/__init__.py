"""ops: the ops that rewritten graphs call: collectives, parallel products, norms, vocabulary, random numbers.

Each is a differentiable function of local tensors. An op gets its group's name and finds the communicator in
:mod:`passes.ops.context`; it must know nothing of graphs and passes. Only compilation imports
``passes.ops.traceable``, which registers operators with torch.
"""

from passes.ops.collectives import (
    all_gather,
    all_reduce,
    all_reduce_,
    broadcast_from_first,
    deduplicate_gradient,
    enter,
    enter_overlapping,
    narrow,
    start_all_reduce,
    start_all_reduce_,
    take,
    wait,
)
from passes.ops.context import Communicator, ParallelContext
from passes.ops.norms import norm_over_shards
from passes.ops.products import (
    COLUMN_PARALLEL,
    ROW_PARALLEL,
    column_parallel_addmm,
    column_parallel_baddbmm,
    column_parallel_einsum,
    column_parallel_linear,
    column_parallel_matmul,
    head_parallel_attention,
    row_parallel_einsum,
    row_parallel_linear,
    row_parallel_matmul,
)
from passes.ops.random import random_per_rank, random_same
from passes.ops.registry import COLLECTIVES
from passes.ops.single_results import (
    OUTPUTS,
    flex_attention_logsumexp,
    flex_attention_maxima,
    flex_attention_outputs,
    max_indices,
    max_values,
    min_indices,
    min_values,
)
from passes.ops.vocabulary import cross_entropy_over, vocab_parallel_cross_entropy, vocab_parallel_embedding

__all__ = [
    "COLLECTIVES",
    "COLUMN_PARALLEL",
    "OUTPUTS",
    "ROW_PARALLEL",
    "Communicator",
    "ParallelContext",
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "broadcast_from_first",
    "column_parallel_addmm",
    "column_parallel_baddbmm",
    "column_parallel_einsum",
    "column_parallel_linear",
    "column_parallel_matmul",
    "cross_entropy_over",
    "deduplicate_gradient",
    "enter",
    "enter_overlapping",
    "flex_attention_logsumexp",
    "flex_attention_maxima",
    "flex_attention_outputs",
    "head_parallel_attention",
    "max_indices",
    "max_values",
    "min_indices",
    "min_values",
    "narrow",
    "norm_over_shards",
    "random_per_rank",
    "random_same",
    "row_parallel_einsum",
    "row_parallel_linear",
    "row_parallel_matmul",
    "start_all_reduce",
    "start_all_reduce_",
    "take",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "wait",
]
