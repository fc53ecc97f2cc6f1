"""How far an operation is from its definition, beside how far rounding can take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imu_fast.backend import interpreted, use_backend
from imu_fast.check.bounds import Bound
from imu_fast.check.calls import exact, operands, results
from imu_fast.check.entries import CHECKED, Entry, Operands, Shape, wide
from imu_fast.precision import ROUNDING

# 1 / (1 - k u) of the longest sums here, and more.
_SLACK = 1.01


@dataclass(frozen=True)
class Worst:
    """The entry of all results that is nearest to its bound, or furthest beyond it."""

    error: float
    bound: float
    shape: str

    @property
    def share(self) -> float:
        """Of the bound; infinite where it is no number, which nothing bounds."""
        if self.error <= self.bound:
            return self.error / self.bound if self.bound else 0.0
        return (
            float("inf") if not self.bound or self.error != self.error else self.error / self.bound
        )


def worst(
    entry: Entry,
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    precision: str,
    timed: Shape | None,
) -> Worst | None:
    """Over all shapes and names; None if the backend takes none of them.

    At ``timed``, where the definition's loops would take too long, the truth is the plain form in
    float64. Nothing is compared there in float64, in which that form cancels.
    """
    cut = ROUNDING[precision] if _rounds(entry, backend, dtype) else 0.0
    found: list[Worst] = []
    for name in entry.names:
        for shape in CHECKED[device.type]:
            given = operands(entry, shape, dtype, name, device)
            if _refused(entry, backend, given):
                continue
            truth = _truth(entry, entry.make(shape, dtype, name))
            bounds = entry.bounds(*exact(entry.make(shape, dtype, name)), **entry.options)
            got = results(entry, entry.run, given)
            found.append(compared(got, truth, bounds, dtype, cut, shape.why))
    if timed is not None and dtype != torch.float64:
        given = operands(entry, timed, dtype, entry.names[0], device)
        if not _refused(entry, backend, given):
            truth = results(entry, entry.plain, exact(given))
            bounds = entry.bounds(*exact(given), **entry.options)
            got = results(entry, entry.run, given)
            found.append(compared(got, truth, bounds, dtype, cut, "the shape that is timed"))
    return max(found, key=lambda one: one.share, default=None)


def _rounds(entry: Entry, backend: str, dtype: torch.dtype) -> bool:
    """Whether operands are rounded: all of float32, and of half precision what is made of them."""
    if backend != "triton" or interpreted():
        return False
    made = ("fisher_diagonal", "quadratic_scores", "head_ascent", "ggn_product")
    return dtype == torch.float32 or entry.name in made


def _refused(entry: Entry, backend: str, given: Operands) -> str:
    limits = getattr(entry.run, "limits", None)
    if backend != "triton" or limits is None:
        return ""
    reason: str = limits(*given, **entry.options)
    return reason


def _truth(entry: Entry, given: Operands) -> list[Tensor]:
    given = exact(given)
    if entry.name == "damped_cholesky_solve":
        return [_solved(*given)]
    with use_backend("reference"):
        return results(entry, entry.run, given)


def _solved(a: Tensor, b: Tensor, damping: float) -> Tensor:
    """In float64, refined once by a residual in numpy's longest."""
    m = a + damping * torch.eye(len(a), dtype=a.dtype)
    x = torch.linalg.solve(m, b)
    long = [y.numpy().astype(np.longdouble) for y in (m, x, b)]
    residual = (long[2] - long[0] @ long[1]).astype(np.float64)
    return x + torch.linalg.solve(m, torch.from_numpy(residual))


def compared(
    found: Sequence[Tensor],
    truth: Sequence[Tensor],
    bounds: Sequence[Bound],
    dtype: torch.dtype,
    cut: float,
    shape: str,
) -> Worst:
    """Every entry of every result; the definition's own rounding counts too."""
    arithmetic = torch.finfo(wide(dtype))
    double = torch.finfo(torch.float64).eps / 2
    unit = arithmetic.eps / 2 + double
    worst = Worst(0.0, 0.0, shape)
    for got, true, bound in zip(found, truth, bounds, strict=True):
        if got.shape != true.shape:
            raise AssertionError(f"a result is {tuple(got.shape)}, not {tuple(true.shape)}")
        kept = torch.finfo(got.dtype)
        got, true = got.double().cpu(), true.double().cpu()
        allowed = _SLACK * unit * bound.rounded.cpu() + arithmetic.tiny
        allowed = allowed + cut * torch.as_tensor(bound.cut).cpu()
        allowed = allowed + double * torch.as_tensor(bound.definition).cpu()
        if kept.eps > arithmetic.eps:  # results in half precision, to nearest
            allowed = allowed + kept.eps / 2 * true.abs() + kept.tiny * kept.eps
        error, allowed = (got - true).abs().flatten(), allowed.expand(true.shape).flatten()
        share = torch.where(error.isfinite(), error / allowed, torch.inf)
        if len(share):
            at = int(share.argmax())
            one = Worst(float(error[at]), float(allowed[at]), shape)
            worst = max(worst, one, key=lambda x: x.share)
    return worst
