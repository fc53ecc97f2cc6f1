"""The truth about scores: autograd of the model's own loss, float64, one sample at a time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def sample_gradients(model: nn.Module, samples, names, loss_of, dtype=torch.float64) -> Tensor:
    """Gradients of ``loss_of(model, sample)`` in the named parameters, flattened: [n, P]."""
    model = copy.deepcopy(model).to(dtype).eval()
    parameters = dict(model.named_parameters())
    chosen = [parameters[name].requires_grad_() for name in names]
    rows = []
    for sample in samples:
        found = torch.autograd.grad(loss_of(model, sample), chosen, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(found, chosen, strict=True)
                ]
            )
        )
    return torch.stack(rows).double()


def scores(gradients: Tensor, curvature: str = "fisher_diag", damping: float = 1e-2) -> Tensor:
    """``- g_i^T M^-1 gbar`` for dense gradients [n, P]."""
    mean = gradients.mean(dim=0)
    if curvature == "identity":
        return -gradients @ mean
    if curvature == "fisher_diag":
        return -gradients @ (mean / (gradients.square().mean(dim=0) + damping))
    matrix = gradients.T @ gradients / len(gradients)
    return -gradients @ torch.linalg.solve(
        matrix + damping * torch.eye(len(matrix)).to(matrix), mean
    )


def assert_scores(found: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    error = float((found.double().cpu() - truth).norm() / truth.norm())
    assert error < tolerance, f"relative error {error:.2g}"
