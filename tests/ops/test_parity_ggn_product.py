"""The GGN product's operands, its chunks, and the reference against autograd's Hessian."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from cases import Call, Case, every_case

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.ggn_product import ggn_product


def operands(case: Case, dtype: torch.dtype, many: int | None):
    p = case.make(torch.float64)
    probabilities = torch.softmax(p.logits, dim=1)
    width = case.features + p.has_bias
    shape = (case.classes, width) if many is None else (many, case.classes, width)
    v = torch.randn(shape, dtype=torch.float64)
    tensors = [t.to(dtype) for t in (probabilities, p.scale, p.act, v)]
    size = float(v.abs().max() * (p.act.abs().max() + 1) ** 2) * case.features * 2
    length = len(p.act) + case.features + case.classes
    return Call((*tensors, len(case.lengths), 0.1, p.has_bias), length, [size])


OPERANDS = {
    "ggn_product": {"one": partial(operands, many=None), "three": partial(operands, many=3)}
}


def test_products_are_in_the_dtype_of_v():
    """Of probabilities and features that are stored in float32."""
    args = operands(Case("odd and prime", (1,) * 13, 7, 5), torch.float64, None).args
    p, scale, act, v, *rest = args
    stored = (p.float(), scale, act.float())
    found, truth = ggn_product(*stored, v, *rest), reference.ggn_product(*stored, v, *rest)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    with imu.use_backend("reference"):
        assert torch.equal(ggn_product(*stored, v, *rest), truth)


def test_products_in_half_precision_have_no_kernel():
    case = Case("odd and prime", (1,) * 13, 7, 5)
    p, scale, act, v, *rest = operands(case, torch.bfloat16, None).args
    assert ggn_product.limits(p, scale, act, v.float(), *rest) == ""
    assert "torch.float64" in ggn_product.limits(p, scale, act, v.double(), *rest)
    assert ggn_product.limits(p, scale, act, v, *rest) == (
        "V is torch.bfloat16, and products are computed in V's dtype"
    )


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing(monkeypatch, chunk):
    args = operands(Case("ragged tokens", (3, 1, 7, 2), 7, 5), torch.float64, None).args
    expected = reference.ggn_product(*args)
    monkeypatch.setattr(sys.modules["imu_fast.ops.ggn_product"], "CHUNK_BYTES", 8 * 7 * chunk)
    torch.testing.assert_close(ggn_product(*args), expected)


@every_case
def test_reference_is_the_hessian_of_the_mean_loss(case):
    if case.classes * case.features > 100:
        pytest.skip("the dense Hessian of this case is large")
    p = case.make(torch.float64)
    weight = torch.cat([p.weight, p.bias[:, None]], 1) if p.has_bias else p.weight
    n = len(case.lengths)

    def mean_loss(theta):
        logits = reference.augment(p.act, p.has_bias) @ theta.view_as(weight).T
        loss = torch.nn.functional.cross_entropy(logits, p.labels, reduction="none")
        return (p.scale * loss).sum() / n

    hessian = torch.autograd.functional.hessian(mean_loss, weight.flatten())
    q = torch.softmax(p.logits, dim=1)
    dense = reference.ggn_matrix(q, p.scale, p.act, n, 0.0, p.has_bias)
    torch.testing.assert_close(dense, hessian, rtol=1e-8, atol=1e-10)
    v = torch.randn_like(weight)
    product = reference.ggn_product(q, p.scale, p.act, v, n, 0.1, p.has_bias)
    torch.testing.assert_close(product.flatten(), dense @ v.flatten() + 0.1 * v.flatten())
