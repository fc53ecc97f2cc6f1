"""A randomised Nystrom preconditioner for conjugate gradient (Frangella, Tropp, Udell 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from imu_fast.solvers.conjugate_gradient import Operator


class NystromPreconditioner:
    """``P^-1 r = (l + lam) U (S + lam)^-1 U^T r + (r - U U^T r)`` from a sketch of rank k.

    U [P, k] and S [k] are the eigenpairs of the sketched matrix, l the smallest of S.
    """

    def __init__(self, basis: Tensor, values: Tensor, damping: float) -> None:
        self._basis = basis
        self._excess = (values[-1] + damping) / (values + damping) - 1

    @classmethod
    def fit(
        cls,
        apply: Operator,
        shape: tuple[int, int],
        damping: float,
        device: torch.device,
        rank: int = 32,
    ) -> NystromPreconditioner:
        """Sketch ``apply``, the undamped matrix, with ``rank`` products; seeded, so reproducible.

        Args:
            apply: ``v -> M v``, row by row of v [k, *shape].
        """
        order = shape[0] * shape[1]
        rank = min(rank, order)
        generator = torch.Generator().manual_seed(0)
        test = torch.randn(order, rank, generator=generator, dtype=torch.float32)
        test = torch.linalg.qr(test.to(device))[0]
        sketch = apply(test.T.contiguous().view(rank, *shape)).flatten(1).T
        # The sketch's Gram matrix is singular where M's rank is below k, and float32 products make
        # it slightly indefinite: only its clearly positive part is inverted.
        gram = test.double().T @ sketch.double()
        inner, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        kept = inner > rank * torch.finfo(torch.float32).eps * inner[-1].clamp_min(0)
        if not bool(kept.any()):
            return cls(test[:, :1] * 0, test.new_zeros(1), damping)
        b = sketch.double() @ (vectors[:, kept] / inner[kept].sqrt())
        basis, singular, _ = torch.linalg.svd(b, full_matrices=False)
        values = singular.square()
        return cls(basis.float(), values.float(), damping)

    def __call__(self, r: Tensor) -> Tensor:
        """``P^-1 r``; r [m, C, D]; computed in float32."""
        flat = r.flatten(1).float()
        coefficients = (flat @ self._basis) * self._excess
        return (flat + coefficients @ self._basis.T).view_as(r).to(r)
