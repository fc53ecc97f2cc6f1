"""Operands of the Gram matrices of per-sample gradients, and their strips and tiles."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from cases import Call, Case, assert_close, every_case, every_dtype, factors_of

from imu_fast import reference
from imu_fast.ops.bilinear_scores import gradient_norms
from imu_fast.ops.gram import cross_gram, gram
from imu_fast.ops.routes import forms_for_norms, forms_for_products


def operands(case, dtype):
    f = factors_of(case, dtype)
    size = float((f[0].abs().sum(1).max() * (f[1].abs().max() + 1)) ** 2) * f[1].shape[1]
    size *= max(case.lengths) ** 2
    return Call(f, case.classes + case.features, [max(size, 1e-30)])


def cross_operands(case, dtype):
    """Against the samples in reverse, of which the first is left out."""
    delta, act, offsets, has_bias = factors_of(case, dtype)
    other = Case("other", (2, *case.lengths[::-1][1:], 1), case.classes, case.features, has_bias)
    right = factors_of(other, dtype)[:3]
    size = max(
        float(d.abs().sum(1).max() * (a.abs().max() + 1)) for d, a in ((delta, act), right[:2])
    )
    size = size**2 * act.shape[1] * max(case.lengths) * max(other.lengths)
    args = ((delta, act, offsets), right, has_bias)
    return Call(args, case.classes + case.features, [max(size, 1e-30)])


OPERANDS = {"gram": {"": operands}, "cross_gram": {"": cross_operands}}


@every_case
@every_dtype
def test_gram_is_symmetric_to_the_last_bit(case, dtype):
    k = gram(*factors_of(case, dtype))
    assert torch.equal(k, k.T)


def test_strips_of_rows_change_nothing(monkeypatch):
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3, 0, 1), 6, 5), torch.float64)
    monkeypatch.setattr(sys.modules["imu_fast.ops.gram"], "_STRIP", 3)
    torch.testing.assert_close(gram(*f), reference.gram(*f))


def test_what_the_kernels_grid_holds():
    """One program for a pair of samples, fewer than 2^31 of them."""
    most = math.isqrt(2**31 - 1)
    delta, act = torch.zeros(1, 1), torch.zeros(1, 1)
    assert gram.limits(delta, act, torch.arange(most + 1), True) == ""
    assert gram.limits(delta, act, torch.arange(most + 2), True) == f"more than {most} samples"


@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_tiles_change_nothing(monkeypatch, tile):
    f = factors_of(Case("ragged tokens", (3, 1, 7, 2, 3), 6, 5), torch.float64)
    expected = gram(*f)
    monkeypatch.setattr(sys.modules["imu_fast.ops.gram"], "_TILE_ELEMENTS", tile)
    torch.testing.assert_close(gram(*f), expected)


LONG = [
    Case("long samples at a small layer", (40,) * 5, 6, 5),
    Case("long samples of many lengths, one empty, no bias", (40, 0, 31, 70, 1), 70, 9, False),
]


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.why)
@pytest.mark.parametrize("elements", [1, 100, 1 << 20])
def test_gradients_that_are_formed_have_the_products_of_tokens(monkeypatch, case, elements):
    """Both routes of each, whatever would have been chosen, and in pieces of any size."""
    module, norms = (sys.modules[f"imu_fast.ops.{x}"] for x in ("gram", "bilinear_scores"))
    delta, act, offsets, has_bias = factors_of(case, torch.float64)
    left = (delta, act, offsets)
    right = module._samples(*left, 1, len(offsets) - 1)
    for name in ("_HELD_ELEMENTS", "_FORMED_ELEMENTS"):
        monkeypatch.setattr(module, name, elements)
    for formed in (True, False):
        monkeypatch.setattr(module, "forms_for_products", lambda *_, formed=formed: formed)
        monkeypatch.setattr(norms, "forms_for_norms", lambda *_, formed=formed: formed)
        torch.testing.assert_close(
            cross_gram(left, right, has_bias), reference.cross_gram(left, right, has_bias)
        )
        torch.testing.assert_close(gram(*left, has_bias), reference.gram(*left, has_bias))
        torch.testing.assert_close(
            gradient_norms(*left, has_bias), reference.gradient_norms(*left, has_bias)
        )


def test_long_samples_are_formed_and_short_ones_are_not():
    """Of 64 samples against 16; the layer (128, 512) is a MLP's, and 768 square an attention's."""

    def formed(classes: int, width: int, length: int, passes: int = 1) -> bool:
        return forms_for_products((64 * length, 16 * length), (64, 16), classes, width, passes)

    assert [formed(128, 512, t) for t in (1, 4, 16, 64, 256)] == [False] * 3 + [True] * 2
    assert [formed(768, 768, t) for t in (1, 16, 256)] == [False, False, True]
    assert formed(32, 32, 64) and formed(32, 32, 16)
    assert not formed(128_256, 4096, 64)  # a vocabulary's head
    assert not formed(128, 512, 64, passes=30)
    assert [forms_for_norms(t, 128, 512) for t in (2, 64, 512)] == [False, False, True]


def test_a_norm_is_not_negative_where_tokens_cancel():
    delta = torch.tensor([[1.0, 3.0], [-1.0, -3.0]]) / 3
    act = torch.full((2, 300), 1 / 7)
    assert float(gradient_norms(delta, act, torch.tensor([0, 2]), True)) >= 0


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_small_signal_at_a_large_input_has_its_norm(has_bias):
    """The square of either is beyond float32, their product's is not."""
    delta, act = 1e-24 * torch.randn(3, 4), 1e18 * torch.randn(3, 5)
    args = delta, act, torch.arange(4), has_bias
    assert_close(gradient_norms(*args), reference.gradient_norms(*args), 9)
