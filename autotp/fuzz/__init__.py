"""Random dense transformers, to find what breaks autotp: ``autotp fuzz --n 200 --seed S``."""

from autotp.fuzz.recipe import Recipe
from autotp.fuzz.search import Drawn, Found, FuzzError, fuzz, judge

__all__ = ["Drawn", "Found", "FuzzError", "Recipe", "fuzz", "judge"]
