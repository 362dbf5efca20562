"""The proof behind :mod:`passes.check`; nothing here is imported by the passes that write programs, or from them.

===============  ==================================================================================
``claims``       what is known of a value on all ranks: which indices each holds, its gradient's worth
``terms``        which expression of the dense model a value stands for, in a normal form
``dense``        the captured graph read as terms
``steps``        what a proof keeps, and what all rules share
``products``     rules: matrix products, convolutions, attention
``moves``        rules: views, permutations, copies, parts, joins
``others``       rules: ops index by index, reductions, look-ups, norms, and ops that need whole values
``collectives``  rules: what works across ranks
===============  ==================================================================================
"""
