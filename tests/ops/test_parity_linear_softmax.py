"""The large-vocabulary head, slab by slab, against reference.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import Call, Case, assert_close, every_case, every_dtype
from torch.utils._python_dispatch import TorchDispatchMode

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.linear_softmax import (
    Head,
    linear_softmax_bilinear,
    linear_softmax_gradients,
    linear_softmax_scores,
    normaliser,
    residual_slabs,
)


def head_of(case: Case, dtype: torch.dtype) -> tuple[Head, torch.Tensor]:
    p = case.make(dtype)
    return Head(p.act, p.weight, p.bias, p.labels, p.scale), p.offsets


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
    found = torch.cat([part for _, part in residual_slabs(head, known, slab)], dim=1)
    assert_close(found, delta, length)
    assert_close(known.loss, loss, length, max(1.0, float(logits.abs().max())))
    assert found.dtype == dtype


@every_case
@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("slab", [2, 100])
def test_scores_in_float64(case, mode, slab):
    head, offsets = head_of(case, torch.float64)
    scores, loss = linear_softmax_scores(head, offsets, 0.01, mode, slab)
    truth, true_loss = reference.linear_softmax_scores(head, offsets, 0.01, mode)
    torch.testing.assert_close(scores, truth, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(loss, true_loss, rtol=1e-8, atol=1e-12)
    with imu.use_backend("reference"):
        torch.testing.assert_close(linear_softmax_scores(head, offsets, 0.01, mode)[0], truth)


@every_case
def test_gradients_and_bilinear_scores(case):
    head, offsets = head_of(case, torch.float64)
    has_bias = head.bias is not None
    delta, _, _ = truth_of(head)
    mean, fisher = linear_softmax_gradients(head, offsets, slab=3)
    factors = (delta, head.features, offsets, has_bias)
    torch.testing.assert_close(mean, reference.mean_gradient(*factors))
    torch.testing.assert_close(fisher, reference.fisher_diagonal(*factors))
    x = torch.randn(2, *mean.shape, dtype=torch.float64)
    truth = reference.bilinear_scores(delta, head.features, x, offsets, has_bias)
    torch.testing.assert_close(linear_softmax_bilinear(head, x, offsets, slab=3), truth)


def test_agrees_with_scores_of_factors():
    features, labels = torch.randn(40, 16), torch.randint(500, (40,))
    weight, bias = torch.randn(500, 16) / 4, torch.randn(500)
    factors = imu.GradientFactors.from_head(features, weight, bias, labels)
    expected = imu.influence_scores(factors, damping=1e-2)
    head = Head(features, weight, bias, labels)
    scores, loss = linear_softmax_scores(head, factors.offsets, 1e-2, slab=64)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, factors.losses, rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_float32():
    head, offsets = head_of(Case("odd and prime", (1,) * 13, 7, 5), torch.bfloat16)
    wide = Head(*(t if t.dtype == torch.int64 else t.float() for t in head))
    found, expected = (linear_softmax_scores(h, offsets, 0.01, slab=3)[0] for h in (head, wide))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_confident_token_keeps_its_digits():
    """In float32, where p_y is one: of the loss, and of what is left for the other classes."""
    features, weight = torch.tensor([[20.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    head = Head(features, weight, None, torch.tensor([0]))
    known = normaliser(head, 2)
    delta = torch.cat([part for _, part in residual_slabs(head, known, 2)], dim=1)
    left = 2 * torch.exp(torch.tensor(-20.0).double())
    torch.testing.assert_close(known.loss.double(), torch.log1p(left)[None], rtol=1e-6, atol=0)
    truth = torch.stack([-left / (1 + left), left / 2 / (1 + left), left / 2 / (1 + left)])
    torch.testing.assert_close(delta[0].double(), truth, rtol=1e-6, atol=0)


def test_an_ignored_token_has_no_gradient_and_no_loss():
    head, offsets = head_of(Case("odd and prime", (1,) * 13, 7, 5), torch.float64)
    head.labels[4] = -100
    scores, loss = linear_softmax_scores(head, offsets, 0.01, slab=3)
    truth, true_loss = reference.linear_softmax_scores(head, offsets, 0.01, "add")
    assert scores[4] == 0 and loss[4] == 0
    torch.testing.assert_close(scores, truth)
    torch.testing.assert_close(loss, true_loss)


class Largest(TorchDispatchMode):
    """The most elements that any operation's new result had in the body."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, t.numel())
        return out


def test_neither_logits_nor_anything_of_the_weights_size_is_stored():
    tokens, classes, d, slab = 96, 4000, 32, 128
    features, labels = torch.randn(tokens, d), torch.randint(classes, (tokens,))
    head = Head(features, torch.randn(classes, d), torch.randn(classes), labels)
    with Largest() as largest:
        linear_softmax_scores(head, torch.arange(tokens + 1), 0.01, slab=slab)
    assert largest.elements <= slab * max(tokens, d + 1)
