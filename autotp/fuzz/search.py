"""The search: draw models, judge each on some ranks, make what fails as simple as it can be, write it down."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autotp.errors import WholeWeightWarning
from autotp.fuzz.model import build
from autotp.fuzz.recipe import Recipe
from autotp.partition.partition import partition_model
from autotp.verification.measure import Float64
from autotp.verification.simulation import Simulation
from autotp.verification.verify import compare

__all__ = ["FuzzError", "fuzz", "judge"]


class FuzzError(AssertionError):
    """A model of which autotp's form is not the dense one, is not proved to be, or cannot be made.

    Attributes:
        kind: ``raises`` and the error's class, ``in parts``, ``unproved`` or ``wrong``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def judge(recipe: Recipe, tp: int, seed: int = 0) -> int:
    """Capture, shard, prove and compare the model of a recipe.

    Args:
        recipe: what it is made of.
        tp: the number of ranks.
        seed: of its weights and inputs.

    Returns:
        How many weights are split.

    Raises:
        FuzzError: it is not captured whole, not proved, or some output, hidden value or gradient is another.

    Example:
        >>> judge(Recipe(kv_heads=3, fused="by group"), tp=2)
    """
    model, inputs = build(recipe, seed)
    with warnings.catch_warnings(), Float64():
        warnings.simplefilter("ignore", WholeWeightWarning)
        try:
            division = partition_model(model, tp, (), inputs)
            verdicts = [p.cache.last.verdict for p in division.parts if p.cache.last is not None]
            report = compare(model, Simulation(model, tp, division, record=True), (), inputs)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise FuzzError(f"raises {type(error).__name__}", lines[0]) from error
    if division.seams:
        raise FuzzError("in parts", str(division.seams[0]))
    for verdict in verdicts:
        if not verdict.proved:
            raise FuzzError("unproved", str(verdict))
    if not report.ok:
        raise FuzzError("wrong", str(report))
    return sum(len(p.cache.weight_layouts or ()) for p in division.parts)


@dataclass(frozen=True)
class Drawn:
    """A model that was judged.

    Attributes:
        number: of the model among those drawn.
        recipe: what it is made of.
        tp: the number of ranks.
        split: how many of its weights are split.
        failure: how it fails, if it does.
    """

    number: int
    recipe: Recipe
    tp: int
    split: int
    failure: FuzzError | None


@dataclass(frozen=True)
class Found:
    """A failure, shrunk.

    Attributes:
        number: of the model among those drawn.
        drawn: its recipe.
        recipe: the simplest that fails alike.
        tp: the number of ranks.
        failure: how that fails.
    """

    number: int
    drawn: Recipe
    recipe: Recipe
    tp: int
    failure: FuzzError

    def text(self, seed: int) -> str:
        """A test file that shows it."""
        said = "\n".join(line.rstrip() for line in str(self.failure).splitlines())
        said = said.replace("\\", "/").replace('"""', "'''")
        return f'''"""Model {self.number} of `autotp fuzz --seed {seed}`, shrunk.

{said}
"""

from autotp.fuzz import Recipe, judge


def test_model_{self.number}_of_seed_{seed}() -> None:
    judge({self.recipe}, tp={self.tp})
'''


def _judged(recipe: Recipe, tp: int) -> tuple[int, FuzzError | None]:
    """How many weights are split, and how it fails."""
    try:
        return judge(recipe, tp), None
    except FuzzError as failure:
        return 0, failure


def shrink(recipe: Recipe, tp: int, failure: FuzzError, tries: int = 200) -> tuple[Recipe, int, FuzzError]:
    """The simplest recipe, and the fewest ranks, that still fail in this way."""
    found = True
    while found and tries > 0:
        found = False
        for candidate in (*((recipe, n) for n in range(2, tp)), *((each, tp) for each in recipe.simpler())):
            tries -= 1
            _, now = _judged(*candidate)
            if now is not None and now.kind == failure.kind:
                (recipe, tp), failure, found = candidate, now, True
                break
            if tries <= 0:
                break
    return recipe, tp, failure


def fuzz(
    n: int, seed: int = 0, *, start: int = 0, directory: Path | None = None,
    progress: Callable[[Drawn], None] = lambda _: None,
) -> list[Found]:  # fmt: skip
    """Judge ``n`` random models, each at a random tp in 1..8.

    Args:
        n: how many.
        seed: which; model ``i`` of a seed is the same in every run.
        start: the number of the first.
        directory: where to write a runnable test file for each failure; nowhere if left out.
        progress: called with each model when it has been judged.

    Returns:
        The failures, each shrunk to the simplest model that fails alike.

    Example:
        >>> assert not fuzz(20, seed=1)
    """
    failures: list[Found] = []
    for number in range(start, start + n):
        source = random.Random(f"{seed} {number}")
        recipe, tp = Recipe.draw(source), source.randint(1, 8)
        split, failure = _judged(recipe, tp)
        progress(Drawn(number, recipe, tp, split, failure))
        if failure is not None:
            found = Found(number, recipe, *shrink(recipe, tp, failure))
            failures.append(found)
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / f"test_fuzz_{seed}_{number}.py").write_text(found.text(seed))
    return failures
