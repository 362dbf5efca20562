"""search: draw random models, judge each on some ranks, shrink those that fail, and write a test for each."""

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
    """A model whose parallel form differs from the dense model, is not proved equal to it, or cannot be made.

    Attributes:
        kind: ``raises`` and the error's class, ``in parts``, ``unproved`` or ``wrong``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def judge(recipe: Recipe, tp: int, seed: int = 0) -> int:
    """Capture, shard, prove and compare the model of a recipe.

    Args:
        recipe: the recipe.
        tp: the number of ranks.
        seed: the seed of the model's weights and inputs.

    Returns:
        The number of split weights.

    Raises:
        FuzzError: the model is captured in parts only, or not proved, or an output, hidden value or gradient differs.

    Example:
        >>> judge(Recipe(kv_heads=3, fused="by group"), tp=2)
    """
    model, inputs = build(recipe, seed)
    with warnings.catch_warnings(), Float64():
        warnings.simplefilter("ignore", WholeWeightWarning)
        try:
            partition = partition_model(model, tp, (), inputs)
            verdicts = [p.cache.last.verdict for p in partition.parts if p.cache.last is not None]
            report = compare(model, Simulation(model, tp, partition, record=True), (), inputs)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise FuzzError(f"raises {type(error).__name__}", lines[0]) from error
    if partition.graph_breaks:
        raise FuzzError("in parts", str(partition.graph_breaks[0]))
    for verdict in verdicts:
        if not verdict.proved:
            raise FuzzError("unproved", str(verdict))
    if not report.ok:
        raise FuzzError("wrong", str(report))
    return sum(len(p.cache.weight_layouts or ()) for p in partition.parts)


@dataclass(frozen=True)
class Drawn:
    """A model that was judged.

    Attributes:
        number: the model's number in the sequence of its seed.
        recipe: its recipe.
        tp: the number of ranks.
        split: the number of split weights.
        failure: its failure, if it has one.
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
        number: the model's number in the sequence of its seed.
        drawn: its recipe.
        recipe: the simplest recipe with a failure of the same kind.
        tp: the number of ranks.
        failure: the failure of the simplest recipe.
    """

    number: int
    drawn: Recipe
    recipe: Recipe
    tp: int
    failure: FuzzError

    def text(self, seed: int) -> str:
        """The text of a test file that shows the failure."""
        message = "\n".join(line.rstrip() for line in str(self.failure).splitlines())
        message = message.replace("\\", "/").replace('"""', "'''")
        return f'''"""Model {self.number} of `autotp fuzz --seed {seed}`, shrunk.

{message}
"""

from autotp.fuzz import Recipe, judge


def test_model_{self.number}_of_seed_{seed}() -> None:
    judge({self.recipe}, tp={self.tp})
'''


def _judge(recipe: Recipe, tp: int) -> tuple[int, FuzzError | None]:
    """The number of split weights, and the failure, if there is one."""
    try:
        return judge(recipe, tp), None
    except FuzzError as failure:
        return 0, failure


def shrink(recipe: Recipe, tp: int, failure: FuzzError, tries: int = 200) -> tuple[Recipe, int, FuzzError]:
    """The simplest recipe, and the fewest ranks, with a failure of the same kind; and that failure."""
    shrunk = True
    while shrunk and tries > 0:
        shrunk = False
        for candidate in (*((recipe, n) for n in range(2, tp)), *((simpler, tp) for simpler in recipe.simpler())):
            tries -= 1
            _, new = _judge(*candidate)
            if new is not None and new.kind == failure.kind:
                (recipe, tp), failure, shrunk = candidate, new, True
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
        n: the number of models.
        seed: the seed that they are drawn with; model ``i`` of a seed is the same in every run.
        start: the number of the first model.
        directory: the directory for a runnable test file of each failure; None writes none.
        progress: called with each model after it is judged.

    Returns:
        The failures, each shrunk to the simplest model that fails in the same way.

    Example:
        >>> assert not fuzz(20, seed=1)
    """
    failures: list[Found] = []
    for number in range(start, start + n):
        source = random.Random(f"{seed} {number}")
        recipe, tp = Recipe.draw(source), source.randint(1, 8)
        split, failure = _judge(recipe, tp)
        progress(Drawn(number, recipe, tp, split, failure))
        if failure is not None:
            found = Found(number, recipe, *shrink(recipe, tp, failure))
            failures.append(found)
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / f"test_fuzz_{seed}_{number}.py").write_text(found.text(seed))
    return failures
