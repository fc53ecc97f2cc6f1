"""The GGN product against reference.py, and the reference against autograd's Hessian."""

from __future__ import annotations

import sys

import pytest
import torch
from cases import Case, assert_close, every_case, every_dtype

from imu_fast import reference
from imu_fast.ops.ggn_product import ggn_product


def arguments(case: Case, dtype: torch.dtype):
    p = case.make(torch.float64)
    probabilities = torch.softmax(p.logits, dim=1)
    width = case.features + p.has_bias
    v = torch.randn(case.classes, width, dtype=torch.float64)
    tensors = [t.to(dtype) for t in (probabilities, p.scale, p.act, v)]
    return (*tensors, len(case.lengths), 0.1, p.has_bias)


@every_case
@every_dtype
def test_ggn_product(case, dtype):
    args = arguments(case, dtype)
    p, _, act, v = args[:4]
    size = float(v.abs().max() * (act.abs().max() + 1) ** 2) * act.shape[1] * 2
    length = len(act) + act.shape[1] + p.shape[1]
    assert_close(ggn_product(*args), reference.ggn_product(*args), length, size)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing(monkeypatch, chunk):
    args = arguments(Case("odd and prime", (1,) * 13, 7, 5), torch.float64)
    expected = ggn_product(*args)
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
