"""Every loss under every curvature and solver, against dense float64 autograd of torch's losses.

The sample losses are torch's functions, their gradients autograd's, the second derivatives in the
outputs torch's Hessians, and the curvatures dense matrices of these. ``python
tests/losses/test_every_loss.py`` prints the errors.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import hessian, vmap
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import InputError
from imu_fast.factors.probabilities import output_curvature

N, D, CLASSES, LAM = 60, 40, 5, 1e-3
WEIGHTS = (0.5, 2.0, 1.0, 0.0, 3.0)
POSITIVE = (0.5, 2.0, 1.0, 4.0, 3.0)


def hard(n, outputs):
    return torch.randint(outputs, (n,))


def soft(n, outputs):
    return torch.softmax(2 * torch.randn(n, outputs), dim=1)


def binary(n, outputs):
    return torch.randint(2, (n, outputs))


def fractions(n, outputs):
    return torch.rand(n, outputs)


def real(n, outputs):
    return 5 * torch.randn(n, outputs)


def ce(z, y, **options):
    return F.cross_entropy(z, y if y.dim() == 0 else y.double(), reduction="sum", **options)


def ce_weighted(**options):
    def loss(z, y):
        weight = torch.tensor(WEIGHTS, dtype=torch.float64)
        return ce(z, y, weight=weight, **options)

    return loss


def bce(reduction, v=None):
    def loss(z, y):
        weight = None if v is None else torch.tensor(v, dtype=torch.float64)
        return F.binary_cross_entropy_with_logits(
            z, y.double(), pos_weight=weight, reduction=reduction
        )

    return loss


def mse(reduction):
    return lambda z, y: F.mse_loss(z, y.double().view_as(z), reduction=reduction)


CE, BCE, SE = imu.CrossEntropy, imu.BinaryCrossEntropy, imu.SquaredError
# What it is called: ours, torch's of one token, labels, outputs.
LOSSES = {
    "hard": (CE(), ce, hard, CLASSES),
    "two classes": (CE(), ce, hard, 2),
    "smoothed": (
        CE(label_smoothing=0.1),
        lambda z, y: ce(z, y, label_smoothing=0.1),
        hard,
        CLASSES,
    ),
    "weighted": (CE(class_weights=WEIGHTS), ce_weighted(), hard, CLASSES),
    "soft": (CE(), ce, soft, CLASSES),
    "soft, smoothed, weighted": (
        CE(label_smoothing=0.2, class_weights=torch.tensor(WEIGHTS)),
        ce_weighted(label_smoothing=0.2),
        soft,
        CLASSES,
    ),
    "hard, smoothed, weighted": (
        CE(label_smoothing=0.2, class_weights=WEIGHTS),
        ce_weighted(label_smoothing=0.2),
        hard,
        CLASSES,
    ),
    "one binary output": (BCE(), bce("sum"), binary, 1),
    "many binary outputs": (BCE(pos_weight=POSITIVE), bce("sum", POSITIVE), binary, CLASSES),
    "mean of fractions": (BCE(pos_weight=3.0, reduction="mean"), bce("mean", 3.0), fractions, 5),
    "one real output": (SE(), mse("sum"), real, 1),
    "mean of real outputs": (SE(reduction="mean"), mse("mean"), real, CLASSES),
}
CURVATURE = {
    "identity": imu.Identity(),
    "fisher_diag": imu.FisherDiag(damping=LAM),
    "fisher_diag, clamped": imu.FisherDiag(damping=LAM, damping_mode="clamp"),
    "fisher": imu.Fisher(damping=LAM, tolerance=1e-9),
    "ggn, primal": imu.GGN(damping=LAM, solver="primal"),
    "ggn, dual": imu.GGN(damping=LAM, solver="dual"),
    "ggn, cg": imu.GGN(damping=LAM, solver="cg"),
    "ggn, cg without kfac": imu.GGN(damping=LAM, solver="cg", preconditioner="none"),
    "ggn": imu.GGN(damping=LAM),
    "ggn_block": imu.GGNBlock(damping=LAM),
    "kfac": imu.KFAC(damping=LAM),
    "ekfac": imu.EKFAC(damping=LAM),
}
every_loss = pytest.mark.parametrize("which", LOSSES)
every_curvature = pytest.mark.parametrize("name", CURVATURE)


def problem(which, tokens=False, seed=0):
    """features, weight, bias (float32), labels, offsets."""
    torch.manual_seed(seed)
    _, _, labels, outputs = LOSSES[which]
    counts = torch.tensor([0, 1, 3, 2, 1, 5, 1, 2] * 4) if tokens else torch.ones(N).long()
    size = int(counts.sum())
    x, w, b = torch.randn(size, D), torch.randn(outputs, D), torch.randn(outputs)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return x, w, b, labels(size, outputs), offsets


def truth_of(which, x, w, b, y, offsets):
    """G [n, C, D], tokens' Hessians of sample losses [N, C, C], losses [n], c_t [N], a~ [N, D]."""
    loss = LOSSES[which][1]
    x, w, b = x.double(), w.double(), b.double()
    counts = offsets.diff()
    scale = torch.repeat_interleave(1.0 / counts.clamp_min(1).double(), counts)
    z = (x @ w.T + b).requires_grad_()
    each = torch.stack([c * loss(row, label) for c, row, label in zip(scale, z, y, strict=True)])
    delta = torch.autograd.grad(each.sum(), z)[0]
    a = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    g = torch.zeros(len(counts), len(w), a.shape[1]).double()
    g.index_add_(0, owner, delta[:, :, None] * a[:, None])
    losses = torch.zeros(len(counts)).double().index_add_(0, owner, each.detach())
    b_t = vmap(hessian(loss))(z.detach(), y) * scale[:, None, None]
    return g, b_t, losses, scale, a


