"""Every tensor argument of public functions with every hostile value: right or refused.

No error of torch's own comes out, and no number that is not finite.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import MOVES, finite
from fuzz_doors import DOORS
from hostile_values import ODD, WRONG

import imu_fast as imu
from imu_fast.errors import ImuFastError, InputError
from imu_fast.evaluation.datamodels import random_subsets


@pytest.mark.parametrize("name", [name for name in DOORS if name not in MOVES])
def test_right_or_refused(name: str) -> None:
    door, failed = DOORS[name], []
    assert finite(door.call(**door.tensors(), **door.others))
    for argument in door.tensors():
        for kind, make in (WRONG | ODD).items():
            given: dict[str, Any] = door.tensors()
            try:
                given[argument] = make(given[argument])
            except (RuntimeError, NotImplementedError, IndexError, TypeError):
                continue  # torch makes no such tensor of this one
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    if not finite(door.call(**given, **door.others)):
                        failed.append(f"{argument}, {kind}: not finite")
                except ImuFastError:
                    pass
                except Exception as error:
                    failed.append(f"{argument}, {kind}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, True, 1.0, "1", None, np.bool_(True)])
def test_a_seed_is_refused_alike_everywhere(seed: Any) -> None:
    scores = torch.tensor([-1.0, -2.0])
    with pytest.raises(InputError, match="seed="):
        imu.influence_weights(scores, permute=True, seed=seed)
    inputs = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(InputError, match="seed="):
        imu.unlearn(torch.nn.Linear(3, 2), inputs, seed=seed)
    with pytest.raises(InputError, match="seed="):
        random_subsets(6, 2, seed=seed)
    if seed is not None:  # which is the default there
        with pytest.raises(InputError, match="seed="):
            imu.split(inputs, fraction=0.5, seed=seed)


def test_integers_of_numpy_are_seeds() -> None:
    scores = -torch.rand(9)
    ours = imu.influence_weights(scores, permute=True, seed=7)
    theirs = imu.influence_weights(scores, permute=True, seed=np.int64(7))
    assert torch.equal(ours[1], theirs[1])


def test_overflow_is_refused_and_names_the_way_out() -> None:
    """The diagonal of 1e60 is infinite in float32, and what is divided by it was zero."""
    factors = imu.GradientFactors(
        torch.ones(3, 2), torch.full((3, 2), 1e30), torch.arange(4), False
    )
    for curvature in ("fisher_diag", "identity"):
        with pytest.raises(InputError, match="float64"):
            imu.influence_scores(factors, curvature=curvature)
        wide = factors.to(dtype=torch.float64)
        assert torch.isfinite(imu.influence_scores(wide, curvature=curvature)).all()


def test_a_large_damping_underflows_nothing_on_the_way() -> None:
    """delta^2 over the diagonal is 1e-47, zero in float32; the answer, 1e-17, is a number of it."""
    factors = imu.GradientFactors(
        torch.full((2, 1), 1e-15), torch.full((2, 1), 1e15), torch.arange(3), False
    )
    own = imu.self_influence(factors, curvature="fisher_diag", damping=1e17)
    torch.testing.assert_close(own, torch.full((2,), 1e-17), rtol=1e-6, atol=0)


@pytest.mark.parametrize("damping_mode", ["add", "clamp", "relative"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_squares_underflow_in_neither_of_two_factors(damping_mode: str, has_bias: bool) -> None:
    """Of a signal of 1e-24 at an input of 1e18, whose product is 1e-6."""
    generator = torch.Generator().manual_seed(0)
    delta, act = (torch.randn(5, k, generator=generator) for k in (3, 4))
    factors = imu.GradientFactors(delta * 1e-24, act * 1e18, torch.arange(6), has_bias)
    wide = factors.to(dtype=torch.float64)
    diagonal = wide.fisher_diagonal().float()
    torch.testing.assert_close(factors.fisher_diagonal(), diagonal, rtol=1e-5, atol=0)
    spec = imu.FisherDiag(damping=1e-20, damping_mode=damping_mode)
    for call in (imu.influence_scores, imu.self_influence):
        truth = call(wide, curvature=spec).float()
        torch.testing.assert_close(call(factors, curvature=spec), truth, rtol=1e-5, atol=0)


def test_output_curvatures_of_half_precision_are_of_float32() -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    large = torch.full((2,), 1e6)  # beyond what half precision holds
    for dtype in (torch.float16, torch.bfloat16):
        found = imu.OutputCurvature.softmax(p.to(dtype), large)
        torch.testing.assert_close(
            found.diagonal(), imu.OutputCurvature.softmax(p, large).diagonal()
        )
        for made in (
            imu.OutputCurvature.diagonal_of(p.to(dtype)),
            imu.OutputCurvature.dense(p[:, :, None].mul(p[:, None]).to(dtype)),
        ):
            assert made.matrices().dtype == torch.float32
