"""A fitted curvature as an operator: its diagonal, its precision, scipy's view of it, the order."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from cases import CASES, Pieces, every_case, head_factors
from dense_curvatures import every_curvature, fit, rounding, spec_of
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import imu_fast as imu
from imu_fast.errors import InputError

HALF = [torch.float16, torch.bfloat16]
FEW = pytest.mark.parametrize(
    "case", [CASES[0], CASES[1], CASES[2], CASES[3], CASES[8]], ids=lambda c: c.why
)


def dense(fitted, order):
    """By products with the identity, [P, P] in the order of [C, D]."""
    basis = torch.eye(order, dtype=torch.float64)
    return (fitted @ basis.view(order, *fitted.shape)).flatten(1)


def in_torchs_order(matrix, fitted):
    """Rows and columns of [P, P] in the order of parameters_to_vector."""
    where = torch.arange(len(matrix)).view(fitted.shape)
    where = torch.cat([where[:, :-1].flatten(), where[:, -1]]) if fitted.has_bias else where.ravel()
    return matrix[where][:, where]


@every_curvature
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_diagonal_is_that_of_the_dense_matrix(name, case, dtype):
    f = head_factors(case, dtype)
    fitted, matrix = fit(name, f)
    found = fitted.diagonal()
    assert found.shape == (f.num_classes, f.width)
    assert found.dtype == fitted.dtype == (dtype if name == "fisher_diag" else torch.float64)
    for truth in (matrix, dense(fitted, f.num_classes * f.width)):
        error = (found.double() - truth.diagonal().view_as(found)).abs().max()
        assert float(error) <= rounding(f, name) * float(truth.diagonal().max())
    before = found.clone()
    found.zero_()
    assert torch.equal(fitted.diagonal(), before), "it is a copy"
    torch.testing.assert_close(imu.fit(spec_of(name), Pieces(f, 2)).diagonal(), before)


@every_curvature
@FEW
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_the_answer_is_in_the_dtype_of_the_question(name, case, dtype):
    """And as good as that dtype: what is computed in a wider one is rounded once."""
    f = head_factors(case)
    fitted, matrix = fit(name, f)
    # Not contiguous, either.
    many = torch.randn(f.width, f.num_classes, 40).to(dtype).permute(2, 1, 0)
    exact = torch.linalg.solve(matrix, many.double().flatten(1).T).T.view(many.shape)
    for v, truth in ((many, exact), (many[3], exact[3])):
        x = fitted.solve(v)
        assert x.dtype == dtype and x.shape == v.shape
        error = (x.double() - truth).flatten(-2).norm(dim=-1) / truth.flatten(-2).norm(dim=-1)
        assert float(error.max()) <= max(2 * torch.finfo(dtype).eps, 1e-11)
        product = fitted @ v
        truth = (v.double().flatten(-2) @ matrix).view(v.shape)
        assert product.dtype == dtype and product.shape == v.shape
        error = (product.double() - truth).flatten(-2).norm(dim=-1)
        # Products of float32 are added up in float32.
        eps = 2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
        eps = 1e-12 if dtype == torch.float64 else eps
        assert float((error / truth.flatten(-2).norm(dim=-1)).max()) <= eps


def ill_conditioned(dtype):
    torch.manual_seed(0)
    n, d, classes = 60, 40, 5
    act = torch.randn(n, d, dtype=torch.float64).to(dtype)
    weight = torch.randn(classes, d, dtype=torch.float64).to(dtype)
    return imu.GradientFactors.from_head(act, weight, None, torch.arange(n) % classes)


@every_curvature
@pytest.mark.parametrize("damping", [1e-3, 1e-6])
def test_scores_of_float32_are_right_at_high_condition(name, damping):
    narrow = ill_conditioned(torch.float32)
    wide = narrow.to(dtype=torch.float64)
    spec = spec_of(name, damping)
    for score in (
        lambda f: imu.influence_scores(f, curvature=spec),
        lambda f: imu.self_influence(f, curvature=spec),
        lambda f: imu.pairwise_influence(f, f.samples(0, 7), curvature=spec),
    ):
        found, truth = score(narrow).double(), score(wide)
        assert float((found - truth).norm() / truth.norm()) <= 1e-5


@every_curvature
def test_what_a_narrow_dtype_cannot_hold_is_refused(name):
    if name == "identity":
        return
    fitted = imu.fit(spec_of(name, 1e-4), head_factors(CASES[0]))
    v = torch.full(fitted.shape, 30000.0)
    fitted.solve(v)
    with pytest.raises(InputError, match=r"v is torch.float16, in which M\^-1 v, up to .* wider"):
        fitted.solve(v.half())
    assert fitted.solve(v.half(), out=torch.empty_like(v)).isfinite().all()
    with pytest.raises(InputError, match=r"out is torch.float16, in which M\^-1 v"):
        fitted.solve(v, out=torch.empty_like(v, dtype=torch.float16))
    with pytest.raises(InputError, match=r"v is torch.float32, in which M\^-1 v"):
        fitted.solve(torch.full(fitted.shape, 3e38))


@every_curvature
@FEW
def test_scipy_sees_the_same_matrix_in_torchs_order(name, case):
    f = head_factors(case)
    fitted, matrix = fit(name, f)
    truth = in_torchs_order(matrix, fitted).numpy()
    order = len(truth)
    for inverse, wanted in ((False, truth), (True, np.linalg.inv(truth))):
        a = fitted.linear_operator(inverse=inverse)
        assert a.shape == (order, order) and a.dtype == np.float64
        size = np.abs(wanted).max()
        bound = 1e3 * rounding(f, name) + 1e-10
        for found in (a @ np.eye(order), a.T @ np.eye(order), a.H.matmat(np.eye(order))):
            assert np.abs(found - wanted).max() <= bound * size
        x = np.random.default_rng(0).normal(size=2 * order).astype(np.float32)[::2]
        for found in (a.matvec(x), a.rmatvec(x), a @ x, a.matvec(x[:, None])[:, 0]):
            assert found.dtype == np.float64
            assert np.abs(found - wanted @ x).max() <= bound * size * np.abs(x).sum()
    assert a.matmat(np.zeros((order, 0))).shape == (order, 0)
    with pytest.raises(InputError, match="real and was given complex128"):
        a @ np.ones(order, dtype=complex)
    with pytest.raises(InputError, match="inverse='yes'"):
        fitted.linear_operator(inverse="yes")


@every_curvature
def test_scipys_solvers_and_eigenvalues(name):
    from scipy.sparse.linalg import cg, eigsh

    f = head_factors(CASES[7])
    fitted, matrix = fit(name, f)
    truth = in_torchs_order(matrix, fitted).numpy()
    rhs = np.random.default_rng(0).normal(size=len(truth))
    x, failed = cg(fitted.linear_operator(), rhs, rtol=1e-12)
    assert not failed
    np.testing.assert_allclose(x, np.linalg.solve(truth, rhs), rtol=1e-8, atol=1e-8)
    # The inverse is a perfect preconditioner.
    inverse = fitted.linear_operator(inverse=True)
    x, failed = cg(fitted.linear_operator(), rhs, rtol=1e-8, maxiter=2, M=inverse)
    assert not failed
    values, vectors = eigsh(fitted.linear_operator(), k=3, v0=np.ones(len(truth)))
    if name == "identity":
        assert np.allclose(values, 1)
        return
    np.testing.assert_allclose(values, np.linalg.eigvalsh(truth)[-3:], rtol=1e-9)
    np.testing.assert_allclose(truth @ vectors, vectors * values, atol=1e-8 * values.max())


def test_without_scipy_it_is_refused_by_the_name_of_what_installs_it(monkeypatch):
    fitted = imu.fit("identity", head_factors(CASES[1]))
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(InputError, match=r"linear_operator\(\) needs scipy.*'imu_fast\[demo\]'"):
        fitted.linear_operator()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (1, 4), (4, 1)])
def test_the_order_is_that_of_parameters_to_vector(bias, sizes):
    head = nn.Linear(*sizes, bias=bias)
    wide = head.weight if not bias else torch.cat([head.weight, head.bias[:, None]], dim=1)
    flat = parameters_to_vector(head.parameters())
    assert torch.equal(imu.matrix_to_vector(wide, bias), flat)
    assert torch.equal(imu.vector_to_matrix(flat, sizes[1], bias), wide)
    stack = torch.randn(2, 3, *wide.shape, dtype=torch.bfloat16)
    there = imu.matrix_to_vector(stack, bias)
    assert there.shape == (2, 3, flat.numel())
    assert torch.equal(imu.vector_to_matrix(there, sizes[1], bias), stack)
    # A gradient flows through: they are plain views and copies.
    x, y = torch.randn(2, sizes[0]), torch.randint(sizes[1], (2,))
    nn.functional.cross_entropy(head(x), y).backward()
    f = imu.GradientFactors.from_head(x, head.weight, head.bias, y)
    step = imu.matrix_to_vector(f.mean_gradient(), bias)
    torch.testing.assert_close(step, parameters_to_vector(p.grad for p in head.parameters()))
    vector_to_parameters(step, head.parameters())
    torch.testing.assert_close(head.weight.detach(), f.mean_gradient()[:, : sizes[0]])


def test_what_has_no_such_order_is_refused():
    with pytest.raises(InputError, match=r"expected \[..., P\], P a multiple of num_classes=4"):
        imu.vector_to_matrix(torch.ones(7), 4, True)
    with pytest.raises(InputError, match="num_classes=0"):
        imu.vector_to_matrix(torch.ones(7), 0, True)
    with pytest.raises(InputError, match=r"matrix has shape \(3,\); pass a tensor"):
        imu.matrix_to_vector(torch.ones(3), True)
    with pytest.raises(InputError, match="has_bias=1 must be True or False"):
        imu.matrix_to_vector(torch.ones(3, 2), 1)
    with pytest.raises(InputError, match="vector is a list"):
        imu.vector_to_matrix([1.0], 1, True)
    with pytest.raises(InputError, match="no column is the bias"):
        imu.matrix_to_vector(torch.ones(3, 0), True)


RELATIVE = [name for name in imu.curvatures() if name != "identity"]


@pytest.mark.parametrize("name", RELATIVE)
@every_case
def test_damping_relative_to_the_mean_eigenvalue(name, case):
    f = head_factors(case)
    order = f.num_classes * f.width
    if case.classes == 1:
        for door in (imu.fit, lambda name, f, **o: imu.influence_scores(f, curvature=name, **o)):
            with pytest.raises(InputError, match="mean eigenvalue, which is 0 of these samples"):
                door(name, f, damping=0.3, damping_mode="relative")
        return
    plain, matrix = fit(name, f, 1e-3)
    undamped = matrix - 1e-3 * torch.eye(order, dtype=torch.float64)
    truth = 0.3 * float(torch.linalg.eigvalsh(undamped).sum()) / order
    fitted = imu.fit(name, f, damping=0.3, damping_mode="relative")
    assert fitted.damping == pytest.approx(truth, rel=1e-8)
    assert plain.damping == 1e-3
    basis = torch.eye(order, dtype=torch.float64)
    wanted = undamped + truth * basis
    bound = rounding(f, name, min(truth, 1.0)) * float(wanted.abs().max()) + 1e-12
    if name != "ekfac":
        assert float((dense(fitted, order) - wanted).abs().max()) <= bound
    # The same as lam itself, in scores too; and without unit: twice the gradients, as relative.
    spec = {"curvature": name, "damping": 0.3, "damping_mode": "relative"}
    scores = imu.influence_scores(f, **spec)
    absolute = imu.influence_scores(f, curvature=name, damping=fitted.damping)
    torch.testing.assert_close(scores, absolute, rtol=1e-7, atol=1e-12)
    pieces = imu.influence_scores(Pieces(f, 2), **spec)
    torch.testing.assert_close(scores, pieces, rtol=1e-6, atol=1e-9 * float(scores.abs().max()))
    if name in ("fisher", "fisher_diag"):
        twice = f.with_delta(2 * f.delta)
        torch.testing.assert_close(imu.influence_scores(twice, **spec), scores)


def test_relative_damping_of_a_diagonal_is_of_all_classes(monkeypatch):
    """A head whose classes are dealt with some at a time."""
    torch.manual_seed(0)
    module = sys.modules["imu_fast.factors.implicit_head"]
    monkeypatch.setattr(module, "_TILE_BYTES", 1)
    monkeypatch.setattr(module, "_FEWEST_CLASSES", 3)
    act, weight, labels = torch.randn(9, 4), torch.randn(11, 4), torch.arange(9)
    weight[:5] *= 3
    stored, implicit = (
        imu.GradientFactors.from_head(act, weight, None, labels, implicit=how)
        for how in (False, True)
    )
    assert implicit.outputs_at_once < 11
    for mode in ("relative", "add"):
        spec = imu.FisherDiag(damping=0.3, damping_mode=mode)
        assert spec.separates == (mode == "add")
        found = imu.fit(spec, implicit)
        assert found.damping == pytest.approx(imu.fit(spec, stored).damping, rel=1e-5)
        for score in (imu.influence_scores, imu.self_influence):
            truth = score(stored, curvature=spec)
            torch.testing.assert_close(score(implicit, curvature=spec), truth)
        truth = imu.pairwise_influence(stored, stored, curvature=spec)
        torch.testing.assert_close(
            imu.pairwise_influence(implicit, implicit, curvature=spec), truth
        )


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_to_nothing_is_refused(name):
    f = head_factors(CASES[1])
    infinite = imu.GradientFactors(
        f.delta, f.act * 1e200, f.offsets, True, f.labels, curvature=f.curvature
    )
    with pytest.raises(
        InputError, match=r"which is (inf|nan) of|mean square of .* not finite|beyond the range"
    ):
        imu.fit(name, infinite, damping_mode="relative")
    none = head_factors(CASES[11]).select(torch.tensor([1, 4]))  # no token at all
    with pytest.raises(InputError, match="which is 0 of these samples; pass damping_mode='add'"):
        imu.fit(name, none, damping_mode="relative")
    with pytest.raises(InputError, match="times the mean .* beyond the range of"):
        imu.fit(name, f, damping=1e-308, damping_mode="relative")


def test_a_damping_that_is_nothing_in_float32_is_refused():
    """A gradient of zero would be divided by zero."""
    f = head_factors(CASES[3], torch.float32)
    for mode in ("add", "clamp"):
        with pytest.raises(InputError, match="damping=1e-50 is beyond the range of torch.float32"):
            imu.fit("fisher_diag", f, damping=1e-50, damping_mode=mode)
        imu.fit("fisher_diag", head_factors(CASES[3]), damping=1e-50, damping_mode=mode)


def test_the_identity_has_nothing_to_damp():
    assert imu.fit("identity", head_factors(CASES[1])).damping == 0.0
    with pytest.raises(InputError, match="curvature='identity' has no option damping_mode"):
        imu.fit("identity", head_factors(CASES[1]), damping_mode="relative")
