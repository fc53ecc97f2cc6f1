"""Every curvature by its definition: the dense float64 matrix that it is compared with."""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast import reference
from imu_fast.curvature.named import CURVATURES
from imu_fast.factors.probabilities import probabilities

every_curvature = pytest.mark.parametrize("name", imu.curvatures())
LAM = 0.1


def spec_of(name, damping=LAM):
    """Solves that are exact to rounding, so that what is compared is the mathematics."""
    wanted = {"damping": damping, "tolerance": 1e-12}
    return CURVATURES.choose(
        name, **{k: v for k, v in wanted.items() if k in CURVATURES[name].paths()}
    )


def bare(f):
    """The same rows at a layer without a bias, whose last input is one."""
    wide = torch.cat([f.act, torch.ones_like(f.act[:, :1])], dim=1)
    return imu.GradientFactors(f.delta, wide, f.offsets, False, f.labels, curvature=f.curvature)


def gradients(f):
    return reference.sample_gradients(f.delta, f.act, f.offsets, f.has_bias).flatten(1)


def of_the_ggn(make):
    def matrix(f, damping, fitted):
        p, scale = probabilities(f)
        return make(p, scale, f.act, f.n, damping, f.has_bias)

    return matrix


def fisher(f, damping, fitted):
    g = gradients(f)
    return g.T @ g / f.n + damping * torch.eye(g.shape[1], dtype=torch.float64)


def ekfac(f, damping, fitted):
    # K-FAC's eigenbasis is not unique where eigenvalues coincide: the fitted one is taken.
    p, scale = probabilities(f)
    q = torch.kron(fitted.basis_out, fitted.basis_in)
    return reference.ekfac_matrix(p, scale, f.act, f.n, damping, f.has_bias, q)


# The definition of each, ``(factors, damping, fitted) -> [P, P]``: a new curvature adds its own.
MATRIX = {
    "ekfac": ekfac,
    "fisher": fisher,
    "fisher_diag": lambda f, lam, _: fisher(f, lam, None).diagonal().diag(),
    "ggn": of_the_ggn(reference.ggn_matrix),
    "ggn_block": of_the_ggn(reference.ggn_block_matrix),
    "identity": lambda f, lam, _: torch.eye(f.num_classes * f.width, dtype=torch.float64),
    "kfac": of_the_ggn(reference.kfac_matrix),
}


def fit(name, f, damping=LAM):
    fitted = imu.fit(spec_of(name, damping), f)
    return fitted, MATRIX[name](f, damping, fitted)


def rounding(f, name="", damping=LAM):
    """Relative to the largest entry: of sums over tokens in the precision that M is held in."""
    elementwise = name in ("identity", "fisher_diag")
    eps = torch.finfo(f.dtype if elementwise else torch.float64).eps
    size = 1 + float(f.act.double().square().sum(dim=1).amax()) / damping if f.num_tokens else 1
    return 4 * (f.num_tokens + f.num_classes * f.width + 8) * eps * size
