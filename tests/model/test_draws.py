"""Draws by place: uniform, independent of one another, and of nothing but seed and place."""

from __future__ import annotations

import math

import torch

from imu_fast.model.draws import uniform

SAMPLES, ROWS = torch.arange(4000)[:, None], torch.arange(25)


def test_a_draw_is_of_its_place_alone():
    whole = uniform(3, SAMPLES, ROWS)
    assert torch.equal(uniform(3, SAMPLES[70:90], ROWS[4:]), whole[70:90, 4:])
    assert torch.equal(uniform(3, torch.tensor(71), torch.tensor(5)), whole[71, 5])
    others = [uniform(4, SAMPLES, ROWS), uniform(3, SAMPLES, ROWS + 25), uniform(3, ROWS, SAMPLES)]
    assert not any(bool((other == whole)[25:].any()) for other in others)
    assert uniform(2**32 - 1, torch.tensor(2**60)).isfinite()


def test_draws_are_uniform_and_independent():
    u = uniform(0, SAMPLES, ROWS)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    n = u.numel()
    counts = torch.histc(u, 50, 0, 1)
    assert float(((counts - n / 50).square() / (n / 50)).sum()) < 49 + 5 * math.sqrt(2 * 49)
    # Of places beside one another, in either direction, of squares too, and of seeds.
    centred = u - 0.5
    beside = uniform(1, SAMPLES, ROWS) - 0.5
    for a, b in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:].square() - 1 / 12, centred[:-1].square() - 1 / 12),
        (centred, beside),
    ):
        correlation = float((a * b).mean() / (a.std() * b.std()))
        assert abs(correlation) < 5 / math.sqrt(a.numel())
