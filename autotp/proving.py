"""proving: what becomes of a rewritten graph that is not proved."""

from __future__ import annotations

import warnings

from autotp.errors import ProofError, UnprovedWarning
from autotp.rewrite import Rewritten

__all__ = ["prove"]


def prove(program: Rewritten, name: str, proof: bool | str) -> None:
    """Look whether a program is proved.

    Args:
        program: the rewritten graph.
        name: whose it is.
        proof: ``"warn"``: one that is not is a warning; else an error.

    Raises:
        ProofError: it is not proved.
    """
    verdict = program.verdict
    if verdict.proved:
        return
    said = (
        f"the graph of {name} for {program.tp} ranks is not proved to be the dense model's: {verdict}. That is a "
        "mistake of autotp's: please report it"
    )
    if proof != "warn":
        raise ProofError(f'{said}. check="warn" or check=False runs it all the same; autotp.verify compares numbers')
    warnings.warn(said, UnprovedWarning, stacklevel=2)
