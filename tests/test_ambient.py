"""Whose code may run in a call, and the random numbers that it may draw."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import imu_fast as imu
from imu_fast.ambient import is_data
from imu_fast.losses.cross_entropy import CrossEntropy


class Mine(CrossEntropy):
    pass


class Drawing(torch.Tensor):
    pass


def factors(loss="cross_entropy"):
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    return imu.GradientFactors.from_head(x, torch.randn(2, 3), None, y, loss=loss)


def endless():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value", [None, 1, "ggn", torch.ones(2), factors(), [factors()], imu.GGN(damping=0.1), (), {}]
)
def test_numbers_and_our_own_are_data(value):
    assert is_data(value)
    assert is_data({"source": [value]})


OTHERS = {
    "function": print,
    "class": CrossEntropy,
    "another's loss": Mine(),
    "factors with another's loss": factors(Mine()),
    "a subclass of tensors": torch.ones(2).as_subclass(Drawing),
    "generator": iter([1]),
    "model": torch.nn.Linear(1, 1),
    "array of objects": np.array([print], dtype=object),
    "in itself": endless(),
    "many": [0] * 1000,
}


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_anything_else_is_not(value):
    assert not is_data(value)
    assert not is_data((factors(), {"x": value}))


class Draws(CrossEntropy):
    """A loss that draws, of another's package."""

    def recovered(self, delta, labels):
        random.random(), np.random.rand(), torch.rand(1)
        return super().recovered(delta, labels)


@pytest.mark.parametrize("loss", ["cross_entropy", Draws()], ids=["ours", "another's"])
def test_no_random_stream_is_moved_by_scores_of_factors(loss):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    known = factors()
    known = imu.GradientFactors(
        known.delta,
        known.act,
        known.offsets,
        known.has_bias,
        known.labels,
        loss=CrossEntropy() if isinstance(loss, str) else loss,
    )

    def seeded():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seeded()
    want = drawn()
    seeded()
    imu.influence_scores(known, curvature="kfac")
    assert drawn() == want
