"""comparison: what the ranks compare of each call of a module, before any of them begins it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch

from autotp.arguments.arguments import Arguments
from autotp.distributed.agreement import Agreement
from autotp.modules.names import dotted
from autotp.runtime.call_guards import Recognized
from autotp.runtime.module_guards import ModuleGuards
from autotp.utils.hashing import checksum, combined, integer_checksum, preview, stable_hash
from autotp.utils.value_types import is_constant

__all__ = ["CallAgreement", "kinds"]


def kinds(leaves: Iterable[Any], shapes: Iterable[Sequence[int]]) -> tuple[Any, ...]:
    """What of a call's leaves makes another graph: dtypes, sizes of one, gradients needed, constants.

    Args:
        leaves: the leaves.
        shapes: the dense shape of each tensor among them.
    """
    each = iter(shapes)
    return tuple(
        (x.dtype, x.device.type, x.requires_grad, tuple(n == 1 for n in next(each)))
        if isinstance(x, torch.Tensor)
        else (type(x), repr(x) if is_constant(x) else "")
        for x in leaves
    )


class CallAgreement:
    """The comparison of the calls of one module: a model, a part of one, or one with parts.

    Args:
        agreement: through which the ranks compare.
        watch: the module's.
        split: whether the ranks hold different shares of a parameter, by its name in the module.
        outer: the watch of the module that it is in, where it is called by itself.
        broadcasts: whether ranks may take rank 0's inputs in place of others.
    """

    def __init__(
        self,
        agreement: Agreement,
        watch: ModuleGuards,
        split: Callable[[str], Any],
        outer: ModuleGuards | None = None,
        broadcasts: bool = True,
    ) -> None:
        self.agreement, self.watch, self.path, self._broadcasts = agreement, watch, watch.path, broadcasts
        self._watches = [watch] if outer is None else [outer, watch]
        self._split = split
        self._digests: dict[Any, int] = {}
        self._integers: dict[int, list[int]] = {}

    def call(
        self,
        key: Any,
        of: Arguments,
        error: Exception | None = None,
        last: bool = False,
        place: tuple[int, tuple[int, ...]] | None = None,
    ) -> bool:
        """Raise on every rank unless all of them make the same call.

        Args:
            key: the call's structure, and what has changed of the module.
            of: its arguments.
            error: what this rank would raise instead.
            last: whether the inputs are rank 0's already.
            place: the number of its program, if there is one already, and the sizes that it does not take for
                constants.

        Returns:
            True; or False, on every rank, if they are to take rank 0's inputs (:mod:`autotp.runtime.broadcast_inputs`).

        Raises:
            MismatchError: they do not.
        """
        if error is not None:
            of_call: Any = (0,)
        else:
            of_call = (self._digest(key, of),) if place is None else (*place, self._grads())
        if self.agreement.debug:
            values: tuple[int, ...] = (stable_hash(str(self._values(of))),)
        else:
            values = tuple(n for x in of.tensors if not of.is_split(x) and (n := integer_checksum(x)) is not None)
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in of.tensors)
        return self._check(of_call, values, grad, lambda: of, error, last)

    def again(self, number: int, given: Recognized, held: Container[int], of: Callable[[], Arguments]) -> bool:
        """:meth:`call` for one that was recognised.

        Args:
            number: its program's.
            given: its arguments.
            held: the positions of those of which ranks hold different parts.
            of: opens them, if ranks differ.
        """
        if self.agreement.is_alone:
            return True
        if (places := self._integers.get(number)) is None:  # calls that were recognised are alike in dtypes and devices
            whole = [i not in held and integer_checksum(x) is not None for i, x in enumerate(given.tensors)]
            places = self._integers[number] = [i for i, is_whole in enumerate(whole) if is_whole]
        values = tuple([integer_checksum(given.tensors[i]) or 0 for i in places])
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in given.tensors)
        return self._check((number, given.sizes, self._grads()), values, grad, of)

    def _grads(self) -> int:
        """Which gradients will be wanted."""
        return self.watch.trainable_digest() if torch.is_grad_enabled() else 0

    def _check(
        self,
        of_call: tuple[int | tuple[int, ...], ...],
        values: tuple[int, ...],
        grad: bool,
        of: Callable[[], Arguments],
        error: Exception | None = None,
        last: bool = False,
    ) -> bool:
        fingerprint = combined(*of_call, self.agreement.steps, values)
        doing = f"call of {self.path}" if self.path else "call"
        if last or not self._broadcasts or grad:
            return self.agreement.check(doing, fingerprint, lambda: self._given(of()) | self._described(), error)
        return self.agreement.check(doing, fingerprint, self._described, error, lambda: self._given(of()))

    def end(self, result: Any, error: Exception | None = None) -> None:
        """Raise on every rank unless all of them have come to the end of the call, without an error.

        Raises:
            MismatchError: they have not.
        """
        of = Arguments((result,), {})
        named = zip(of.spec.paths(), of.leaves, strict=True) if self.agreement.debug else ()
        values = {
            f"values of {n.replace('args[0]', 'result', 1)}": f"{checksum(x):x}" for n, x in named if _is_tensor(x)
        }
        self.agreement.check("end of the call", stable_hash(str(values)), lambda: values, error)

    def _digest(self, key: Any, of: Arguments) -> int:
        whole = key, tuple(of.shapes), torch.is_grad_enabled(), self.watch.trainable()
        found = self._digests.get(whole)
        if found is None:
            if len(self._digests) > 4096:
                self._digests.clear()
            found = self._digests[whole] = stable_hash(repr(whole))
        return found

    def _values(self, of: Arguments) -> dict[str, str]:
        """Checksums of the inputs, and of the parameters of which every rank holds the whole."""
        return self._inputs(of) | {
            f"values of parameter {self._full(n)}": f"{checksum(p):x}"
            for n, p in self._parameters()
            if not self._split(n)
        }

    def _inputs(self, of: Arguments) -> dict[str, str]:
        """The values of the inputs that the ranks compare."""
        named = {n: x for n, x in zip(of.spec.paths(), of.leaves, strict=True) if _is_tensor(x) and not of.is_split(x)}
        compared = {n: x for n, x in named.items() if self.agreement.debug or integer_checksum(x) is not None}
        return {f"values of {n}": preview(x) for n, x in compared.items()}

    def _parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.watch.model.named_parameters()

    def _full(self, name: str) -> str:
        return dotted(self.path, name)

    def _given(self, of: Arguments) -> dict[str, str]:
        """The inputs of a call in words, for ranks that differ."""
        found = {"structure of the inputs": " ".join(str(of.spec).split())}
        shapes, slots = iter(of.shapes), of.spec.slots
        for i, (path, x) in enumerate(zip(of.spec.paths(), of.leaves, strict=True)):
            grad = ", requires_grad" if isinstance(x, torch.Tensor) and x.requires_grad else ""
            text = repr(x) if is_constant(x) else f"a {type(x).__module__}.{type(x).__qualname__}"
            found[path] = f"{tuple(next(shapes))} {x.dtype}{grad}" if isinstance(x, torch.Tensor) else text
            if i in slots and slots[i].count:
                found[path] = str(x.shape[0])
        return found | self._inputs(of)

    def _described(self) -> dict[str, str]:
        """All else about a call in words, for ranks that differ."""
        found = {
            "gradients": "enabled" if torch.is_grad_enabled() else "disabled",
            "steps of optimizers": str(self.agreement.steps),
            "autocast": str(torch.is_autocast_enabled()),
        }
        for name, module in self.watch.model.named_modules():
            found[f"mode of {self._full(name) or 'the model'}"] = "train" if module.training else "eval"
        for name, p in self._parameters():
            found[f"parameter {self._full(name)}"] = f"{p.dtype}{', requires_grad' if p.requires_grad else ''}"
            if self.agreement.debug and not self._split(name):
                found[f"values of parameter {self._full(name)}"] = f"{checksum(p):x}"
        changes = [(w, place, value) for w in self._watches for place, value in w.changes().items()]
        return found | {dotted(w.path, *place): value for w, place, value in changes}


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)
