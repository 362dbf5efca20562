"""normalize: the captured graph in a normal form, so that later passes see one spelling of each thing.

Each pass preserves the function that the graph computes, gradients included. It must know nothing of ranks.
"""

from passes.normalize.canonicalize import canonicalize
from passes.normalize.differentiable import differentiable
from passes.normalize.functionalize import functionalize
from passes.normalize.inline import inline
from passes.normalize.simplify import simplify

__all__ = ["canonicalize", "differentiable", "functionalize", "inline", "simplify"]
