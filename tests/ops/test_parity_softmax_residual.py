"""Operands of the softmax residual and loss, and what a confident sample keeps."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from cases import Call

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops import extension
from imu_fast.ops.softmax_residual import linear_logits, softmax_residual


def operands(case, dtype, scaled):
    p = case.make(torch.float64)
    logits = p.logits.to(dtype)
    # exp amplifies an absolute error of a logit into a relative one: eps times the logits' size.
    size = float(logits.abs().max())
    scale = p.scale.to(torch.promote_types(dtype, torch.float32)) if scaled else None
    return Call((logits, p.labels, scale), case.classes + int(size), [None, None])


OPERANDS = {
    "softmax_residual": {
        "scaled": partial(operands, scaled=True),
        "plain": partial(operands, scaled=False),
    }
}


def test_residual_of_the_label_keeps_its_digits():
    """p_y - 1 of a confident sample: computing p_y first would give zero in float32."""
    logits = torch.tensor([[20.0, 0.0]])
    delta, _ = softmax_residual(logits, torch.tensor([0]))
    truth, _ = reference.softmax_residual(logits, torch.tensor([0]), torch.ones(1))
    torch.testing.assert_close(delta.double(), truth, rtol=1e-5, atol=0)
    assert float(delta[0, 0]) < 0


@pytest.mark.parametrize("classes", [2, 40])
def test_rows_are_adjacent(classes):
    """Also where few classes are normalised with the tokens side by side."""
    assert softmax_residual(torch.randn(7, classes), torch.zeros(7).long())[0].is_contiguous()


@pytest.mark.parametrize("classes", [2, 40])
def test_the_loss_of_a_confident_sample_keeps_its_digits(classes):
    """log(1 - others) would round to zero, and so would the difference of logits."""
    logits = torch.zeros(3, classes)
    logits[:, 0] = torch.tensor([20.0, 16.0, 0.5])
    labels = torch.zeros(3, dtype=torch.int64)
    _, loss = softmax_residual(logits, labels)
    others = (classes - 1) * torch.exp(-logits[:, 0].double())
    torch.testing.assert_close(loss.double(), torch.log1p(others), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [1, 16, 17])
def test_logits_of_a_head(classes, bias):
    """Class by class in memory up to sixteen of them."""
    features, weight = torch.randn(5, 3).double(), torch.randn(classes, 3).double()
    bias = torch.randn(classes).double() if bias else None
    truth = reference.head_logits(features, weight, bias)
    torch.testing.assert_close(linear_logits(features, weight, bias), truth)
    assert linear_logits(features, weight, bias).shape == (5, classes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.randn(5, 7).to(dtype)
    delta, loss = softmax_residual(logits, torch.arange(5))
    expected = softmax_residual(logits.float(), torch.arange(5))
    assert delta.dtype == torch.float32
    assert torch.equal(delta, expected[0])
    assert torch.equal(loss, expected[1])


needed = pytest.mark.skipif(extension.load() is None, reason="no compiled module")


def torch_alone(monkeypatch):
    module = sys.modules["imu_fast.ops.softmax_residual"]
    monkeypatch.setattr(module, "loaded_for", lambda tensor: None)


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 7), (33, 16), (70, 17), (3, 5000)], ids=str)
def test_compiled_and_not_are_one_residual(monkeypatch, size, scaled, transposed, dtype):
    n, classes = size
    logits = 5 * torch.randn(n, classes, dtype=dtype)
    logits = logits.t().contiguous().t() if transposed else logits
    labels, scale = torch.randint(classes, (n,)), torch.rand(n, dtype=dtype) if scaled else None
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found = softmax_residual(logits, labels, scale)
    torch.set_num_threads(before)
    torch_alone(monkeypatch)
    tolerance = (classes + 40) * torch.finfo(dtype).eps
    for one, other in zip(found, softmax_residual(logits, labels, scale), strict=True):
        assert one.is_contiguous() and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=0)


@pytest.mark.parametrize("way", ["compiled", "torch"])
@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("far", [50.0, 95.0, 150.0, 1e30])
def test_the_loss_where_p_of_the_label_underflows(monkeypatch, way, far, classes):
    if way == "torch":
        torch_alone(monkeypatch)
    logits = torch.zeros(4, classes)
    logits[:, 1] = far
    scale = torch.tensor([1.0, 0.25, 2.0, 0.5])
    _, loss = softmax_residual(logits, torch.zeros(4, dtype=torch.int64), scale)
    torch.testing.assert_close(loss, far * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so(value, classes):
    logits = torch.zeros(2, classes)
    logits[1, 2] = value
    delta, loss = softmax_residual(logits, torch.zeros(2, dtype=torch.int64))
    assert bool(delta[1].isnan().all()) and bool(loss[1].isnan())
    assert bool(delta[0].isfinite().all()) and bool(loss[0].isfinite())


@needed
@pytest.mark.parametrize("label", [-100, -1, 5, 1 << 40])
@pytest.mark.parametrize("classes", [5, 40])
def test_labels_beyond_the_classes_are_refused(label, classes):
    """They are places in memory."""
    labels = torch.tensor([0, label if label != 5 else classes, 1])
    with pytest.raises(imu.InputError, match=r"labels\[1\]"):
        softmax_residual(torch.zeros(3, classes), labels)
