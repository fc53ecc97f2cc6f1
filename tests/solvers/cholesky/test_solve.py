"""Broadcast solves and their derivatives, transforms and compilation, against float64 torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import imu_fast as imu
from imu_fast.errors import InputError, SingularMatrixError
from imu_fast.solvers.cholesky import library

solve = imu.damped_cholesky_solve
# Batches of A, of lam (None: a number) and the shape of B, for order 4.
SHAPES = [
    ((), None, (4,)),
    ((), None, (4, 3)),
    ((), (), (4, 1)),
    ((3,), None, (3, 4)),
    ((3,), None, (4,)),
    ((3,), (3,), (3, 4, 2)),
    ((3,), (3,), (1, 4, 2)),
    ((), (3,), (4, 2)),
    ((), (3,), (2, 3, 4, 2)),
    ((), None, (5, 4, 2)),
    ((2, 1), (3,), (3, 4)),
    ((2, 1), (3,), (2, 3, 4, 2)),
    ((2, 1), (2, 1), (2, 3, 4, 2)),
    ((1, 3), None, (2, 3, 4, 1)),
]
every_shape = pytest.mark.parametrize("of_a, of_damping, of_b", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(params=["extension", "torch"], autouse=True)
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr("imu_fast.solvers.cholesky.lapack.extension", lambda: None)
    elif not imu.backends()["extension"].available:
        pytest.skip(imu.backends()["extension"].reason)
    torch.manual_seed(0)


def spd(*batch, order=4, dtype=torch.float64):
    x = torch.randn(*batch, order, order, dtype=torch.float64)
    return (x @ x.mT / order).to(dtype)


def operands(of_a, of_damping, of_b, dtype=torch.float64, order=4):
    """Dampings over three decades."""
    damping = 0.3
    if of_damping is not None:
        damping = torch.logspace(-2, 1, math.prod(of_damping), dtype=dtype).reshape(of_damping)
    return spd(*of_a, order=order, dtype=dtype), torch.randn(of_b, dtype=dtype), damping


def truth(a, b, damping):
    """By torch.linalg.solve in float64, of both triangles."""
    a, vector = a.double(), b.dim() < a.dim()
    damping = torch.as_tensor(damping, dtype=torch.float64)
    damped = a + damping[..., None, None] * torch.eye(a.shape[-1], dtype=torch.float64)
    columns = b.double()[..., None] if vector else b.double()
    x = torch.linalg.solve(damped, columns)
    return x.squeeze(-1) if vector else x


def symmetric(x):
    return (x + x.mT) / 2


@every_shape
@every_dtype
def test_batches_broadcast(of_a, of_damping, of_b, dtype):
    a, b, damping = operands(of_a, of_damping, of_b, dtype)
    before = a.clone(), b.clone()
    expected = truth(a, b, damping)
    bound = 1e-10 if dtype == torch.float64 else 1e-2
    followed = solve(a.clone().requires_grad_(), b, damping)
    unread = torch.tril(torch.full_like(a, torch.nan), -1) + a.triu()
    columnar = torch.zeros_like(a).mT + a
    for x in (
        solve(a, b, damping),
        solve(columnar, torch.stack([b, b], dim=-1)[..., 0], damping, check=False),
        solve(unread, b, damping),
        followed.detach(),
    ):
        assert x.dtype == dtype and x.shape == expected.shape
        torch.testing.assert_close(x.double(), expected, rtol=bound, atol=bound)
    assert followed.requires_grad
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@every_shape
def test_derivatives_of_two_orders(of_a, of_damping, of_b):
    a, b, damping = operands(of_a, of_damping or (), of_b)
    leaves = [t.clone().requires_grad_() for t in (a, b, damping + 0.5)]

    def found(a, b, damping):
        return solve(symmetric(a), b, damping)

    assert torch.autograd.gradcheck(found, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(found, leaves)


def test_the_gradient_in_a_is_symmetric_as_that_of_cholesky():
    a, b, damping = operands((3,), (3,), (3, 4, 2))
    a.requires_grad_()
    gradient = torch.autograd.grad(solve(a, b, damping).square().sum(), a)[0]
    damped = a + torch.diag_embed(damping[:, None].expand(3, 4))
    x = torch.cholesky_solve(b, torch.linalg.cholesky(damped))
    torch.testing.assert_close(gradient, torch.autograd.grad(x.square().sum(), a)[0])
    assert torch.equal(gradient, gradient.mT)


@every_dtype
def test_gradients_of_each_operand_alone(dtype):
    operands_ = operands((3,), (3,), (3, 4, 2), dtype)
    wanted = [t.double().requires_grad_() for t in operands_]
    expected = torch.autograd.grad(truth(symmetric(wanted[0]), *wanted[1:]).square().sum(), wanted)
    for i in range(3):
        leaves = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(operands_)]
        found = torch.autograd.grad(solve(*leaves).square().sum(), leaves[i])[0]
        assert found.dtype == dtype
        bound = 1e-9 if dtype == torch.float64 else 2e-2
        size = float(expected[i].abs().max())
        torch.testing.assert_close(found.double(), expected[i], rtol=bound, atol=bound * size)


def test_autocast_changes_nothing():
    leaves = [t.requires_grad_() for t in operands((3,), (3,), (3, 4, 2), torch.float32)]
    expected = torch.autograd.grad(solve(*leaves).square().sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(solve(*leaves).square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_backward_pass_factors_nothing(monkeypatch):
    a, b, damping = operands((3,), (3,), (3, 4))
    leaves = [t.requires_grad_() for t in (a, b, damping)]
    x = solve(*leaves)

    def refused(*_):
        raise AssertionError("factored again")

    monkeypatch.setattr(library, "factor_plain", refused)
    first = torch.autograd.grad(x.square().sum(), leaves, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    with pytest.raises(AssertionError, match="factored again"):
        solve(*leaves)


MAPPED = [
    dims for dims in itertools.product((None, 0, -1), repeat=3) if any(d is not None for d in dims)
]


@pytest.mark.parametrize("dims", MAPPED, ids=str)
@pytest.mark.parametrize(
    "shapes", [((), (), (4,)), ((2,), (2,), (2, 4, 3)), ((), (), (2, 4, 3))], ids=str
)
def test_vmap_over_every_combination(dims, shapes):
    of_a, of_damping, of_b = shapes
    a, b, damping = operands((5, *of_a), (5, *of_damping), (5, *of_b))
    given = [
        t[0] if dim is None else t.movedim(0, dim)
        for t, dim in zip((a, b, damping), dims, strict=True)
    ]
    each = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(given, dims, strict=True)]
        for i in range(5)
    ]
    found = torch.func.vmap(solve, in_dims=dims)(*given)
    torch.testing.assert_close(found, torch.stack([truth(*some) for some in each]))

    def loss(a, b, damping):
        return solve(symmetric(a), b, damping).square().sum()

    def expected_loss(a, b, damping):
        return truth(symmetric(a), b, damping).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=dims)(*given)
    of_each = [torch.func.grad(expected_loss, argnums=(0, 1, 2))(*some) for some in each]
    for found, expected in zip(gradients, zip(*of_each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_transforms_of_transforms():
    a, b, damping = operands((), (), (4,))

    def loss(solver):
        return lambda a, b, damping: solver(symmetric(a), b, damping).pow(3).sum()

    found = torch.func.jacrev(torch.func.grad(loss(solve), argnums=(0, 1, 2)), argnums=2)
    expected = torch.func.jacrev(torch.func.grad(loss(truth), argnums=(0, 1, 2)), argnums=2)
    for one, other in zip(found(a, b, damping), expected(a, b, damping), strict=True):
        torch.testing.assert_close(one, other)
    nested = torch.func.vmap(torch.func.vmap(solve, in_dims=(None, 0, None)), in_dims=(0, None, 0))
    many = spd(3), torch.randn(2, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    expected = truth(many[0][:, None], many[1].expand(3, 2, 4)[..., None], many[2][:, None])
    torch.testing.assert_close(nested(*many), expected[..., 0])
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda a: solve(a, b, damping), (a,), (a,))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dampings", [(0.1, 0.2, 0.3), (torch.tensor([0.1, 1.0, 10.0]),)], ids=str)
def test_compiled_without_a_break(backend, dampings):
    a, b, _ = operands((3,), None, (3, 4))
    leaves = [a.requires_grad_(), b.requires_grad_()]

    def loss(a, b, damping):
        return solve(a, b, damping).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for damping in dampings:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves, damping), loss(*leaves, damping))
        found = torch.autograd.grad(compiled(*leaves, damping), leaves)
        expected = torch.autograd.grad(loss(*leaves, damping), leaves)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_errs_when_it_runs(backend):
    torch._dynamo.reset()
    compiled = torch.compile(solve, fullgraph=True, backend=backend)
    a, b, damping = operands((3,), (3,), (3, 4))
    with torch.no_grad():
        with pytest.raises(SingularMatrixError, match="matrix 1 of 3"):
            compiled(a * torch.tensor([1, -1, 1])[:, None, None], b, 1e-3 * damping)
        with pytest.raises(InputError, match=r"damping=-0.01 of matrix 0 must be"):
            compiled(a, b, -damping)
        with pytest.raises(InputError, match=r"damping=-2.0 of matrix 0 must be"):
            compiled(a, b, -2.0)
        torch.testing.assert_close(compiled(a, b, damping), truth(a, b, damping))
        assert compiled(-a, b, 1e-3, check=False).isnan().any()


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="that torch compiles no grad of a custom function"
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms(backend):
    """One at a time: torch compiles no vmap of the grad of any autograd.Function."""

    def loss(a, b, damping):
        return solve(a, b, damping).square().sum()

    given = operands((3,), (3,), (3, 4))
    for transformed in (
        torch.func.grad(loss, argnums=(0, 1, 2)),
        torch.func.vmap(loss),
        torch.func.vmap(loss, in_dims=(None, 0, None)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(transformed, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(*given), transformed(*given))


def test_exported():
    class Solver(torch.nn.Module):
        def forward(self, a, b, damping):
            return solve(a, b, damping)

    a, b, damping = operands((3,), (3,), (3, 4))
    program = torch.export.export(Solver(), (a, b, damping))
    torch.testing.assert_close(program.module()(a, b, damping), truth(a, b, damping))
    assert "imu_fast.damped_cholesky_apply" in str(program.graph)


@every_dtype
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("many", [0, 1, 2])
def test_operators_keep_the_rules_of_their_library(dtype, batch, many):
    a, b = spd(*batch, dtype=dtype), torch.randn(*batch, 4, many, dtype=dtype)
    damping = torch.full(batch, 0.5, dtype=dtype)
    torch.library.opcheck(library.factor, (a, damping, True))
    factor = library.factored(a, damping, True)
    leaves = [t.requires_grad_() for t in (a, damping, b)]
    torch.library.opcheck(library.apply, (*leaves[:2], factor, leaves[2], True))


@pytest.mark.parametrize(
    "of_a, of_damping, of_b, shape",
    [
        ((0, 0), (), (0,), (0,)),
        ((0, 0), (), (0, 3), (0, 3)),
        ((2, 0, 0), (2,), (2, 0, 3), (2, 0, 3)),
        ((1, 1), (), (1,), (1,)),
        ((1, 1), (5,), (1, 1, 2), (5, 1, 2)),
        ((0, 4, 4), (), (0, 4), (0, 4)),
        ((0, 4, 4), (0,), (4,), (0, 4)),
        ((4, 4), (0,), (4, 2), (0, 4, 2)),
        ((4, 4), (), (0, 4, 2), (0, 4, 2)),
        ((3, 4, 4), (3,), (3, 4, 0), (3, 4, 0)),
        ((4, 4), (), (4, 0), (4, 0)),
    ],
    ids=str,
)
def test_nothing_and_one(of_a, of_damping, of_b, shape):
    leaves = [
        torch.ones(of_a, dtype=torch.float64).triu().requires_grad_(),
        torch.ones(of_b, dtype=torch.float64, requires_grad=True),
        torch.full(of_damping, 4.0, dtype=torch.float64, requires_grad=True),
    ]
    for damping in (leaves[2], 4.0) if not of_damping else (leaves[2],):
        with torch.no_grad():
            assert solve(leaves[0], leaves[1], damping).shape == shape
        found = solve(leaves[0], leaves[1], damping)
        assert found.shape == shape
        gradients = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient is None or gradient.shape == leaf.shape
    if 1 in of_a:
        torch.testing.assert_close(found, torch.full(shape, 0.2, dtype=torch.float64))


def test_no_damping_of_a_positive_definite_matrix():
    a, b = spd(3) + torch.eye(4), torch.randn(3, 4, dtype=torch.float64)
    for damping in (0, 0.0, torch.zeros(3), torch.tensor(0)):
        torch.testing.assert_close(solve(a, b, damping), truth(a, b, 0.0))
    with pytest.raises(SingularMatrixError, match=r"A \+ 0 I is not positive definite.*pivot 1 of"):
        solve(torch.zeros(3, 4, 4, dtype=torch.float64), b, 0.0)


@pytest.mark.parametrize("follow", [False, True], ids=["plain", "followed"])
def test_failures_name_the_matrix_and_its_damping(follow):
    a = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, -2.0], [1.0, -2.0]]))
    b, damping = torch.ones(2, 3, 2, 1), torch.tensor([[3.0], [1.0]])
    a.requires_grad_(follow)
    with pytest.raises(SingularMatrixError) as info:
        solve(a, b, damping)
    assert str(info.value) == (
        "A + 1 I is not positive definite (matrix 4 of 6): pivot 2 of 2 failed; the smallest "
        "damping that works is about 2"
    )
    assert (info.value.pivot, info.value.index) == (2, 4)
    assert solve(a, b, torch.tensor([[3.0], [info.value.smallest_damping]])).isfinite().all()
    x = solve(a, b, damping, check=False)
    assert x.isnan().flatten(-2).all(dim=-1).tolist() == [[False] * 3, [False, True, True]]
    with pytest.raises(SingularMatrixError, match="matrix 1 of 3"):
        torch.func.vmap(lambda a: solve(a, b[0, 0], 1.0))(a)
    with pytest.raises(SingularMatrixError, match="pivot 2 of 2"):
        solve(a[1], b[:, 0], 1.0)
    lower = torch.tensor([[1.0, 0.0], [9.0, 1.0]]).requires_grad_(follow)
    assert solve(lower, b[0, 0], 0.0).flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("follow", [False, True], ids=["plain", "followed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(follow, value):
    a, b, damping = operands((3,), (3,), (3, 4))
    for i, name in enumerate(("A", "b", "damping")):
        given = [a.clone(), b.clone(), damping.clone()]
        given[i].view(3, -1)[1, -1] = value
        given[0].requires_grad_(follow)
        message = "damping=.* of matrix 1 must be finite" if i == 2 else f"{name} is not finite"
        with pytest.raises(InputError, match=message):
            solve(*given)
        x = solve(*given, check=False)
        assert bool(x[1].isnan().any()) and bool(x[[0, 2]].isfinite().all())


@pytest.mark.parametrize("follow", [False, True], ids=["plain", "followed"])
def test_what_does_not_fit_is_refused(follow):
    a, b, damping = operands((3,), (3,), (3, 4))
    a.requires_grad_(follow)
    for given, message in (
        ((a, b[:2], damping), r"b's batch \(2,\) does not broadcast with \(3,\), of A"),
        ((a, b[:2, :, None], 1.0), r"b's batch \(2,\) does not broadcast"),
        ((a, b[:, :3], 1.0), r"b has shape \(3, 3\); expected \(3, 4\)"),
        ((a[0], b[..., None], -damping), r"damping=-0.01 of matrix 0 must be finite and >= 0"),
        ((a, torch.tensor(1.0, dtype=torch.float64), 1.0), r"b has shape \(\); expected \(3, 4\)"),
        ((a, b.float(), damping), "b is torch.float32, A is torch.float64"),
        ((a, b, damping[:2]), r"damping has shape \(2,\), which does not broadcast.*\(3,\)"),
        ((a, b, damping > 0), "damping is torch.bool"),
        ((a, b, damping.to("meta")), "damping is on the meta device"),
        ((a.bfloat16(), b.bfloat16(), 1.0), "A is torch.bfloat16; pass float32 or float64"),
        ((a[..., :3], b, 1.0), r"A has shape \(3, 4, 3\)"),
    ):
        with pytest.raises(InputError, match=message):
            solve(*given)
    with pytest.raises(InputError, match="check=1 must be True or False"):
        solve(a, b, damping, check=1)


def test_dampings_of_another_dtype_are_of_a_s():
    a, b, damping = operands((3,), (3,), (3, 4))
    expected = truth(a, b, torch.tensor([1.0, 2.0, 3.0]))
    for dtype in (torch.float32, torch.float64, torch.int64):
        torch.testing.assert_close(solve(a, b, torch.tensor([1, 2, 3], dtype=dtype)), expected)
    single = damping.float().requires_grad_()
    assert torch.autograd.grad(solve(a, b, single).sum(), single)[0].dtype == torch.float32


def test_what_needs_no_gradient_meets_no_operator(monkeypatch):
    a, b, damping = operands((3,), (3,), (3, 4))

    def refused(*_):
        raise AssertionError("an operator")

    monkeypatch.setattr(library, "factor", refused)
    for lam in (0.5, damping):
        solve(a, b, lam)
        with torch.no_grad():
            assert not solve(a.clone().requires_grad_(), b, lam).requires_grad
        with torch.inference_mode():
            solve(a.clone(), b, lam)
    with pytest.raises(AssertionError, match="an operator"):
        solve(a, b.requires_grad_(), 0.5)
