"""The GGN product's operands, its chunks, and the reference against autograd's Hessian."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from cases import Call, Case, assert_close, every_case, every_dtype

import imu_fast as imu
from imu_fast import reference
from imu_fast.ops.ggn_product import ggn_product


def operands(case: Case, dtype: torch.dtype, many: int | None, form: str = "softmax"):
    p = case.make(torch.float64)
    probabilities = torch.softmax(p.logits, dim=1)
    if form == "dense":
        b = torch.randn(len(p.act), case.classes, case.classes, dtype=torch.float64)
        probabilities = b @ b.mT / case.classes
    width = case.features + p.has_bias
    shape = (case.classes, width) if many is None else (many, case.classes, width)
    v = torch.randn(shape, dtype=torch.float64)
    tensors = [t.to(dtype) for t in (probabilities, p.scale, p.act, v)]
    size = float(v.abs().max() * (p.act.abs().max() + 1) ** 2) * case.features * 2
    length = len(p.act) + case.features + case.classes
    size *= max(1.0, float(probabilities.abs().sum(dim=-1).max()) if len(p.act) else 1.0)
    return Call((*tensors, len(case.lengths), 0.1, p.has_bias, form), length, [size])


OPERANDS = {
    "ggn_product": {
        "one": partial(operands, many=None),
        "three": partial(operands, many=3),
        "diagonal": partial(operands, many=None, form="diagonal"),
        "three of a diagonal": partial(operands, many=3, form="diagonal"),
    }
}


@every_case
@every_dtype
@pytest.mark.parametrize("many", [None, 3])
def test_a_matrix_of_each_token(case, dtype, many):
    """Which has no kernel, and so is not among the operands above."""
    call = operands(case, dtype, many, "dense")
    found = ggn_product(*call.args)
    assert found.dtype == dtype
    assert_close(found, reference.ggn_product(*call.args), call.length, call.sizes[0])
    assert "no kernel" in ggn_product.limits(*call.args)


@pytest.mark.parametrize("label", [0, 1, 2])
@every_dtype
def test_a_confident_token_keeps_its_digits(label, dtype):
    """Also where the kernel runs: whatever is tiny is so to its own rounding."""
    z = torch.tensor([[0.0, 3.0, 1.0]], dtype=torch.float64)
    z[0, label] = 30.0
    p = torch.softmax(z, dim=1)
    act, v = torch.ones(1, 1).double(), torch.tensor([[3.0], [1.0], [2.0]]).double()
    args = (p, p.new_ones(1), act, v, 1, 0.0, False)
    truth = reference.ggn_product(*args)
    narrow = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args]
    found = ggn_product(*narrow)
    torch.testing.assert_close(found.double(), truth, rtol=16 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(truth.sum(), truth.new_zeros(()), rtol=0, atol=1e-25)


def test_products_are_in_the_dtype_of_v():
    """Of probabilities and features that are stored in float32."""
    args = operands(Case("odd and prime", (1,) * 13, 7, 5), torch.float64, None).args
    p, scale, act, v, *rest = args
    # Powers of two: rows sum to one in either precision.
    p = torch.tensor([1, 2, 3, 4, 5, 6, 6]).double().neg().exp2()[torch.rand_like(p).argsort(1)]
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
