"""K-FAC by an eigenbasis in float32 gives what the dense float64 matrix gives, or is not taken."""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast.curvature import kronecker
from imu_fast.curvature.kfac import kronecker_factors
from imu_fast.factors.probabilities import signals_or_curvature


@pytest.fixture(autouse=True)
def of_any_order(monkeypatch):
    monkeypatch.setattr(kronecker, "_FEWEST", 1)


def head(scale=1.0, n=40, d=6, classes=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, d, generator=generator)
    weight = torch.randn(classes, d, generator=generator) / scale
    y = torch.randint(classes, (n,), generator=generator)
    return imu.GradientFactors.from_head(x, weight, torch.zeros(classes), y)


def dense(factors, damping):
    """M over ``v.flatten()``, and its parts' product without damping."""
    b, a = kronecker_factors(factors, signals_or_curvature)
    return torch.kron(b, a) + damping * torch.eye(len(b) * len(a)).double()


def gradients(factors):
    act = torch.cat([factors.act, torch.ones(len(factors.act), 1)], dim=1).double()
    return (factors.delta.double()[:, :, None] * act[:, None]).flatten(1)


def off(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("scale", [1e-22, 1e-6, 1.0, 1e6, 1e19])
@pytest.mark.parametrize("damping", [1e-7, 1e-3, 0.1, 10.0])
def test_against_the_dense_matrix(damping, scale):
    """Of inputs of any size; dampings relative to the mean eigenvalue."""
    factors = head(scale)
    fitted = imu.KFAC(damping=damping, damping_mode="relative").fit(factors)
    refined = isinstance(fitted, kronecker.RefinedKronecker)
    assert refined or damping < 0.1
    assert not refined or damping > 1e-6
    close = 1e-9 if refined else 1e-5  # eps of float64 times the condition, which is 1e9 then
    m = dense(factors, fitted.damping)
    v = torch.randn(3, *fitted.shape, generator=torch.Generator().manual_seed(1)).double()
    truth = torch.linalg.solve(m, v.flatten(1).T).T
    assert off(fitted.solve(v).flatten(1), truth) < close
    assert fitted.residual < close
    assert off(fitted.solve(v[0]).flatten(), truth[0]) < close
    assert off((fitted @ v).flatten(1), (m @ v.flatten(1).T).T) < 1e-12
    assert off(fitted.diagonal().flatten(), m.diagonal()) < 1e-12
    g = gradients(factors)
    own = (g * torch.linalg.solve(m, g.T).T).sum(dim=1)
    assert off(fitted.self_influence(factors), own) < 1e-5
    pairs = g @ torch.linalg.solve(m, g[:4].T)
    assert off(fitted.pairwise(factors, factors.samples(0, 4)), pairs) < 1e-5


def test_a_file_gives_the_same_bits(tmp_path):
    factors = head()
    fitted = imu.KFAC(damping=1.0).fit(factors)
    assert isinstance(fitted, kronecker.RefinedKronecker)
    fitted.save(tmp_path / "m")
    loaded = imu.load_operator(tmp_path / "m")
    v = factors.mean_gradient()
    for verb in ("solve", "product"):
        assert torch.equal(getattr(fitted, verb)(v), getattr(loaded, verb)(v))
    assert torch.equal(fitted.self_influence(factors), loaded.self_influence(factors))


def test_float64_factors_have_a_float64_basis():
    factors = head().to(dtype=torch.float64)
    assert not isinstance(imu.KFAC(damping=1.0).fit(factors), kronecker.RefinedKronecker)


def test_what_float32_cannot_do_float64_does(monkeypatch):
    """The bound is not to be relied on where refinement stalls all the same."""
    factors = head()
    monkeypatch.setattr(kronecker, "_SMALL", float("inf"))
    fitted = imu.KFAC(damping=1e-12, damping_mode="relative").fit(factors)
    assert isinstance(fitted, kronecker.RefinedKronecker)
    v = torch.randn(fitted.shape, generator=torch.Generator().manual_seed(1)).double()
    fitted.solve(v)
    assert fitted.residual < 1e-3 and fitted._found is not None


def test_where_float32_does_not_converge_float64_is_taken(monkeypatch):
    factors, eigh = head(), torch.linalg.eigh

    def only_double(x):
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    fitted = imu.KFAC(damping=1.0).fit(factors)
    assert not isinstance(fitted, kronecker.RefinedKronecker)