def matrix_of(spec, g, b, scale, a, q=None):
    """The curvature as a dense matrix [P, P]."""
    n, (classes, width) = len(g), g.shape[1:]
    flat, lam = g.flatten(1), getattr(spec, "damping", 0.0)
    eye = torch.eye(classes * width, dtype=torch.float64)
    if spec.name == "identity":
        return eye
    if spec.name == "fisher_diag":
        diagonal = flat.square().mean(dim=0)
        clamped = spec.damping_mode == "clamp"
        return (diagonal.clamp_min(lam) if clamped else diagonal + lam).diag()
    if spec.name == "fisher":
        return flat.T @ flat / n + lam * eye
    if spec.name == "kfac":
        moment = torch.einsum("t,td,te->de", scale, a, a) / scale.sum()
        return torch.kron(b.sum(dim=0) / n, moment) + lam * eye
    full = torch.einsum("tce,td,tf->cdef", b, a, a).reshape(len(eye), -1) / n
    if spec.name == "ggn":
        return full + lam * eye
    if spec.name == "ggn_block":
        blocks = torch.block_diag(*[torch.ones(width, width).double()] * classes)
        return full * blocks + lam * eye
    assert spec.name == "ekfac"
    return q @ torch.diag((q.T @ full @ q).diagonal() + lam) @ q.T


def error(which, name, tokens=False, seed=0):
    x, w, b, y, offsets = problem(which, tokens, seed)
    f = imu.GradientFactors.from_head(x, w, b, y, offsets, loss=LOSSES[which][0])
    g, hessians, losses, scale, a = truth_of(which, x, w, b, y, offsets)
    spec, q = CURVATURE[name], None
    if spec.name == "ekfac":  # its basis is not unique where eigenvalues meet
        fitted = imu.fit(spec, f)
        q = torch.kron(fitted.basis_out, fitted.basis_in)
    x = torch.linalg.solve(matrix_of(spec, g, hessians, scale, a, q), g.mean(dim=0).flatten())
    truth = -(g.flatten(1) @ x)
    found = imu.influence_scores(f, curvature=spec).double()
    return float((found - truth).norm() / truth.norm()), f, losses


@every_loss
@every_curvature
@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
def test_scores_from_float32_are_right_to_1e5(which, name, tokens):
    off, f, losses = error(which, name, tokens)
    assert f.dtype == torch.float32
    assert off <= 1e-5
    torch.testing.assert_close(f.losses.double(), losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["ggn, primal", "ggn, dual", "ggn, cg", "ggn_block"])
