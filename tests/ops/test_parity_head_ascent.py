"""Operands of the head's ascent gradient and of whole steps, and torch's SGD."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import ASCENT_RATES, CASES, Call, ascent_arguments

from imu_fast import reference
from imu_fast.ops.head_ascent import head_ascent, head_ascent_gradient, head_logits
from imu_fast.ops.objective import LABEL_OBJECTIVES, NEEDS_AUXILIARY, OBJECTIVES


def operands(case, dtype, name, buffer):
    """A whole step, which changes theta and its buffer; results: the loss, then these two."""
    if case.classes == 1:
        return None
    args, length, size = ascent_arguments(case, dtype, name)
    theta = args[3]
    named = ASCENT_RATES
    if not buffer:
        args, named = (*args[:4], None, *args[5:]), ASCENT_RATES | dict(momentum=0.0)
    sizes = [float(theta.abs().sum()) + size, size, size]
    return Call(args, length, sizes, named, changes=(3, 4))


def gradient_operands(case, dtype, name):
    if case.classes == 1:
        return None
    (features, labels, weights, theta, _, *options), length, size = ascent_arguments(
        case, dtype, "ce"
    )
    auxiliary = None
    if name in NEEDS_AUXILIARY:
        own = torch.nn.functional.cross_entropy(
            features.to(theta.dtype) @ theta[:, : case.features].T, labels, reduction="none"
        )
        auxiliary = (labels + 1) % case.classes if name == "relabel" else own
    args = (features, labels, weights, theta, options[0], name, auxiliary)
    return Call(args, 4 * length, [2 * size, 2 * size * case.features])


OPERANDS = {
    "head_ascent_gradient": {name: partial(gradient_operands, name=name) for name in OBJECTIVES},
    "head_ascent": {
        **{name: partial(operands, name=name, buffer=True) for name in LABEL_OBJECTIVES},
        "ce, no momentum": partial(operands, name="ce", buffer=False),
    },
}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_in_the_dtype_of_theta(dtype, has_bias):
    features, theta = torch.randn(4, 3).to(dtype), torch.randn(5, 3 + has_bias).double()
    truth = reference.augment(features.double(), has_bias) @ theta.T
    torch.testing.assert_close(head_logits(features, theta, has_bias), truth)


def test_the_kernel_updates_float32():
    args, *_ = ascent_arguments(CASES[1], torch.float32, "ce")
    assert head_ascent.limits(*args, **ASCENT_RATES) == ""
    wide = (args[0], args[1], args[2], args[3].double(), *args[4:])
    said = "theta is torch.float64; the kernel updates float32"
    assert head_ascent.limits(*wide, **ASCENT_RATES) == said


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_head_ascent_is_torchs_sgd_to_the_bit(momentum, alpha):
    args, *_ = ascent_arguments(CASES[1], torch.float64, "ce")
    features, labels, weights, theta, buffer, *options = args
    other = theta.clone()
    optimizer = torch.optim.SGD([other], lr=0.1, momentum=momentum, weight_decay=0.01)
    state = buffer.zero_() if momentum else None
    for _ in range(3):
        other.grad = head_ascent_gradient(features, labels, weights, other, *options)[0]
        other.grad += alpha * other.sign()
        optimizer.step()
        rates = ASCENT_RATES | dict(momentum=momentum, alpha=alpha)
        head_ascent(features, labels, weights, theta, state, *options, **rates)
    assert torch.equal(theta, other)
