"""What every curvature promises, by its line in the table: against its dense float64 matrix."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DTYPES, IDS, Pieces, assert_close, every_case, every_dtype, head_factors
from dense_curvatures import LAM, MATRIX, bare, every_curvature, fit, gradients, rounding, spec_of

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import InputError

# A value for each flat option that is not its default.
OTHER = {
    "damping": 0.3,
    "damping_mode": "relative",
    "solver": "cg",
    "tolerance": 1e-9,
    "preconditioner": "none",
    "fisher": "empirical",
}


def close(found, truth, bound):
    assert found.shape == truth.shape
    error = float((found.double() - truth).abs().max())
    size = float(truth.abs().max())
    assert error <= bound * size, f"{error:.3g} of {size:.3g} is above {bound:.3g}"


def test_every_curvature_has_its_definition_here():
    assert set(MATRIX) == set(CURVATURES)


@every_curvature
@every_case
@every_dtype
def test_is_its_matrix_symmetric_positive_definite(name, case, dtype):
    f = head_factors(case, dtype)
    fitted, matrix = fit(name, f)
    order = f.num_classes * f.width
    basis = torch.eye(order, dtype=torch.float64).view(order, f.num_classes, f.width)
    columns = (fitted @ basis).flatten(1)
    assert columns.dtype == torch.float64
    close(columns, matrix, rounding(f, name))
    close(columns, columns.T, rounding(f))
    smallest = torch.linalg.eigvalsh((columns + columns.T) / 2)[0]
    least = 1.0 if name == "identity" else LAM
    assert smallest >= least * (1 - rounding(f, name))


@every_curvature
@every_case
@every_dtype
def test_solve_and_product_are_inverses_and_the_residual_is_true(name, case, dtype):
    f = head_factors(case, dtype)
    fitted, matrix = fit(name, f)
    shape = (3, f.num_classes, f.width)
    v = torch.randn(shape, dtype=torch.float64) * torch.tensor([1.0, 1e-6, 0.0])[:, None, None]
    before = v.clone(), f.delta.clone(), f.act.clone()
    x = fitted.solve(v)
    certificate = fitted.residual
    assert x.shape == v.shape and x.dtype == torch.float64
    bound = rounding(f, name)
    for one, rhs in zip(x[:2], v[:2], strict=True):
        true = float((matrix @ one.flatten() - rhs.flatten()).norm() / rhs.norm())
        assert true <= 2 * certificate + bound, "the certificate understates the residual"
        close(one, torch.linalg.solve(matrix, rhs.flatten()).view_as(one), bound + 1e-10)
        close(fitted @ one, rhs, bound + 1e-10)
        close(fitted.solve(fitted @ rhs), rhs, bound + 1e-10)
    assert not x[2].any()
    for one, rhs in zip(x, v, strict=True):
        alone = fitted.solve(rhs)
        assert alone.shape == rhs.shape
        torch.testing.assert_close(alone, one, rtol=1e-9, atol=1e-9 * float(one.abs().max()))
    assert fitted.residual == 0.0, "the last right-hand side is zero"
    assert (fitted @ v[:1].to(dtype)).dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(before, (v, f.delta, f.act), strict=True)), (
        "an input was changed"
    )


@every_curvature
@every_case
@every_dtype
def test_scores_self_influence_and_pairs(name, case, dtype):
    f, queries = head_factors(case, dtype), head_factors(case, dtype)
    queries = queries.select(torch.arange(f.n).flip(0)[: max(1, f.n // 2)])
    fitted, matrix = fit(name, f)
    g, h = gradients(f), gradients(queries)
    solved = torch.linalg.solve(matrix, h.T)
    bound = (f.num_tokens + f.num_classes * f.width + 8) * torch.finfo(dtype).eps
    bound = 4 * bound + rounding(f, name) + 1e-10
    sizes = g.norm(dim=1).max() * solved.norm(dim=0).max() + 1e-300

    def same(found, truth):
        assert found.shape == truth.shape and found.dtype == dtype
        assert float((found.double() - truth).abs().max() / sizes) <= bound

    spec = spec_of(name)
    same(fitted.pairwise(f, queries), g @ solved)
    same(fitted.self_influence(queries), (h.T * solved).sum(dim=0))
    same(fitted.self_influence(queries), fitted.pairwise(queries, queries).double().diagonal())
    pairs = imu.pairwise_influence(f, queries, curvature=spec)
    same(pairs, -(g @ solved))
    same(imu.influence_scores(f, curvature=spec, target=queries), -(g @ solved).mean(dim=1))
    same(imu.influence_scores(f, curvature=spec, target=queries), pairs.double().mean(dim=1))
    own = torch.linalg.solve(matrix, g.T)
    sizes = g.norm(dim=1).max() * own.norm(dim=0).max() + 1e-300
    same(imu.influence_scores(f, curvature=spec), -(g @ own).mean(dim=1))
    same(imu.self_influence(f, curvature=spec), (g.T * own).sum(dim=0))
    assert bool((imu.self_influence(f, curvature=spec) >= 0).all())


@every_curvature
@pytest.mark.parametrize("tokens", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "case", [CASES[0], CASES[1], CASES[3], CASES[7], CASES[8], CASES[9]], ids=lambda c: c.why
)
def test_pieces_are_as_good_as_the_whole(name, case, tokens):
    """Chunks of one token, of primes that do not divide, of samples that are larger or empty."""
    whole = head_factors(case)
    pieces, queries = Pieces(whole, tokens), Pieces(whole, 3)
    assert tokens >= whole.num_tokens or len(pieces._cut) > 1
    spec = spec_of(name)
    of_pieces, of_whole = imu.fit(spec, pieces), imu.fit(spec, whole)
    v = torch.randn(2, whole.num_classes, whole.width, dtype=torch.float64)

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))

    same(of_pieces.product(v), of_whole.product(v))
    same(of_pieces.solve(v), of_whole.solve(v))
    same(of_pieces.self_influence(pieces), of_whole.self_influence(whole))
    same(of_pieces.pairwise(pieces, queries), of_whole.pairwise(whole, whole))
    for target in (None, v[0]):
        found = imu.influence_scores(pieces, curvature=spec, target=target)
        same(found, imu.influence_scores(whole, curvature=spec, target=target))
    found = imu.influence_scores(whole, curvature=spec, target=queries)
    same(found, imu.influence_scores(whole, curvature=spec, target=whole))
    same(imu.self_influence(pieces, curvature=spec), imu.self_influence(whole, curvature=spec))
    pairs = imu.pairwise_influence(pieces, queries, curvature=spec)
    same(pairs, imu.pairwise_influence(whole, whole, curvature=spec))


@every_curvature
def test_bad_damping_is_refused_before_any_work(name):
    f = head_factors(CASES[1])
    if "damping" not in CURVATURES[name].paths():
        return
    for damping in (0, -1, float("inf"), float("nan"), "0.1", True):
        for door in (imu.influence_scores, imu.self_influence):
            with pytest.raises(InputError, match="damping="):
                door(f, curvature=name, damping=damping)
        with pytest.raises(InputError, match="damping="):
            imu.fit(name, None, damping=damping)


@every_curvature
@pytest.mark.parametrize("option", list(OTHER))
def test_an_option_is_used_or_refused_with_those_there_are(name, option):
    f = head_factors(CASES[1], DTYPES[1])
    given = {option: OTHER[option]}
    doors = (
        lambda: imu.fit(name, f, **given),
        lambda: imu.influence_scores(f, curvature=name, **given),
        lambda: imu.self_influence(f, curvature=name, **given),
        lambda: imu.pairwise_influence(f, f.samples(0, 2), curvature=name, **given),
    )
    known = sorted(CURVATURES[name].paths())
    if option in known:
        for door in doors:
            door()
        return
    listed = f"it has {', '.join(known)}" if known else "it has none"
    for door in doors:
        with pytest.raises(
            InputError, match=f"curvature='{name}' has no option {option}; {listed}"
        ):
            door()


@every_curvature
def test_a_name_is_short_for_the_object(name):
    f = head_factors(CASES[1], DTYPES[1])
    given = {k: OTHER[k] for k in CURVATURES[name].paths()}
    spec = type(CURVATURES[name])(**given)
    assert getattr(imu, type(spec).__name__) is type(spec)
    by_name = imu.influence_scores(f, curvature=name, **given)
    assert torch.equal(imu.influence_scores(f, curvature=spec), by_name)
    plain = imu.influence_scores(f, curvature=name)
    assert torch.equal(imu.influence_scores(f, curvature=type(spec)()), plain)
    if given:
        assert not torch.equal(plain, by_name), "the options are used"
        with pytest.raises(InputError, match="is an object, which holds its own options"):
            imu.influence_scores(f, curvature=spec, damping=0.1)


@pytest.mark.parametrize("case", CASES[:3], ids=IDS[:3])
@every_curvature
def test_out_may_be_the_right_hand_side(name, case):
    """And of any dtype, to which X is rounded."""
    fitted, _ = fit(name, head_factors(case))
    v = torch.randn(case.classes, case.features + case.has_bias, dtype=torch.float64)
    expected, given, before = fitted.solve(v), v.clone(), v.clone()
    assert fitted.solve(given, out=given) is given
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=0)
    narrow = torch.empty_like(v, dtype=torch.float32)
    assert fitted.solve(v, out=narrow) is narrow
    torch.testing.assert_close(narrow, expected.float())
    assert torch.equal(v, before)
    with pytest.raises(InputError, match=r"out has shape \(1,\); expected v's"):
        fitted.solve(v, out=torch.empty(1))


@every_curvature
def test_what_does_not_fit_is_refused_not_broadcast(name):
    f = head_factors(CASES[1])  # C = 7, D = 6
    fitted, _ = fit(name, f)
    wanted = r"v has shape .*expected \[7, 6\], or \[m, 7, 6\]"
    shapes = ((6,), (1, 6), (6, 7), (1, 1, 7, 6), (0, 7, 6))
    for v in map(torch.ones, shapes):
        for call in (fitted.solve, fitted.product, lambda v: fitted @ v):
            with pytest.raises(InputError, match=wanted):
                call(v)
    for v in (torch.ones(7, 6, dtype=torch.int64), [[1.0]], torch.ones(7, 6, dtype=torch.cfloat)):
        with pytest.raises(InputError, match="v (is|has) .*; pass a tensor .* of float64"):
            fitted.solve(v)
    other = head_factors(CASES[2])  # no bias
    for call in (
        lambda: fitted.self_influence(other),
        lambda: fitted.pairwise(other, f),
        lambda: fitted.pairwise(f, other),
    ):
        with pytest.raises(
            InputError, match=r"\(7, 5\) without a bias on cpu, M has \(7, 6\) with a bias on cpu"
        ):
            call()


@every_curvature
@pytest.mark.parametrize("swapped", [False, True])
def test_a_layer_with_a_bias_is_not_one_without(name, swapped):
    """Of as many parameters."""
    f = head_factors(CASES[1])
    f, other = (bare(f), f) if swapped else (f, bare(f))
    fitted, _ = fit(name, f)
    for call in (
        lambda: fitted.self_influence(other),
        lambda: fitted.pairwise(other, f),
        lambda: fitted.pairwise(f, other),
        lambda: imu.influence_scores(f, curvature=name, target=other),
        lambda: imu.pairwise_influence(f, other, curvature=name),
        lambda: imu.top_influences(f, other, 1, curvature=name),
    ):
        with pytest.raises(InputError, match="bias"):
            call()


@every_curvature
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autograd_stay_outside(name, dtype):
    f = head_factors(CASES[1], torch.float32)
    fitted, matrix = fit(name, f)
    v = torch.randn(7, 6).to(dtype).requires_grad_()
    found = fitted @ v
    assert found.dtype == dtype and not found.requires_grad
    truth = (matrix @ v.detach().double().flatten()).view(7, 6)
    assert_close(found, truth, length=1)
    x = fitted.solve(v)
    assert x.dtype == dtype and not x.requires_grad
    truth = torch.linalg.solve(matrix, v.detach().double().flatten()).view(7, 6)
    # Rounded once, to half of its last digit.
    error = (x.double() - truth).abs() / truth.abs()
    assert float(error.max()) <= 0.51 * torch.finfo(dtype).eps


@every_curvature
def test_factors_of_either_dtype_may_be_scored(name):
    wide = head_factors(CASES[7])
    narrow = wide.to(dtype=torch.float32)
    for m, f in ((narrow, wide), (wide, narrow)):
        fitted = imu.fit(spec_of(name), m)
        same = imu.fit(spec_of(name), f)
        for found, truth in (
            (fitted.self_influence(f), same.self_influence(f)),
            (fitted.pairwise(f, f), same.pairwise(f, f)),
        ):
            assert found.dtype == f.dtype
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
