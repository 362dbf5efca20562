"""The proof that a rewritten graph computes what the captured graph does, forward and backward.

===============  ==================================================================================
``check``        the proof: a walk over the rewritten graph
``claims``       claims: what is known of a value on all ranks, such as their indices and the kind of its gradient
``terms``        terms: the expressions of the dense model that values stand for, in a normal form
``dense``        the captured graph's terms
``results``      the claim of a result from the claims of its operands
``steps``        one step, and the state of a proof
``rules``        the rule of each op
``products``     rules: matrix products, convolutions, attention
``movement``     rules: views, permutations, expansions, slices, windows, concatenations
``elementwise``  rules: ops that work index by index, and ops that need replicated operands
``reductions``   rules: reductions, scans, norms
``lookups``      rules: embeddings and indexing
``collectives``  rules: collectives and other ops that work across ranks
===============  ==================================================================================

Rules for more ops are added here. The package imports nothing of the passes that write programs (``planning``,
``sharding``, ``rules``, ``lowering``): a proof that shared code with them would share their mistakes.
"""

from passes.proof.check import Verdict, check

__all__ = ["Verdict", "check"]
