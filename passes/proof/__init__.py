"""The proof that a rewritten graph computes what the captured graph does, forward and backward.

===============  ==================================================================================
``check``        the proof: a walk over the rewritten graph
``claims``       what is known of a value on all ranks: which indices each holds, its gradient's worth
``terms``        which expression of the dense model a value stands for, in a normal form
``dense``        the captured graph read as terms
``steps``        what a proof keeps: claims, and the terms of calls
``results``      the claim of a result from those of its operands
``rules``        which rule an op follows
``products``     rules: matrix products, convolutions, attention
``movement``     rules: views, permutations, copies, parts, joins
``elementwise``  rules: ops index by index, and ops that need whole values
``reductions``   rules: reductions, scans, norms
``lookups``      rules: embeddings and indexing
``collectives``  rules: what works across ranks
===============  ==================================================================================

Rules for more ops are added here. It must know nothing of the passes that write programs (``planning``, ``sharding``,
``rules``, ``lowering``): a proof that shares code with what it proves shares its mistakes.
"""

from passes.proof.check import Verdict, check

__all__ = ["Verdict", "check"]
