"""The large-vocabulary head, slab by slab, against reference.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import Call, Case, assert_close, every_case, every_dtype

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.linear_softmax import Head, normaliser, residual


def head_of(case: Case, dtype: torch.dtype) -> tuple[Head, torch.Tensor]:
    p = case.make(dtype)
    return Head(p.act, p.weight, p.bias, p.labels, p.scale), p.offsets


def in_slabs(head, known, slab):
    """The residual of all classes, so many at a time."""
    classes = len(head.weight)
    cuts = [slice(c, min(c + slab, classes)) for c in range(0, classes, slab)]
    return torch.cat([residual(head, known, cut) for cut in cuts], dim=1)


def truth_of(head: Head):
    """delta and loss in float64 of the same rounded numbers."""
    bias = None if head.bias is None else head.bias.double()
    logits = torch.nn.functional.linear(head.features.double(), head.weight.double(), bias)
    return *reference.softmax_residual(logits, head.labels, head.scale), logits


def bounds(head):
    """The length of a logit's sum and of the softmax over them, and a logit's size."""
    logits = truth_of(head)[2]
    size = float(logits.abs().max())
    # exp amplifies an absolute error of a logit, itself a sum of d products, into a relative one.
    return len(head.weight) + int((head.features.shape[1] + 3) * (size + 1)), max(1.0, size)


def operands(case, dtype, slab, ignored=False):
    head, _ = head_of(case, dtype)
    length, size = bounds(head)
    if ignored:
        head.labels[::3] = -100
    return Call((head, slab), length, [size, 1.0, size])


def residual_operands(case, dtype, ignored=False):
    head, _ = head_of(case, dtype)
    length, _ = bounds(head)
    if ignored:
        head.labels[::3] = -100
    with imu.use_backend("reference"):
        known = normaliser(head)
    return Call((head, known, slice(case.classes // 3, case.classes)), length, [1.0])


OPERANDS = {
    "linear_softmax_normaliser": {
        "whole": partial(operands, slab=100),
        "slabs": partial(operands, slab=3),
        "ignored": partial(operands, slab=3, ignored=True),
    },
    "linear_softmax_residual": {
        "": residual_operands,
        "ignored": partial(residual_operands, ignored=True),
    },
}


@every_case
@every_dtype
@pytest.mark.parametrize("slab", [1, 3, 100])
def test_residual_and_loss(case, dtype, slab):
    head, _ = head_of(case, dtype)
    delta, loss, logits = truth_of(head)
    # exp amplifies an absolute error of a logit, itself a sum of d products, into a relative one.
    length = case.classes + int((case.features + 3) * logits.abs().max())
    known = normaliser(head, slab)
    found = in_slabs(head, known, slab)
    assert_close(found, delta, length)
    assert_close(known.loss, loss, length, max(1.0, float(logits.abs().max())))
    assert found.dtype == dtype


def test_half_precision_is_computed_in_float32():
    head, _ = head_of(Case("odd and prime", (1,) * 13, 7, 5), torch.bfloat16)
    wide = Head(*(t if t.dtype == torch.int64 else t.float() for t in head))
    known, expected = normaliser(head), normaliser(wide)
    assert all(torch.equal(a, b) for a, b in zip(known, expected, strict=True))
    assert known.lse.dtype == torch.float32
    assert torch.equal(in_slabs(head, known, 3), in_slabs(wide, expected, 3))


def test_a_confident_token_keeps_its_digits():
    """In float32, where p_y is one: of the loss, and of what is left for the other classes."""
    features, weight = torch.tensor([[20.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    head = Head(features, weight, None, torch.tensor([0]))
    known = normaliser(head, 2)
    delta = in_slabs(head, known, 2)
    left = 2 * torch.exp(torch.tensor(-20.0).double())
    torch.testing.assert_close(known.loss.double(), torch.log1p(left)[None], rtol=1e-6, atol=0)
    truth = torch.stack([-left / (1 + left), left / 2 / (1 + left), left / 2 / (1 + left)])
    torch.testing.assert_close(delta[0].double(), truth, rtol=1e-6, atol=0)


def test_an_ignored_token_has_no_gradient_and_no_loss():
    head, _ = head_of(Case("odd and prime", (1,) * 13, 7, 5), torch.float64)
    delta, loss, _ = truth_of(head)
    delta[4], loss[4] = 0, 0
    head.labels[4] = -100
    known = normaliser(head)
    assert not in_slabs(head, known, 3)[4].any() and known.loss[4] == 0
    torch.testing.assert_close(in_slabs(head, known, 3), delta)
    torch.testing.assert_close(known.loss, loss)
