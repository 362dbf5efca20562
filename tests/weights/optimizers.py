"""Optimizers as people write them: some work element by element, some read whole matrices or cannot be tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from transformers import optimization

Make = Callable[[Iterable[Any]], Optimizer]


class Simple(Optimizer):
    """Gradient descent; subclasses change the update, or what is done before."""

    def __init__(self, params: Any, lr: float = 1e-2, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    def before(self) -> None:
        pass

    def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return p.grad

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.update(p, group))
        return loss


class Lion(Simple):
    def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        m = self.state[p].setdefault("m", torch.zeros_like(p))
        sign = (0.9 * m + 0.1 * p.grad).sign()
        m.lerp_(p.grad, 0.01)
        return sign


class Counting(Simple):
    """Keeps things in attributes, among them what the constructor makes for each parameter."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.all = [p for g in self.param_groups for p in g["params"]]
        self.names = {p: str(i) for i, p in enumerate(self.all)}
        self.steps, self.log, self.shared = torch.zeros(()), [], {"steps": 0}
        self.method = self.decay

    def decay(self) -> float:
        return 1 / (1 + float(self.steps))

    def before(self) -> None:
        self.steps += 1
        self.shared["steps"] += 1
        self.log.append(self.shared["steps"])
        assert len(self.log) == self.shared["steps"]

    def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return p.grad * self.method()


class Made(Simple):
    """Keeps a list with a tensor for each parameter: a copy of it is of no use, a new one is."""

    def __init__(self, params: Any, lr: float = 1e-2, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self.sums = [torch.zeros_like(p) for g in self.param_groups for p in g["params"]]

    def before(self) -> None:
        every = [p for g in self.param_groups for p in g["params"]]
        for total, p in zip(self.sums, every, strict=True):
            total.add_(p.grad)
            p.grad.add_(total)


class Lamb(Simple):
    def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[p]
        m, v = (state.setdefault(n, torch.zeros_like(p)) for n in "mv")
        m.lerp_(p.grad, 0.1)
        v.lerp_(p.grad.square(), 0.01)
        update = m / (v.sqrt() + 1e-6)
        return update * (p.norm() / update.norm()) if group.get("trust", True) else update


class Clipping(Simple):
    """Clips by the norm of the gradients of all its parameters."""

    def before(self) -> None:
        gradients = [p.grad for g in self.param_groups for p in g["params"]]
        total = torch.stack([g.norm() for g in gradients]).norm()
        for g in gradients:
            g.mul_(self.param_groups[0].get("most", 1.0) / total.clamp_min(self.param_groups[0].get("most", 1.0)))


class ByRows(Simple):
    """Divides each row's gradient by its norm: right where whole rows are on a rank."""

    def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return p.grad / p.grad.norm(dim=-1, keepdim=True)


class Sharpness(Simple):
    """Climbs by the norm of the gradient first, and cannot step without a closure."""

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        with torch.enable_grad():
            closure()
        pairs = [(p, p.grad / p.grad.norm()) for g in self.param_groups for p in g["params"]]
        for p, climb in pairs:
            p.add_(climb)
        with torch.enable_grad():
            loss = closure()
        for p, climb in pairs:
            p.sub_(climb + 1e-2 * climb)
        return loss


class Noisy(Simple):
    """Draws from torch's generator."""

    def update(self, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return p.grad + torch.randn_like(p)


class Lookahead(Optimizer):
    """Holds another optimizer, and shares its groups and state."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.param_groups, self.state = inner.param_groups, inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                if self.count % 2 == 0:
                    p.copy_(slow.lerp_(p, 0.5))


class Picky(Simple):
    """Refuses tensors that it does not know."""

    def __init__(self, params: Any, known: int, lr: float = 1e-2) -> None:
        super().__init__(params, lr)

    def before(self) -> None:
        if any(p.shape == (7, 6) for g in self.param_groups for p in g["params"]):
            raise ValueError("a tensor that I do not know")


class Gossip(Simple):
    """Has a collective."""

    def before(self) -> None:
        dist.all_reduce(torch.zeros(1))


class PickyMuon(Picky):
    """Known by its name where it cannot be tried out."""


ELEMENTWISE: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW, a tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.01), foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "Lion": Lion,
    "Counting": Counting,
    "Made": Made,
    "Lamb without trust": lambda p: Lamb(p, trust=False),
    "Lookahead": lambda p: Lookahead(torch.optim.Adam(p)),
}

READERS: dict[str, Make] = {
    "Adafactor": torch.optim.Adafactor,
    "transformers' Adafactor": optimization.Adafactor,
    "transformers' Adafactor, warmed up": lambda p: optimization.Adafactor(p, warmup_init=True),
    "transformers' Adafactor, unscaled": lambda p: optimization.Adafactor(
        p, lr=1e-3, scale_parameter=False, relative_step=False
    ),
    "transformers' Adafactor, scaled": lambda p: optimization.Adafactor(
        p, lr=1e-3, scale_parameter=True, relative_step=False
    ),
    "Muon": torch.optim.Muon,
    "LBFGS": torch.optim.LBFGS,
    "Lamb": Lamb,
    "Lamb, lr of 0": lambda p: Lamb(p, lr=0.0),
    "Clipping": Clipping,
    "Clipping small ones": lambda p: Clipping(p, lr=1.0, most=1e-2),
    "Clipping large ones": lambda p: Clipping(p, most=1000.0),
    "Sharpness": Sharpness,
    "Noisy": Noisy,
    "Lookahead of Lamb": lambda p: Lookahead(Lamb(p)),
}