def test_an_ill_conditioned_solve_is_as_right(name, seed):
    """60 samples, d = 40, C = 5, weights drawn normal, damping 1e-3: condition 560."""
    assert error("hard", name, seed=seed)[0] <= 2e-6


@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
def test_an_implicit_head_is_as_right_and_of_plain_labels_alone(tokens):
    x, w, b, y, offsets = problem("hard", tokens)
    f = imu.GradientFactors.from_head(x, w, b, y, offsets, implicit=True)
    g, hessians, _, scale, a = truth_of("hard", x, w, b, y, offsets)
    for name in ("ggn", "ggn_block", "kfac"):
        spec = CURVATURE[name]
        matrix = matrix_of(spec, g, hessians, scale, a)
        truth = -(g.flatten(1) @ torch.linalg.solve(matrix, g.mean(dim=0).flatten()))
        found = imu.influence_scores(f, curvature=spec).double()
        assert float((found - truth).norm() / truth.norm()) <= 1e-5
    for loss, labels in (
        (CE(label_smoothing=0.1), y),
        (CE(class_weights=WEIGHTS), y),
        (CE(), soft(len(x), CLASSES)),
        (BCE(), binary(len(x), CLASSES)),
    ):
        with pytest.raises(InputError, match="implicit=True is of loss='cross_entropy', plain"):
            imu.GradientFactors.from_head(x, w, b, labels, offsets, loss=loss, implicit=True)


