"""Modules that write in place where gradients are stopped or memory is shared unsaid: captured right, or in parts."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)


class WriteElsewhere(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            y = h * 2
        k = h * 1
        z = k.view(-1)
        z[::2] = 0
        return self.b(y * k)


class WriteInside(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            y = h * 2
            z = y.view(-1)
            z.mul_(2)
        return self.b(y * h)


class WriteThroughReshape(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        with torch.no_grad():
            v = h.reshape(-1)
            v.mul_(2)
        return self.b(h)


class DetachedSeenBefore(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        d = h.detach()
        h2 = h * 1
        d.mul_(0.5)
        return self.b(h + h2)


class DetachedClamped(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        h.detach().clamp_(-0.3, 0.3)
        return self.b(h)


class DetachedPart(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        h.detach()[:, :4] = 0
        return self.b(h)


class DetachedView(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        with torch.no_grad():
            t = h.detach()
            t.view(-1)[::2] = 0
        return self.b(h)


class TransposedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        v = h[:2]
        h.t_()
        return self.b(h)[:2] + v


class SwappedInPlace(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unflatten(1, (4, 4))
        v = h[:, :2]
        h.swapaxes_(1, 2)
        return self.b(h.flatten(1)) + v.flatten(1)


class TransposedSeenBefore(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        v = h[:2]
        h.t_()
        return self.b(h.t())[:2, :2] + v[:, :2]


class UnsqueezedInPlace(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        v = h[:, :2]
        h.unsqueeze_(0)
        return self.b(h).squeeze(0)[:, :2] + v


class ViewUnsqueezedInPlace(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        v = h[:, 3]
        v.unsqueeze_(1)
        v.mul_(2)
        return self.b(h)


class SqueezedInPlace(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = (self.a(x) * 1).unsqueeze(0)
        v = h[0, :, :4]
        h.squeeze_(0)
        h.mul_(2)
        return self.b(h)[:, :4] + v


class FloatsIntoIntegers(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        m = torch.zeros(4, 16, dtype=torch.int64)
        m = torch.slice_scatter(m, (h.detach() * 5), 1)
        return self.b(h * m)


class FloatsIntoAnIntegerRow(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        m = torch.zeros(16, 16, dtype=torch.int64)
        m = torch.select_scatter(m, (self.b.weight.detach() * 9)[0], 1, 3)
        return self.b(h @ m.to(h.dtype))


class IntegersIntoFloats(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.slice_scatter(h, (h * 3).to(torch.int64), 1))


class EinsumDiagonal(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        g = torch.einsum("bi,bj->bij", h, h)
        torch.einsum("bii->bi", g).zero_()
        return self.b(g.sum(-1))


class EinsumTransposed(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        y = torch.einsum("ij->ji", h)
        y.mul_(3)
        return self.b(h)


class Meshgrid(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        g, _ = torch.meshgrid(h[0], h[1], indexing="ij")
        h.mul_(2)
        return self.b(g)


class UnsafeChunk(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        g = torch.unsafe_chunk(h, 2, 1)
        g[0].mul_(2)
        return self.b(h)


class DropoutThatDropsNothing(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            y = F.dropout(h, 0.1, training=False)
        return self.b(y)


class AtLeast2d(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            y = torch.atleast_2d(h)
        return self.b(y)


class RealPart(Pair):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            y = h.real
        return self.b(y)


WAYS = [WriteElsewhere, WriteInside, WriteThroughReshape, DetachedSeenBefore, DetachedClamped, DetachedPart,
        DetachedView, TransposedInPlace, SwappedInPlace, TransposedSeenBefore, UnsqueezedInPlace, ViewUnsqueezedInPlace,
        SqueezedInPlace, FloatsIntoIntegers, FloatsIntoAnIntegerRow, IntegersIntoFloats, EinsumDiagonal,
        EinsumTransposed, Meshgrid, UnsafeChunk, DropoutThatDropsNothing, AtLeast2d, RealPart]  # fmt: skip


@pytest.mark.parametrize("kind", WAYS)
def test_writes_are_as_in_the_dense_model(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autotp.PartialCaptureWarning)
        report = autotp.verify(kind().double(), 2, example_inputs=(torch.randn(4, 8, dtype=torch.float64),))
    assert report.ok, report
