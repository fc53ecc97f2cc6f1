"""Every error comes out of another process as it was raised there."""

from __future__ import annotations

import copy
import pickle

import pytest

import imu_fast as imu
from imu_fast import errors
from imu_fast.factors.probabilities import NoCurvatureError
from imu_fast.model.loss import NoLabelsError


def made():
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    for kind in (*kinds, NoCurvatureError, NoLabelsError, imu.DivergedError):
        if kind is errors.SingularMatrixError:
            yield kind("not definite", pivot=3, index=1, smallest_damping=0.5)
        else:
            yield kind("no such thing")


@pytest.mark.parametrize("error", list(made()), ids=lambda error: type(error).__name__)
def test_an_error_crosses_processes_with_all_that_it_says(error):
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error) and str(again) == str(error)
        assert vars(again) == vars(error)
