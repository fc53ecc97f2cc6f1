"""Curvatures by name and as objects: what is used and what refused; types: test_typing.py."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES, CurvatureName, CurvatureOptions
from imu_fast.errors import InputError


@pytest.fixture
def factors():
    labels = torch.randint(3, (9,))
    return imu.GradientFactors.from_head(torch.randn(9, 4), torch.randn(3, 4), None, labels)


def test_the_static_names_are_the_tables():
    assert sorted(get_args(CurvatureName)) == sorted(CURVATURES) == imu.curvatures()
    assert all(CURVATURES[name].name == name for name in CURVATURES)
    of_some = {option for name in CURVATURES for option in CURVATURES[name].paths()}
    assert of_some == set(CurvatureOptions.__annotations__)


def test_unknown_names_and_what_is_no_layers_factors(factors):
    with pytest.raises(InputError, match="is unknown.*did you mean fisher_diag"):
        imu.fit("fisher_diagonal", factors)
    with pytest.raises(InputError, match="curvature is the class GGN; pass an object"):
        imu.fit(imu.GGN, factors)
    with pytest.raises(InputError, match="a list of 2 layers; .* fit each"):
        imu.fit("ggn", [factors, factors])
    with pytest.raises(InputError, match="factors is a model .Linear.; capture it first"):
        imu.fit("ggn", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="factors is a Tensor; pass GradientFactors"):
        imu.fit("ggn", torch.ones(3))
