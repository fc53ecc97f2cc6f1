"""Random sizes, magnitudes, dtypes and dampings: the number of float64, or an InputError.

``make fuzz CASES=2000`` runs that many for each function; a run of the tests a few.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import imu_fast as imu
from imu_fast.errors import ImuFastError

CASES = int(os.environ.get("IMU_FAST_FUZZ_CASES", "40"))
fuzzed = settings(
    max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@st.composite
def heads(draw: st.DrawFn) -> imu.GradientFactors:
    n, d, c = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-35, 35))
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    delta = torch.randn(n, c, generator=generator, dtype=torch.float64)
    delta = delta.mul(10.0 ** draw(st.integers(-30, 3))).to(dtype)
    return imu.GradientFactors(delta, x, torch.arange(n + 1), draw(st.booleans()))


def gradients(f: imu.GradientFactors) -> Tensor:
    """[n, C D] in float64."""
    act = f.act.double()
    act = torch.cat([act, torch.ones_like(act[:, :1])], 1) if f.has_bias else act
    return (f.delta.double()[:, :, None] * act[:, None, :]).flatten(1)


def assert_close(found: Tensor, truth: Tensor, size: Tensor, lost: Tensor, terms: int) -> None:
    """Within rounding of a sum of so many terms, of this size, and of what underflows."""
    assert torch.isfinite(found).all()
    bound = (terms + 8) * torch.finfo(found.dtype).eps * size + lost
    assert bool(((found.double() - truth).abs() <= bound).all()), (found, truth, bound)


@pytest.mark.parametrize("curvature", ["identity", "fisher_diag"])
def test_scores(curvature: str) -> None:
    """Elementwise curvatures, whose rounding is that of their sums; damping from 1e-30 to 1e30."""

    @fuzzed
    @given(heads(), st.integers(-30, 30))
    def check(f: imu.GradientFactors, exponent: int) -> None:
        options = {} if curvature == "identity" else {"damping": 10.0**exponent}
        g = gradients(f)
        diagonal = torch.ones_like(g[0]) if not options else g.square().mean(0) + 10.0**exponent
        try:
            found = imu.influence_scores(f, curvature=curvature, **options)
            own = imu.self_influence(f, curvature=curvature, **options)
        except ImuFastError:
            if f.dtype == torch.float64:
                raise  # 1e35 squared is far from float64's end
            return
        # A product of two that underflows is off by tiny, which its other factors magnify.
        tiny, terms, least = torch.finfo(f.dtype).tiny, f.n + len(g[0]), diagonal.min()
        largest = 1 + f.act.abs().max().double() + f.delta.abs().max().double()
        off = tiny * largest.square() / least  # of the diagonal, relative
        size = (g.abs() / diagonal) @ g.abs().mean(0)
        lost = off * size + tiny * terms * (g.abs().max() * (1 + 1 / least) + largest)
        assert_close(found, -(g / diagonal) @ g.mean(0), size, lost, terms)
        truth = (g.square() / diagonal).sum(1)
        assert_close(own, truth, truth, off * (truth + terms) + tiny, terms)

    check()


def test_weights() -> None:
    @fuzzed
    @given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9), st.floats(1e-3, 1))
    def check(scores: list[float], top: float) -> None:
        given = torch.tensor(scores, dtype=torch.float64)
        indices, weights = imu.influence_weights(given, top, on_empty="uniform")
        assert torch.isfinite(weights).all() and (weights >= 0).all()
        assert len(indices) == len(weights) >= 1

    check()


def test_cholesky() -> None:
    @fuzzed
    @given(st.integers(1, 8), st.integers(0, 2**32 - 1), st.integers(-30, 30))
    def check(order: int, seed: int, exponent: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(order, order, generator=generator, dtype=torch.float64)
        a, b = root @ root.T, torch.randn(order, generator=generator, dtype=torch.float64)
        lam = 10.0**exponent
        try:
            x = imu.damped_cholesky_solve(a, b, lam)
        except ImuFastError:
            return
        assert torch.isfinite(x).all()
        # Backward stable: the residual is rounding of what is multiplied.
        size = (a.norm() + lam) * x.norm() + b.norm()
        assert (a @ x + lam * x - b).norm() <= 1e3 * order * torch.finfo(a.dtype).eps * size

    check()
