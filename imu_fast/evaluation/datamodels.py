"""Do scores predict what retraining does? Measures over models retrained on random subsets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imu_fast.errors import (
    InputError,
    check_count,
    check_installed,
    check_positive,
    check_seed,
    check_tensor,
)


def random_subsets(n: int, count: int, *, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """``count`` subsets of n training samples, each of ``round(fraction n)``: bool [count, n].

    Raises:
        InputError: a count below 1, a fraction outside (0, 1), an empty subset.
    """
    check_count("n", n)
    check_count("count", count)
    if check_positive("fraction", fraction) >= 1:
        raise InputError(f"fraction={fraction!r} must lie in (0, 1)")
    size = round(fraction * n)
    if not 0 < size < n:
        raise InputError(f"fraction={fraction!r} of n={n} samples is none, or all; use more")
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    subsets = torch.zeros(count, n, dtype=torch.bool)
    for subset in subsets:
        subset[torch.randperm(n, generator=generator)[:size]] = True
    return subsets


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    check_tensor(name, value, "real", str(list(shape)))
    if tuple(value.shape) != shape or not bool(torch.isfinite(value).all()):
        raise InputError(
            f"{name} has shape {tuple(value.shape)} or is not finite; it must be {list(shape)}"
        )
    return value.detach().double().cpu().numpy()


def _subsets(subsets: Tensor) -> np.ndarray:
    check_tensor("subsets", subsets, "boolean", "[s, n]")
    if subsets.dim() != 2 or len(subsets) < 2:
        raise InputError(
            f"subsets has shape {tuple(subsets.shape)}; pass bool [s, n] of two subsets or more"
        )
    return subsets.cpu().numpy()


def rank_correlation(a: np.ndarray, b: np.ndarray) -> Tensor:
    """Spearman's correlation of each column of a and b, both [s, m]: [m], NaN for a constant one.

    Raises:
        InputError: scipy is not installed.
    """
    check_installed("a rank correlation", "scipy")
    from scipy.stats import rankdata

    u, v = (r - r.mean(axis=0) for r in (rankdata(values, axis=0) for values in (a, b)))
    norms = np.sqrt((u * u).sum(axis=0) * (v * v).sum(axis=0))
    with np.errstate(invalid="ignore"):
        return torch.from_numpy((u * v).sum(axis=0) / norms)


def _sums(chosen: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """``chosen @ tau`` but for a factor of each column, where equal sums are equal to the bit.

    Ranks would order them by the rounding on the way. Each column is two parts on grids so coarse
    that every sum of either is exact; what is finer than both is 2^-80 of the column's largest.
    """
    _, top = np.frexp(np.abs(tau).max(axis=0, initial=0.0))
    unit = np.ldexp(tau, -top)
    room = np.finfo(np.float64).nmant - len(tau).bit_length()
    coarse = np.ldexp(np.rint(np.ldexp(unit, room)), -room)
    fine = np.ldexp(np.rint(np.ldexp(unit - coarse, 2 * room)), -2 * room)
    return chosen @ coarse + chosen @ fine


def linear_datamodeling_score(attributions: Tensor, subsets: Tensor, outputs: Tensor) -> Tensor:
    """How well sums of attributions order what models retrained on subsets do (Park et al. 2023).

    For each query, Spearman's correlation over the subsets S between ``sum of attributions over S``
    and the output of the model trained on S: 1 if the sums order the retrained models right.

    Args:
        attributions: [n, m] of n training samples to m queries: what having the sample does to the
            output (:func:`imu_fast.pairwise_influence` where the output is the loss).
        subsets: bool [s, n], as :func:`random_subsets`. outputs: [s, m].

    Returns:
        float64 [m]; NaN for a query that all models, or all sums, answer alike.

    Raises:
        InputError: shapes do not match, or values are not finite.
    """
    chosen = _subsets(subsets)
    check_tensor("attributions", attributions, "real", "[n, m]")
    if attributions.dim() != 2:
        raise InputError(f"attributions has shape {tuple(attributions.shape)}; pass [n, m]")
    tau = _check("attributions", attributions, (chosen.shape[1], attributions.shape[1]))
    observed = _check("outputs", outputs, (len(chosen), tau.shape[1]))
    return rank_correlation(_sums(chosen.astype(np.float64), tau), observed)


def memorisation(subsets: Tensor, losses: Tensor) -> Tensor:
    """How much a sample's own loss rises when it is left out (Feldman & Zhang 2020): [n].

    Args:
        subsets: bool [s, n]. losses: of each training sample under each model, [s, n].

    Returns:
        float64 [n]: mean loss of the models without the sample less that of those with it; NaN
        where all, or none, have it.

    Raises:
        InputError: shapes do not match, or values are not finite.
    """
    chosen = _subsets(subsets)
    loss = _check("losses", losses, chosen.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        inside = (loss * chosen).sum(axis=0) / chosen.sum(axis=0)
        outside = (loss * ~chosen).sum(axis=0) / (~chosen).sum(axis=0)
    return torch.from_numpy(outside - inside)