@every_loss
def test_curvature_in_the_outputs_is_torchs_hessian(which):
    x, w, b, y, offsets = problem(which, tokens=True)
    f = imu.GradientFactors.from_head(
        x.double(), w.double(), b.double(), y, offsets, loss=LOSSES[which][0]
    )
    g, truth, losses, *_ = truth_of(which, x, w, b, y, offsets)
    found = output_curvature(f)
    close = dict(rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found.diagonal(), truth.diagonal(dim1=1, dim2=2), **close)
    q = torch.linalg.qr(torch.randn(len(w), len(w), dtype=torch.float64))[0]
    rotated = (q.T @ truth @ q).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.diagonal_in(q), rotated, **close)
    torch.testing.assert_close(found.sum(torch.float64), truth.sum(dim=0), **close)
    root = found.root()
    root = torch.diag_embed(root) if root.dim() == 2 else root
    torch.testing.assert_close(root @ root.mT, truth, **close)
    size = truth.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert bool((found.size() >= size * (1 - 1e-12)).all())
    norms = torch.linalg.matrix_norm(truth, 2)
    assert bool((found.size() >= 2 * norms * (1 - 1e-12)).all())
    torch.testing.assert_close(f.losses, losses, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(f.mean_gradient(), g.mean(dim=0), rtol=1e-12, atol=1e-13)


@every_loss
def test_what_is_kept_travels(which, tmp_path):
    """Through files, selections, slices, chunks, shares and casts."""
    x, w, b, y, offsets = problem(which, tokens=True)
    ours = LOSSES[which][0]
    f = imu.GradientFactors.from_head(x, w, b, y, offsets, loss=ours)
    small = imu.GradientFactors.from_head(x, w, b, y, offsets, loss=ours, chunk_size=3)
    f.save(tmp_path / "f")
    loaded = imu.GradientFactors.load(tmp_path / "f")
    assert loaded.loss == ours and type(loaded.curvature) is type(f.curvature)

    def scores(f, name="ggn_block"):
        return imu.influence_scores(f, curvature=name, damping=LAM)

    expected = scores(f)
    assert torch.equal(scores(loaded), expected)
    torch.testing.assert_close(scores(small), expected, rtol=1e-4, atol=1e-6)
    kept = [3, 0, 9, 10]
    start = offsets.tolist()
    rows = torch.cat([torch.arange(start[i], start[i + 1]) for i in kept])
    cut = torch.cat([torch.zeros(1).long(), offsets.diff()[kept].cumsum(0)])
    fresh = imu.GradientFactors.from_head(x[rows], w, b, y[rows], cut, loss=ours)
    torch.testing.assert_close(
        scores(f.select(torch.tensor(kept))), scores(fresh), rtol=1e-4, atol=1e-6
    )
    part = f.samples(5, 12)
    again = f.select(torch.arange(5, 12))
    assert torch.equal(scores(part), scores(again))
    assert torch.equal(scores(f.shard(1, 2)), scores(f.samples(16, 32)))
    torch.testing.assert_close(
        scores(f.to(dtype=torch.float64)).float(), expected, rtol=1e-4, atol=1e-6
    )


CONFIDENT = {
    "label": (CE(), torch.tensor([0])),
    "the other label": (CE(), torch.tensor([1])),
    "soft": (CE(), torch.tensor([[1.0, 0.0]]).double()),
    "soft, the other": (CE(), torch.tensor([[0.0, 1.0]]).double()),
    "weighted": (CE(class_weights=(2.0, 2.0)), torch.tensor([0])),
}


@pytest.mark.parametrize("case", CONFIDENT)
@every_curvature
def test_one_confident_sample_to_1e10(case, name):
    """Logits 30 and 0: B is ``w q (1 - q)`` times [[1, -1], [-1, 1]], with q = 1 / (1 + e^30)."""
    loss, label = CONFIDENT[case]
    weight = 2.0 if case == "weighted" else 1.0
    x, w = torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[15.0, 0.0], [0.0, 0.0]]).double()
    f = imu.GradientFactors.from_head(x, w, None, label, loss=loss)
    q = torch.sigmoid(torch.tensor(-30.0).double())
    signed = torch.tensor([1.0, -1.0]).double()
    delta = weight * signed * (1 - q if "other" in case else -q)
    torch.testing.assert_close(f.delta[0], delta, rtol=1e-10, atol=0)
    b = weight * q * (1 - q) * torch.outer(signed, signed)
    # Damped as little as the curvature is large, so that all of its digits count.
    lam = float(b[0, 0])
    options = {"damping": lam, "tolerance": 1e-13}
    spec = CURVATURE[name]
    given = {k: v for k, v in spec.flat().items() if k not in options}
    spec = CURVATURES.choose(
        spec.name, **given | {k: v for k, v in options.items() if k in spec.paths()}
    )
    g = delta[:, None] * x
    fitted = imu.fit(spec, f)
    if spec.name == "ekfac":
        q = torch.kron(fitted.basis_out, fitted.basis_in)
    matrix = matrix_of(spec, g[None], b[None], torch.ones(1).double(), x, q)
    truth = torch.linalg.solve(matrix, g.flatten()) @ g.flatten()
    for found in (-imu.influence_scores(f, curvature=spec), fitted.self_influence(f)):
        torch.testing.assert_close(found[0], truth, rtol=1e-10, atol=0)
    identity = torch.eye(4, dtype=torch.float64).view(4, 2, 2)
    torch.testing.assert_close((fitted @ identity).flatten(1), matrix, rtol=1e-10, atol=1e-10 * lam)


FORMS = {
    "dense": lambda b: imu.OutputCurvature.dense(b),
    "tensor": lambda b: b,
    "diagonal": lambda b: imu.OutputCurvature.diagonal_of(b.diagonal(dim1=1, dim2=2)),
    "tensor of diagonals": lambda b: b.diagonal(dim1=1, dim2=2),
}


