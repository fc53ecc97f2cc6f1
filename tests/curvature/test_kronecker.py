"""K-FAC by an eigenbasis in float32 gives what the dense float64 matrix gives, or is not taken."""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast import reference
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


HARD = {
    "a common mean of 1e3": lambda x: x + 1e3,
    "repeated samples": lambda x: x[torch.arange(len(x)) % 4],
    "scales over eight orders": lambda x: x * torch.logspace(0, -8, x.shape[1]),
    "a constant feature": lambda x: torch.cat([x[:, 1:], torch.full_like(x[:, :1], 0.1)], dim=1),
    "normal": lambda x: x,
}


def hard(kind):
    generator = torch.Generator().manual_seed(3)
    x = HARD[kind](torch.randn(40, 6, generator=generator))
    weight = torch.randn(9, 6, generator=generator) / x.norm(dim=1).mean()
    return imu.GradientFactors.from_head(x, weight, torch.zeros(9), torch.arange(40) % 9)


def at_the_threshold(factors, above):
    """A damping at which float32 is just taken, or just not."""
    b, a = kronecker_factors(factors, signals_or_curvature)
    kappa = kronecker._SMALL / kronecker._ROUNDING - 1
    return kronecker._norm(b) * kronecker._norm(a) / kappa * (1.001 if above else 0.999)


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("damping", ["above", "below", 1e-12, 1e-4, 1.0, 1e6])
def test_float32_is_taken_only_where_it_is_refined(kind, damping):
    """Whatever is taken: what the dense float64 matrix gives, and a residual that is true."""
    factors = hard(kind)
    if isinstance(damping, str):
        refined = damping == "above"
        damping = at_the_threshold(factors, refined)
        fitted = imu.KFAC(damping=damping).fit(factors)
        assert isinstance(fitted, kronecker.RefinedKronecker) is refined
    fitted = imu.KFAC(damping=damping).fit(factors)
    m = dense(factors, damping)
    slack = 64 * torch.finfo(torch.float64).eps * float(torch.linalg.cond(m))
    v = torch.randn(2, *fitted.shape, generator=torch.Generator().manual_seed(1)).double()
    x = fitted.solve(v).flatten(1)
    true = (x @ m - v.flatten(1)).norm(dim=1) / v.flatten(1).norm(dim=1)
    assert off(x, torch.linalg.solve(m, v.flatten(1).T).T) < 1e-9 + slack
    assert float(true.max()) <= 2 * fitted.residual + slack
    # In float32, to what rounding it to float32 would leave.
    single = fitted.solve(v.float()).flatten(1)
    truth = torch.linalg.solve(m, v.float().double().flatten(1).T).T
    assert off(single, truth) < 2e-7 + slack
    g = gradients(factors)
    own = (g * torch.linalg.solve(m, g.T).T).sum(dim=1)
    assert off(fitted.self_influence(factors), own) < 1e-5 + slack


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples, many", [(40, 1), (40, 3), (40, 40), (2, 30)])
@pytest.mark.parametrize("lengths", ["one", "few", "long"])
@pytest.mark.parametrize("fewest", [1, 1000])
def test_pairs_are_those_of_solves(name, dtype, samples, many, lengths, fewest, monkeypatch):
    """Of few and of many queries, of few and of many tokens: whichever side is turned."""
    monkeypatch.setattr(kronecker, "_FEWEST", fewest)
    monkeypatch.setattr(kronecker, "_ELEMENTS", 130)
    monkeypatch.setattr(kronecker, "_TURNED_TOKENS", 3)
    generator = torch.Generator().manual_seed(5)
    counts = {"one": [1], "few": [1, 0, 3], "long": [30, 2]}[lengths]

    def made(n):
        tokens = torch.tensor([counts[i % len(counts)] for i in range(n)])
        offsets = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])
        p = torch.softmax(torch.randn(int(offsets[-1]), 4, generator=generator), dim=1)
        act = torch.randn(len(p), 6, generator=generator)
        labels = torch.arange(len(p)) % 4
        delta = p - torch.nn.functional.one_hot(labels, 4)
        b = imu.OutputCurvature.softmax(p.to(dtype))
        return imu.GradientFactors(delta.to(dtype), act.to(dtype), offsets, True, curvature=b)

    factors, queries = made(samples), made(many)
    before = [x.clone() for x in (factors.delta, queries.delta, queries.act)]
    fitted = imu.fit(name, factors, damping=0.1)
    found = fitted.pairwise(factors, queries)
    residual = fitted.residual
    assert all(map(torch.equal, before, (factors.delta, queries.delta, queries.act)))
    h = reference.sample_gradients(queries.delta, queries.act, queries.offsets, True)
    g = reference.sample_gradients(factors.delta, factors.act, factors.offsets, True)
    x = fitted.solve(h)
    truth = torch.einsum("icd,jcd->ij", g, x)
    size = g.flatten(1).norm(dim=1)[:, None] * x.flatten(1).norm(dim=1)
    close = 64 * torch.finfo(dtype).eps
    assert bool(((found - truth).abs() <= close * size + 1e-9 * size.max()).all())
    assert 0 < residual < 1e-9 or (dtype == torch.float32 and residual < 1e-7)


def test_a_wrong_solve_shows_in_the_residual_of_pairs(monkeypatch):
    factors = head(n=40)
    fitted = imu.fit("ekfac", factors, damping=0.1)
    fitted.damped = fitted.damped.clone()
    monkeypatch.setattr(fitted, "_product", lambda v: v * 2)
    fitted.pairwise(factors, factors.samples(0, 5))
    assert fitted.residual > 0.1


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
    assert fitted.residual < 1e-3 and "_exact" in vars(fitted)


def test_where_float32_does_not_converge_float64_is_taken(monkeypatch):
    factors, eigh = head(), torch.linalg.eigh

    def only_double(x):
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    fitted = imu.KFAC(damping=1.0).fit(factors)
    assert isinstance(fitted, kronecker.RefinedKronecker)
    v = torch.randn(fitted.shape, generator=torch.Generator().manual_seed(1)).double()
    truth = torch.linalg.solve(dense(factors, 1.0), v.flatten())
    assert off(fitted.solve(v).flatten(), truth) < 1e-12 and fitted.residual < 1e-12
    assert bool(fitted.self_influence(factors).isfinite().all())
