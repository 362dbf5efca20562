"""call_agreement: the ranks compare each call of a module before any of them begins it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from autotp.arguments.arguments import Arguments
from autotp.distributed.agreement import Agreement
from autotp.modules.names import dotted
from autotp.runtime.bound_call import BoundCall
from autotp.runtime.module_guards import ModuleGuards
from autotp.utils.hashing import checksum, integer_checksum, preview, stable_hash
from autotp.utils.value_types import is_constant

__all__ = ["CallAgreement"]


class CallAgreement:
    """The agreement of the ranks on the calls of one module.

    Args:
        agreement: the ranks' means of comparison.
        guards: the guards of the modules that a graph depends on, the outermost first, the module's own last.
        split: whether ranks hold different shards of a parameter, by its name in the module.
        broadcasts: whether ranks whose inputs differ may take rank 0's.
    """

    def __init__(
        self, agreement: Agreement, guards: Sequence[ModuleGuards], split: Callable[[str], Any], broadcasts: bool = True
    ) -> None:
        self.agreement, self.guards, self._every, self._broadcasts = agreement, guards[-1], guards, broadcasts
        self.path = self.guards.path
        self._split = split
        self._hashes: dict[Any, int] = {}
        self._integers: dict[int, list[int]] = {}

    def check(
        self, call: BoundCall | None, arguments: Callable[[], Arguments], key: Any = None,
        error: Exception | None = None, last: bool = False,
    ) -> bool:  # fmt: skip
        """Raise on every rank unless all of them make the same call.

        Args:
            call: the call bound to its graph; None if there is no graph for it.
            arguments: gives the call's arguments, flat.
            key: the call's structure, where there is no graph for it.
            error: the error that this rank would raise instead.
            last: whether the inputs are rank 0's already.

        Returns:
            True; or False, on every rank, if they are to take rank 0's inputs (:mod:`autotp.runtime.broadcast_inputs`).

        Raises:
            MismatchError: the ranks call differently; it says in what.
        """
        if self.agreement.is_alone:
            if error is not None:
                raise error
            return True
        what: tuple[int | tuple[int, ...], ...]
        if error is not None:
            what = (0,)
        elif call is not None:
            what = (call.entry.number, call.sizes, self._grads())
        else:
            what = (self._hash(key, arguments()),)
        tensors = call.tensors if call is not None else arguments().tensors
        values, compared = self._values(call, arguments)
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        fingerprint = (what, self.agreement.steps, values)
        doing = f"call of {self.path}" if self.path else "call"

        def inputs() -> dict[str, str]:
            return self._described_inputs(arguments())

        if last or not self._broadcasts or grad:
            return self.agreement.check(
                doing, fingerprint, lambda: inputs() | self._described(), error, tensors=compared
            )
        return self.agreement.check(doing, fingerprint, self._described, error, inputs, compared)

    def _values(
        self, call: BoundCall | None, arguments: Callable[[], Arguments]
    ) -> tuple[tuple[int, ...], Sequence[torch.Tensor]]:
        """Checksums of values to compare, and integer tensors whose values are to be compared.

        When debugging, these are all inputs and the replicated parameters; else the integer inputs on the CPU.
        """
        if self.agreement.debug:
            every = self._inputs(arguments()) | {
                f"values of parameter {self._full(n)}": f"{checksum(p):x}"
                for n, p in self._parameters()
                if not self._split(n)
            }
            return (stable_hash(str(every)),), ()
        if call is None:
            flat = arguments()
            checksums = (integer_checksum(x) for x in flat.tensors if not flat.is_split(x))
            return tuple(n for n in checksums if n is not None), ()
        number, inputs = call.entry.number, call.entry.program.inputs
        if (positions := self._integers.get(number)) is None:  # calls of one graph are alike in dtypes and devices
            compared = [i not in inputs and integer_checksum(x) is not None for i, x in enumerate(call.tensors)]
            positions = self._integers[number] = [i for i, is_compared in enumerate(compared) if is_compared]
        return (), [call.tensors[i] for i in positions]

    def _grads(self) -> int:
        """A hash of which parameters need gradients; 0 where gradients are disabled."""
        return self.guards.trainable_hash() if torch.is_grad_enabled() else 0

    def end(self, result: Any, error: Exception | None = None) -> None:
        """Raise on every rank unless all of them have come to the end of the call, without an error.

        Raises:
            MismatchError: they have not.
        """
        flat = Arguments((result,), {})
        named = zip(flat.spec.paths(), flat.leaves, strict=True) if self.agreement.debug else ()
        values = {
            f"values of {n.replace('args[0]', 'result', 1)}": f"{checksum(x):x}" for n, x in named if _is_tensor(x)
        }
        self.agreement.check("end of the call", stable_hash(str(values)), lambda: values, error)

    def _hash(self, key: Any, arguments: Arguments) -> int:
        structure = key, tuple(arguments.shapes), torch.is_grad_enabled(), self.guards.trainable()
        if structure not in self._hashes:
            if len(self._hashes) > 4096:
                self._hashes.clear()
            self._hashes[structure] = stable_hash(repr(structure))
        return self._hashes[structure]

    def _inputs(self, arguments: Arguments) -> dict[str, str]:
        """The values of the inputs that the ranks compare."""
        named = zip(arguments.spec.paths(), arguments.leaves, strict=True)
        tensors = {n: x for n, x in named if _is_tensor(x) and not arguments.is_split(x)}
        compared = {n: x for n, x in tensors.items() if self.agreement.debug or integer_checksum(x) is not None}
        return {f"values of {n}": preview(x) for n, x in compared.items()}

    def _parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self.guards.model.named_parameters()

    def _full(self, name: str) -> str:
        return dotted(self.path, name)

    def _described_inputs(self, arguments: Arguments) -> dict[str, str]:
        """The inputs of a call in words, for ranks that differ."""
        spec = arguments.spec
        texts = {"structure of the inputs": " ".join(str(spec).split())}
        shapes, slots = iter(arguments.shapes), spec.slots
        for i, (path, x) in enumerate(zip(spec.paths(), arguments.leaves, strict=True)):
            grad = ", requires_grad" if isinstance(x, torch.Tensor) and x.requires_grad else ""
            text = repr(x) if is_constant(x) else f"a {type(x).__module__}.{type(x).__qualname__}"
            texts[path] = f"{tuple(next(shapes))} {x.dtype}{grad}" if isinstance(x, torch.Tensor) else text
            if i in slots and slots[i].count:
                texts[path] = str(x.shape[0])
        return texts | self._inputs(arguments)

    def _described(self) -> dict[str, str]:
        """Everything else about a call in words, for ranks that differ."""
        texts = {
            "gradients": "enabled" if torch.is_grad_enabled() else "disabled",
            "steps of optimizers": str(self.agreement.steps),
            "autocast": str(torch.is_autocast_enabled()),
        }
        for name, module in self.guards.model.named_modules():
            texts[f"mode of {self._full(name) or 'the model'}"] = "train" if module.training else "eval"
        for name, p in self._parameters():
            texts[f"parameter {self._full(name)}"] = f"{p.dtype}{', requires_grad' if p.requires_grad else ''}"
            if self.agreement.debug and not self._split(name):
                texts[f"values of parameter {self._full(name)}"] = f"{checksum(p):x}"
        changes = [(g, attribute, value) for g in self._every for attribute, value in g.changes().items()]
        return texts | {dotted(g.path, *attribute): value for g, attribute, value in changes}


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)