@pytest.mark.parametrize("form", [*FORMS, "softmax"])
@every_curvature
def test_the_callers_own_delta_and_curvature(form, name, tmp_path):
    torch.manual_seed(0)
    counts = torch.tensor([2, 0, 1, 4, 3] * 6)
    offsets = torch.cat([torch.zeros(1).long(), counts.cumsum(0)])
    size = int(counts.sum())
    delta, act = torch.randn(size, 4), torch.randn(size, 7)
    if form == "softmax":
        p, weight = torch.softmax(torch.randn(size, 4), dim=1), torch.rand(size)
        given = imu.OutputCurvature.softmax(p, weight)
        wide = p.double() / p.double().sum(dim=1, keepdim=True)
        b = torch.diag_embed(wide) - wide[:, :, None] * wide[:, None]
        b = weight.double()[:, None, None] * b
    else:
        root = torch.randn(size, 4, 2)
        b = root @ root.mT
        b = (b + b.mT) / 2
        given = FORMS[form](b)
        b = b.double()
        if "diagonal" in form:
            b = torch.diag_embed(b.diagonal(dim1=1, dim2=2))
    f = imu.GradientFactors(delta, act, offsets, True, curvature=given)
    f.save(tmp_path / "f")
    f = imu.GradientFactors.load(tmp_path / "f")
    a = torch.cat([act.double(), torch.ones(size, 1).double()], dim=1)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    g = torch.zeros(len(counts), 4, 8).double()
    g.index_add_(0, owner, delta.double()[:, :, None] * a[:, None])
    scale = torch.repeat_interleave(1.0 / counts.clamp_min(1).double(), counts)
    spec, q = CURVATURE[name], None
    fitted = imu.fit(spec, f)
    if spec.name == "ekfac":
        q = torch.kron(fitted.basis_out, fitted.basis_in)
    matrix = matrix_of(spec, g, b, scale, a, q)
    solved = torch.linalg.solve(matrix, g.flatten(1).T)
    for found, truth in (
        (imu.influence_scores(f, curvature=spec), -(g.flatten(1) @ solved.mean(dim=1))),
        (fitted.self_influence(f), (g.flatten(1).T * solved).sum(dim=0)),
        (fitted.pairwise(f, f)[3], g[3].flatten() @ solved),
    ):
        assert float((found.double() - truth).norm() / truth.norm()) <= 1e-5


def test_labels_that_are_not_there():
    x, w = torch.randn(6, 3).double(), torch.randn(2, 3).double()
    y = torch.tensor([[0, 1], [-100, 1], [-100, -100], [1, 0], [0, -100], [1, 1]])
    for reduction in ("sum", "mean"):
        f = imu.GradientFactors.from_head(x, w, None, y, loss=BCE(reduction=reduction))
        assert f.empty_samples.tolist() == [2] and f.n == 6
        each = F.binary_cross_entropy_with_logits(
            x @ w.T, y.clamp_min(0).double(), reduction="none"
        )
        each = each * (y != -100)
        there = (y != -100).sum(dim=1).clamp_min(1) if reduction == "mean" else 1
        torch.testing.assert_close(f.losses, each.sum(dim=1) / there)
    soft_labels = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0]])
    f = imu.GradientFactors.from_head(x[:3], w, None, soft_labels)
    assert f.empty_samples.tolist() == [1]
    given = BCE(ignore_index=7)
    f = imu.GradientFactors.from_head(x[:2, :], w[:1], None, torch.tensor([7, 1]), loss=given)
    assert f.empty_samples.tolist() == [0]


def test_labels_of_one_output_have_two_shapes_and_any_dtype():
    x, w = torch.randn(4, 3), torch.randn(1, 3)
    y = torch.tensor([0, 1, 1, 0])
    for loss in (BCE(), SE()):
        expected = imu.GradientFactors.from_head(x, w, None, y, loss=loss)
        for labels in (y[:, None], y.bool(), y.half(), y.double()[:, None], y.to(torch.int8)):
            found = imu.GradientFactors.from_head(x, w, None, labels, loss=loss)
            assert torch.equal(found.delta, expected.delta)


