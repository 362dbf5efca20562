"""The captured graph made plain, so that later passes meet one spelling of each thing.

Each pass keeps what the graph computes, gradients included. It must know nothing of ranks.
"""

from passes.normalize.canonicalize import canonicalize
from passes.normalize.differentiable import differentiable
from passes.normalize.functionalize import functionalize
from passes.normalize.inline import inline
from passes.normalize.simplify import simplify

__all__ = ["canonicalize", "differentiable", "functionalize", "inline", "simplify"]
