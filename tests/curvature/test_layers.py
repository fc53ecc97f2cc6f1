"""Curvatures of inner layers: against dense float64 matrices built by autograd."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import Pieces
from dense_layers import MLP, Attention, Convolutional, dense
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.curvature import gauss_newton
from imu_fast.errors import InputError
from imu_fast.factors import source

NAMES = ("kfac", "ekfac", "ggn_block", "ggn")


def made(model, dtype=torch.float64):
    torch.manual_seed(0)
    return model().to(dtype).eval()


def flat(n=7, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


def images(n=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 4, 4, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def texts(n=4, length=4):
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(5, (2, n, length), generator=generator)
    labels[0, :2] = labels[1, 3] = labels[2, 1:] = -100
    return ids, labels


def cross_entropy(z, y):
    return F.cross_entropy(z, y)


MODELS = {
    "mlp": (MLP, flat, ["a", "b", "c"], {}),
    "attention": (Attention, texts, ["qkv", "out", "up", "fc"], {"shift": False}),
    "convolution": (Convolutional, images, ["conv", "fc"], {}),
}


def batches(x, y, dtype, size=3):
    x = x.to(dtype) if x.is_floating_point() else x
    return list(zip(x.split(size), y.split(size), strict=True))


def matrix_of(name, truth, fitted):
    if name == "ekfac":
        q = torch.kron(fitted.basis_out, fitted.basis_in)
        return q @ torch.diag((q.T @ truth.ggn @ q).diagonal()) @ q.T
    return {"kfac": truth.kfac, "ggn_block": truth.blocks, "ggn": truth.ggn}[name]


def columns(fitted):
    classes, width = fitted.shape
    basis = torch.eye(classes * width, dtype=torch.float64).view(-1, classes, width)
    return (fitted @ basis).flatten(1)


def same(found, truth, bound):
    error = float((found - truth).norm() / truth.norm())
    assert error <= bound, f"{error:.3g} is above {bound:.3g}"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_all_linear_layers_are_their_dense_matrices(kind, dtype):
    make, data, layers, how = MODELS[kind]
    model, (x, y) = made(make, dtype), data()
    factors = imu.capture(model, batches(x, y, dtype), layers, fisher="exact", **how)
    samples = [(x[i : i + 1], y[i]) for i in range(len(x))]
    bound = 1e-5 if dtype == torch.float32 else 1e-9
    for layer, f in zip(layers, factors, strict=True):
        truth = dense(model, layer, samples, cross_entropy)
        for name in NAMES:
            fitted = imu.fit(name, f, damping=0.3, damping_mode="relative")
            matrix = matrix_of(name, truth, fitted)
            lam = 0.3 * float(matrix.trace()) / len(matrix)
            assert abs(fitted.damping - lam) <= bound * lam
            damped = matrix + lam * torch.eye(len(matrix)).double()
            same(columns(fitted), damped, bound)
            same(fitted.diagonal().flatten(), damped.diagonal(), bound)
            v = torch.randn(3, *fitted.shape, dtype=torch.float64)
            solved = torch.linalg.solve(damped, v.flatten(1).T).T.view_as(v)
            # The matrix's error, magnified by its condition.
            condition = float(torch.linalg.matrix_norm(damped, 2)) / lam
            same(fitted.solve(v), solved, bound * condition)


@pytest.mark.parametrize("solver", ["primal", "dual", "cg"])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_every_solver_of_the_ggn_of_a_layer(kind, solver, tmp_path):
    make, data, layers, how = MODELS[kind]
    model, (x, y) = made(make), data()
    factors = imu.capture(model, batches(x, y, torch.float64), layers[0], fisher="exact", **how)
    truth = dense(model, layers[0], [(x[i : i + 1], y[i]) for i in range(len(x))], cross_entropy)
    damped = truth.ggn + 0.01 * torch.eye(len(truth.ggn)).double()
    for preconditioner in ("kfac", "none") if solver == "cg" else ("auto",):
        own = {"solver": solver, "tolerance": 1e-10, "preconditioner": preconditioner}
        fitted = imu.fit("ggn", factors, damping=0.01, **own)
        v = torch.randn(2, *fitted.shape, dtype=torch.float64)
        found = fitted.solve(v)
        same(found, torch.linalg.solve(damped, v.flatten(1).T).T.view_as(v), 1e-7)
        assert fitted.residual <= 1e-10
    fitted.save(tmp_path / "m")
    again = imu.load_operator(tmp_path / "m")
    assert torch.equal(again.solve(v), found) and torch.equal(again @ v, fitted @ v)


@pytest.mark.parametrize("name", NAMES)
def test_scores_pairs_and_files_of_layers(name, tmp_path):
    make, data, layers, how = MODELS["attention"]
    model, (x, y) = made(make), data()
    loader = batches(x, y, torch.float64)
    factors = imu.capture(model, loader, layers, fisher="exact", **how)
    plain = imu.capture(model, loader, layers, **how)
    given = {"curvature": name, "damping": 0.05}
    total, own = 0, 0
    for f in factors:
        fitted = imu.fit(name, f, damping=0.05)
        basis = torch.eye(f.num_classes * f.width).double().view(-1, f.num_classes, f.width)
        g = torch.stack([f.samples(i, i + 1).mean_gradient().flatten() for i in range(f.n)])
        solved = fitted.solve(basis).flatten(1) @ g.T
        total, own = total - g @ solved, own + (g.T * solved).sum(dim=0)
        fitted.save(tmp_path / f.name)
        again = imu.load_operator(tmp_path / f.name)
        assert torch.equal(again.solve(basis), fitted.solve(basis))
    torch.testing.assert_close(imu.pairwise_influence(factors, plain, **given), total)
    torch.testing.assert_close(imu.influence_scores(factors, **given), total.mean(dim=1))
    torch.testing.assert_close(imu.self_influence(factors, **given), own)
    direct = imu.influence_scores(model, loader, layers=layers, fisher="exact", **given, **how)
    torch.testing.assert_close(direct, total.mean(dim=1))
    kept = imu.GradientFactors.load(_saved(factors[0], tmp_path))
    assert torch.equal(columns(imu.fit(name, kept)), columns(imu.fit(name, factors[0])))


def _saved(f, folder):
    f.save(folder / "factors")
    return folder / "factors"


@pytest.mark.parametrize(
    ("loss", "labels", "truth"),
    [
        ("squared_error", torch.randn(5, 2), lambda z, y: (z - y).square().sum()),
        (
            "binary_cross_entropy",
            torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0], [0, 1]]),
            lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
        ),
    ],
)
def test_other_losses(loss, labels, truth):
    torch.manual_seed(0)
    model, x = MLP(outputs=2).double(), torch.randn(5, 4).double()
    labels = labels.double()
    f = imu.capture(model, (x, labels), "a", loss=loss, fisher="exact")
    drawn = imu.capture(model, (x, labels), "a", loss=loss, fisher="sampled", draws=200)
    samples = [(x[i : i + 1], labels[i]) for i in range(5)]
    matrix = dense(model, "a", samples, truth).ggn
    for factors, bound in ((f, 1e-6), (drawn, 0.3)):
        fitted = imu.fit("ggn", factors, damping=1e-9)
        same(columns(fitted), matrix, bound)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_drawn_labels_have_the_exact_matrix_as_their_mean(kind):
    make, data, layers, how = MODELS[kind]
    model, (x, y) = made(make), data()
    truth = dense(model, layers[0], [(x[i : i + 1], y[i]) for i in range(len(x))], cross_entropy)
    errors = []
    for draws in (20, 180):
        f = imu.capture(
            model,
            [(x.double() if kind == "mlp" else x, y)],
            layers[0],
            fisher="sampled",
            draws=draws,
            seed=3,
            **how,
        )
        found = columns(imu.fit("ggn", f, damping=1e-9))
        errors.append(float((found - truth.ggn).norm() / truth.ggn.norm()))
    # One over the root of the draws: a third, within a factor of two.
    assert errors[1] < 0.35 and errors[1] < 2 / 3 * errors[0]


def test_a_draw_is_a_label_whatever_the_batches():
    model, (x, y) = made(MLP), flat()
    x = x.double()
    given = {"fisher": "sampled", "draws": 3, "seed": 5}
    whole = imu.capture(model, [(x, y)], "c", **given)
    pieces = imu.capture(model, batches(x, y, torch.float64, 2), "c", **given)
    torch.testing.assert_close(pieces.curvature.s, whole.curvature.s)
    again = imu.capture(model, [(x, y)], "c", **given)
    assert torch.equal(again.curvature.s, whole.curvature.s)
    other = imu.capture(model, [(x, y)], "c", **(given | {"seed": 6}))
    assert not torch.equal(other.curvature.s, whole.curvature.s)
    p = torch.softmax(model(x), dim=1).detach()
    left = p[:, None] - whole.curvature.s * 3**0.5  # one-hot rows
    onehot = F.one_hot(left.argmax(dim=2), 3).double()
    torch.testing.assert_close(left, onehot)
    with_none = imu.capture(model, [(x, y)], "c")
    assert torch.equal(with_none.delta, whole.delta) and with_none.curvature is None


def test_the_empirical_fisher_is_the_one_of_the_labels():
    make, data, _, how = MODELS["attention"]
    model, (x, y) = made(make), data()
    f = imu.capture(model, [(x, y)], "qkv", **how)
    truth = imu.fit("fisher", f, damping=0.1)
    same(columns(imu.fit("ggn", f, damping=0.1, fisher="empirical")), columns(truth), 1e-12)
    diagonal = imu.fit("ekfac", f, damping=0.1, fisher="empirical")
    q = torch.kron(diagonal.basis_out, diagonal.basis_in)
    undamped = columns(truth) - 0.1 * torch.eye(len(q)).double()
    same(diagonal.damped.flatten() - 0.1, (q.T @ undamped @ q).diagonal(), 1e-9)
    head = imu.capture(model, [(x, y)], **how)
    same(columns(imu.fit("ggn", head, fisher="empirical")), columns(imu.fit("fisher", head)), 1e-12)


def test_what_cannot_be_in_memory_is_solved_without(monkeypatch):
    """By the dual where that is the cheapest, of factors elsewhere only up to MAX_GATHERED."""
    f = imu.capture(made(MLP), [flat(n=2)[0].double(), flat(n=2)[1]], "a", fisher="sampled")
    v = torch.linspace(-1, 1, f.num_classes * f.width).double().view(f.num_classes, f.width)
    spec = imu.GGN(damping=0.1, tolerance=1e-12)
    truth = imu.fit(spec, f).solve(v)
    dual = imu.fit(imu.GGN(damping=0.1, tolerance=1e-12, solver="dual"), Pieces(f, 1))
    same(dual.solve(v), truth, 1e-10)
    monkeypatch.setattr(source, "MAX_GATHERED", 1)
    same(imu.fit(spec, Pieces(f, 1)).solve(v), truth, 1e-10)
    with pytest.raises(InputError, match="solver='dual' needs all factors in memory"):
        dual = imu.fit(imu.GGN(damping=0.1, solver="dual"), Pieces(f, 1))
        dual.solve(v)


def test_what_does_not_fit_is_refused():
    model, (x, y) = made(MLP), flat()
    data = (x.double(), y)
    plain, head = imu.capture(model, data, "a"), imu.capture(model, data)
    drawn = imu.capture(model, data, "a", fisher="sampled")
    for name in NAMES:
        with pytest.raises(InputError, match="'a' have no curvature.*fisher='sampled'"):
            imu.influence_scores(plain, curvature=name)
        with pytest.raises(InputError, match="fisher='exact'.*captured with fisher='sampled'"):
            imu.fit(name, drawn, fisher="exact")
        with pytest.raises(InputError, match="fisher='sampled'.*have no drawn labels"):
            imu.fit(name, head, fisher="sampled")
        imu.fit(name, head, fisher="exact")
    for given, match in (
        ({"fisher": "empirical"}, "fisher='empirical'"),
        ({"fisher": "exact", "draws": 3}, "draws=3 is of fisher='sampled'"),
        ({"seed": 3}, "seed=3 is of fisher='sampled'"),
        ({"fisher": "sampled", "draws": 0}, "draws=0"),
        ({"fisher": "sampled", "seed": 2**70}, "seed=.*2\\^32"),
    ):
        with pytest.raises(InputError, match=match):
            imu.capture(model, data, "a", **given)
    with pytest.raises(InputError, match="fisher='exact' with layers='head'"):
        imu.capture(model, data, fisher="exact")
    wide = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1025)).double()
    with pytest.raises(InputError, match="1 positions times 1025 outputs.*fisher='sampled'"):
        imu.capture(wide, data, "0", fisher="exact")
    with pytest.raises(InputError, match="needs layers='head'"):
        imu.fit("kfac", head.samples(0, 2)) and drawn.curvature.resolved(None, None, None)


@pytest.mark.parametrize("name", NAMES)
def test_a_damping_below_rounding_is_said_once(name, caplog):
    model, (x, y) = made(MLP, torch.float32), flat(n=2)  # of rank 2, an order of 30
    f = imu.capture(model, (x, y), "b", fisher="sampled")
    gauss_newton._said.clear()
    with caplog.at_level(logging.WARNING, "imu_fast"):
        imu.fit(name, f, damping=1e-3)
        assert not caplog.records
        imu.fit(name, f, damping=1e-14)
        imu.fit(name, f, damping=1e-14)
    (record,) = caplog.records
    assert "damping 1e-14 is below the rounding" in record.getMessage()
    assert "'b'" in record.getMessage()


@pytest.mark.parametrize("size", [4, 8], ids=["by group", "by column"])
def test_a_layer_of_several_groups(size):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 2, groups=2)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(4 * (size - 1) ** 2, 3)).double()
    data = torch.randn(3, 2, size, size).double(), torch.tensor([0, 1, 2])
    f = imu.capture(model, data, "0")
    truth = columns(imu.fit("fisher", f))
    same(columns(imu.fit("ggn", f, fisher="empirical")), truth, 1e-12)
    width = f.width
    blocks = torch.block_diag(*[torch.ones(width, width).double()] * 4)
    same(columns(imu.fit("ggn_block", f, fisher="empirical")), truth * blocks, 1e-12)
    for name in ("kfac", "ekfac"):
        with pytest.raises(InputError, match="'0' has several groups"):
            imu.fit(name, f, fisher="empirical")
    for name in NAMES:
        with pytest.raises(InputError, match="'0': a layer of several groups has no"):
            imu.fit(name, f)
    with pytest.raises(InputError, match="'0' has 2 groups.*fisher='sampled'"):
        imu.capture(model, data, "0", fisher="sampled")
    wanted = imu.pairwise_influence(f, f, curvature="fisher_diag")
    torch.testing.assert_close(imu.pairwise_influence(f, f), wanted)
