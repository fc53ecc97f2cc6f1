"""What cross-entropy gives, against autograd, and how it travels with the factors."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from cases import CASES, assert_close, every_case, every_dtype, head_factors

import imu_fast as imu
from imu_fast import reference
from imu_fast.errors import InputError
from imu_fast.factors.probabilities import output_curvature, probabilities
from imu_fast.losses.named import LOSSES, LossName
from imu_fast.ops import symmetric


def dense(f):
    """``B_t`` of every token by autograd of the softmax: [N, C, C]."""
    p, weight = probabilities(f)
    jacobian = torch.autograd.functional.jacobian
    rows = zip(weight, p.log(), strict=True)
    return [w * jacobian(lambda z: torch.softmax(z, dim=0), row) for w, row in rows]


def test_the_static_names_are_the_tables():
    assert list(get_args(LossName)) == list(LOSSES)
    assert all(LOSSES[name].name == name for name in LOSSES)


@every_case
@every_dtype
def test_residual_and_probabilities(case, dtype):
    p = case.make(dtype)
    f = head_factors(case, dtype)
    logits = torch.nn.functional.linear(
        p.act.double(), p.weight.double(), None if p.bias is None else p.bias.double()
    )
    delta, losses = reference.softmax_residual(logits, p.labels, p.scale.double())
    # Logits are rounded at their size, which exponentials turn into a relative error.
    length = 16 + case.features * int(logits.abs().amax() + 1)
    assert_close(f.delta, delta, length)
    found, scale = probabilities(f)
    torch.testing.assert_close(found, torch.softmax(logits, 1), rtol=0, atol=length * 1e-7)
    torch.testing.assert_close(scale, p.scale.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(found), dtype=torch.float64))
    of_samples = torch.zeros(f.n, dtype=torch.float64)
    samples = torch.repeat_interleave(torch.arange(f.n), f.offsets.diff())
    of_samples.index_add_(0, samples, losses)
    assert_close(f.losses, of_samples, length, scale=float(of_samples.abs().max() + 1))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[7]], ids=lambda c: c.why)
def test_output_curvature_is_the_softmaxs_jacobian(case, monkeypatch):
    for name, value in (("_PIECE_ROWS", 5), ("_PIECE_ELEMENTS", 0), ("_STRIP", 2)):
        monkeypatch.setattr(symmetric, name, value)
    f = head_factors(case)
    outputs, b = output_curvature(f), dense(f)
    close = dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outputs.diagonal(), torch.stack([m.diagonal() for m in b]), **close)
    q = torch.linalg.qr(torch.randn(case.classes, case.classes, dtype=torch.float64))[0]
    rotated = torch.stack([(q.T @ m @ q).diagonal() for m in b])
    torch.testing.assert_close(outputs.diagonal_in(q), rotated, **close)
    total = sum(b)
    torch.testing.assert_close(outputs.sum(torch.float64), total, **close)
    narrow = outputs.sum(torch.float32)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [1.0, 20.0, 50.0, 80.0])
@every_dtype
def test_a_confident_sample_keeps_its_curvature(gap, dtype):
    """To the relative rounding of its factors, however small it is."""
    weight = torch.tensor([[gap], [0.0], [-1.0]], dtype=dtype)
    f = imu.GradientFactors.from_head(
        torch.ones(1, 1, dtype=dtype), weight, None, torch.tensor([0])
    )
    rest = torch.tensor([-gap, -gap - 1], dtype=torch.float64).exp()
    p = torch.cat([torch.ones(1, dtype=torch.float64), rest]) / (1 + rest.sum())
    complement = torch.stack([rest.sum() / (1 + rest.sum()), 1 - p[1], 1 - p[2]])
    found = output_curvature(f).diagonal()[0]
    torch.testing.assert_close(found, p * complement, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_ignored_labels_are_the_losss():
    x, w = torch.randn(5, 4), torch.randn(3, 4)
    labels = torch.tensor([0, 2, 1, 2, 0])
    kept = torch.tensor([1, 2, 3])
    expected = imu.GradientFactors.from_head(
        x[kept], w, None, labels[kept], torch.tensor([0, 0, 1, 2, 3, 3])
    )
    for given in ({"loss": imu.CrossEntropy(ignore_index=0)}, {"ignore_index": 0}):
        f = imu.GradientFactors.from_head(x, w, None, labels, **given)
        assert torch.equal(f.delta, expected.delta) and torch.equal(f.offsets, expected.offsets)
        assert f.loss == imu.CrossEntropy(ignore_index=0)


def test_shifted_positions():
    shifted, plain = imu.CrossEntropy(shift=True), imu.CrossEntropy(shift=False)
    outputs, labels = torch.randn(2, 4, 3), torch.randint(3, (2, 4))
    here, there = shifted.aligned(outputs, labels)
    assert torch.equal(here, outputs[:, :3]) and torch.equal(there, labels[:, 1:])
    for loss, x, y in ((plain, outputs, labels), (shifted, outputs[:, 0], labels[:, 0])):
        same = loss.aligned(x, y)
        assert same[0] is x and same[1] is y


@pytest.mark.parametrize("loss", [imu.CrossEntropy(ignore_index=7), imu.CrossEntropy()])
def test_the_loss_is_saved_with_the_factors(tmp_path, loss):
    f = imu.GradientFactors.from_head(
        torch.randn(4, 3), torch.randn(2, 3), None, torch.tensor([0, 1, 1, 0]), loss=loss
    )
    f.save(tmp_path / "f")
    assert imu.GradientFactors.load(tmp_path / "f").loss == loss
    assert f.select(torch.tensor([1])).loss == f.samples(1, 3).loss == loss
    other = imu.GradientFactors(f.delta, f.act, f.offsets, False)
    other.save(tmp_path / "g")
    assert imu.GradientFactors.load(tmp_path / "g").loss is None


def test_refusals():
    x, w, y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    f = imu.GradientFactors.from_head(x, w, None, y)
    for given, message in (
        ({"loss": "hinge"}, "loss='hinge' is unknown; choose one of auto, binary_cross_entropy"),
        ({"loss": imu.CrossEntropy(), "ignore_index": 0}, "give ignore_index to it, not beside it"),
        ({"loss": imu.CrossEntropy(shift=True)}, "shift=True is for capture"),
        ({"loss": imu.CrossEntropy}, "loss is the class CrossEntropy; pass an object"),
    ):
        with pytest.raises(InputError, match=message):
            imu.GradientFactors.from_head(x, w, None, y, **given)
    for given, message in (
        ({"ignore_index": 0.5}, "ignore_index=0.5 must be an integer"),
        ({"ignore_index": True}, "ignore_index=True must be an integer"),
        ({"shift": 1}, "shift=1 must be True, False or 'auto'"),
    ):
        with pytest.raises(InputError, match=message):
            imu.CrossEntropy(**given)
    with pytest.raises(InputError, match="needs labels; pass both, or neither"):
        imu.GradientFactors(f.delta, f.act, f.offsets, False, loss=imu.CrossEntropy())
    # Labels without a loss have always meant a softmax head.
    labelled = imu.GradientFactors(f.delta, f.act, f.offsets, False, f.labels)
    assert labelled.loss == imu.CrossEntropy()
    bare = imu.GradientFactors(f.delta, f.act, f.offsets, False)
    for name in ("ggn", "ggn_block", "kfac", "ekfac"):
        with pytest.raises(InputError, match="no curvature of the loss.*'fisher_diag'"):
            imu.fit(name, bare)
    for name in ("identity", "fisher_diag", "fisher"):
        assert imu.influence_scores(bare, curvature=name).isfinite().all()
