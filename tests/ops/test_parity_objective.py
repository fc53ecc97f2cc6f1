"""Operands of objectives and their residuals, and residuals against autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import Call

from imu_fast import reference
from imu_fast.ops.objective import (
    NEEDS_AUXILIARY,
    OBJECTIVES,
    objective,
    objective_residual,
)


def auxiliary_of(name, logits, labels):
    """Another class for relabel, the losses of a nearby model for npo."""
    if name == "relabel":
        return (labels + 1) % logits.shape[1]
    moved = logits.detach() + torch.randn(logits.shape, dtype=logits.dtype)
    return torch.nn.functional.cross_entropy(moved, labels, reduction="none")


def operands(case, dtype, name):
    """None: of one class there is no other, whose logit or probability it could be."""
    if case.classes == 1 and name != "ce":
        return None
    p = case.make(torch.float64)
    logits = p.logits.to(dtype)
    auxiliary = None
    if name in NEEDS_AUXILIARY:
        auxiliary = auxiliary_of(name, logits, p.labels)
    # exp amplifies an absolute error of a logit into a relative one.
    size = float(logits.abs().max())
    return Call((logits, p.labels, name, auxiliary), case.classes + 4 * int(size + 2), [size + 2])


def residual_operands(case, dtype, name):
    made = operands(case, dtype, name)
    return made and Call(made.args, made.length, [2.0])


OPERANDS = {
    "objective": {name: partial(operands, name=name) for name in OBJECTIVES},
    "objective_residual": {name: partial(residual_operands, name=name) for name in OBJECTIVES},
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_objective_residual_is_the_gradient(name, scale):
    logits = (scale * torch.randn(40, 6, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(6, (40,))
    auxiliary = auxiliary_of(name, logits, labels)
    truth = reference.objective(logits, labels, name, auxiliary)
    torch.testing.assert_close(objective(logits, labels, name, auxiliary), truth)
    expected = torch.autograd.grad(truth.sum(), logits)[0]
    actual = objective_residual(logits.detach(), labels, name, auxiliary)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_margin_pushes_only_samples_still_predicted_as_their_label():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0], [1.0, 1.0, 0.0]])
    residual = objective_residual(logits, torch.tensor([0, 1, 0]), "margin")
    assert residual.tolist() == [[-1, 0, 1], [0, 0, 0], [-1, 1, 0]]
