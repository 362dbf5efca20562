"""Random dense transformers, to find what breaks autotp: ``autotp fuzz --n 200 --seed S``.

What models are drawn, and how one that fails is made small and written down, is changed here. It must know nothing of
the compiler: it calls what a user can call.
"""

from autotp.fuzz.recipe import Recipe
from autotp.fuzz.search import Drawn, Found, FuzzError, fuzz, judge

__all__ = ["Drawn", "Found", "FuzzError", "Recipe", "fuzz", "judge"]