def test_refusals():
    x, w, y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    head = imu.GradientFactors.from_head
    soft_labels = torch.full((2, 4), 0.25)
    for labels, loss, message in (
        (y, BCE(), r"labels has shape \(2,\); binary_cross_entropy of 4 outputs takes \[N, 4\]"),
        (y[:, None], SE(), r"squared_error of 4 outputs takes \[N, 4\]"),
        (2 * soft_labels + 1, BCE(), r"labels\[0\] has 1.5 for output 0.*ignore_index=-100"),
        (soft_labels * torch.nan, SE(), r"labels\[0\] is not finite"),
        (2 * soft_labels, CE(), r"labels\[0\] is no row of probabilities"),
        (soft_labels - 1, CE(), r"labels\[0\] is no row of probabilities"),
        (soft_labels.long(), CE(), r"pass class indices \[N\], or probabilities \[N, 4\]"),
        (y.double(), CE(), "labels have dtype torch.float64"),
        (y, CE(class_weights=[1.0]), "class_weights has 1 numbers; the head has 4 classes"),
        (soft_labels, BCE(pos_weight=[1.0, 2.0]), "pos_weight has 2 numbers; the head has 4"),
    ):
        with pytest.raises(InputError, match=message):
            head(x, w, None, labels, loss=loss)
    for make, message in (
        (lambda: CE(label_smoothing=1.5), r"label_smoothing=1.5 must be in \[0, 1\]"),
        (lambda: CE(class_weights=[-1.0]), "class_weights=.*not negative"),
        (lambda: CE(class_weights="no"), "class_weights='no'; pass finite numbers"),
        (lambda: BCE(pos_weight=torch.inf), "pos_weight=inf; pass finite numbers"),
        (lambda: BCE(reduction="none"), "reduction='none'"),
        (lambda: BCE(ignore_index=1), "ignore_index=1 is a label"),
        (lambda: SE(reduction="batchmean"), "reduction='batchmean'"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    delta, act, offsets = torch.randn(2, 4), torch.randn(2, 3), torch.arange(3)
    for curvature, message in (
        (torch.randn(2, 4, 4), r"curvature\[0\] is not symmetric"),
        (-torch.eye(4).expand(2, 4, 4), r"curvature\[0\] is indefinite"),
        (-torch.ones(2, 4), r"curvature\[0\] is negative"),
        (torch.ones(3, 4), r"curvature has h \(3, 4\), delta is \(2, 4\)"),
        (torch.ones(2, 3), r"curvature has h \(2, 3\), delta is \(2, 4\)"),
        (torch.ones(2), "pass a tensor of 2 axes"),
        ("ggn", "curvature is a str; pass an imu.OutputCurvature"),
    ):
        with pytest.raises(InputError, match=message):
            imu.GradientFactors(delta, act, offsets, False, curvature=curvature)
    with pytest.raises(InputError, match=r"p\[0\] is no row of probabilities"):
        imu.OutputCurvature.softmax(torch.ones(2, 4))
    # Of a loss whose curvature delta does not tell.
    made = head(x, w, None, soft_labels, loss=BCE())
    bare = imu.GradientFactors(made.delta, act, offsets, False, soft_labels, loss=BCE())
    for name in ("ggn", "ggn_block", "kfac", "ekfac"):
        with pytest.raises(InputError, match="delta alone does not tell.*BinaryCrossEntropy"):
            imu.fit(name, bare)
    for name in ("identity", "fisher_diag", "fisher"):
        assert imu.influence_scores(bare, curvature=name).isfinite().all()


def test_outputs_that_do_not_meet_are_solved_block_by_block():
    """So that many outputs need no matrix of order C D."""
    x, w = torch.randn(50, 20), torch.randn(800, 20)
    f = imu.GradientFactors.from_head(x, w, None, binary(50, 800), loss=BCE())
    truth = imu.fit(imu.GGNBlock(damping=LAM), f).solve(f.mean_gradient())
    for solver in ("primal", "dual"):
        fitted = imu.fit(imu.GGN(damping=LAM, solver=solver), f)
        torch.testing.assert_close(fitted.solve(f.mean_gradient()), truth, rtol=1e-5, atol=1e-5)
    wide = imu.GradientFactors.from_head(
        torch.randn(3, 9000), torch.randn(1, 9000), None, binary(3, 1), loss=BCE()
    )
    with pytest.raises(InputError, match="needs a dense matrix of order 9000; use 'cg'"):
        imu.fit(imu.GGN(solver="primal"), wide)


if __name__ == "__main__":
    for which in LOSSES:
        errors = [f"{name} {error(which, name)[0]:.1e}" for name in CURVATURE]
        print(f"{which}: {', '.join(errors)}")
