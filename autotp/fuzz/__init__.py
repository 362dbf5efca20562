"""Random dense transformers, to find what breaks autotp: ``autotp fuzz --n 200 --seed S``.

Change it to draw other models, or to shrink failures and write them down in another way. It must know nothing of the
compiler's passes: it captures, simulates and compares, as :func:`autotp.verify` does.
"""

from autotp.fuzz.recipe import Recipe
from autotp.fuzz.search import Drawn, Found, FuzzError, fuzz, judge

__all__ = ["Drawn", "Found", "FuzzError", "Recipe", "fuzz", "judge"]
