"""Scores whose solved X is large where the gradients have no part."""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast.curvature import contraction

COUPLED = {
    "kfac": {},
    "ekfac": {},
    "fisher": {},
    "ggn": {"tolerance": 1e-9},
    "ggn_block": {},
}


def _sets(repeats: int, tokens: int = 1, d: int = 24):
    """Samples that span few directions of the inputs, and queries that leave these."""
    generator = torch.Generator().manual_seed(0)
    classes = 5
    weight = torch.randn(classes, d, generator=generator) / d**0.5
    act = torch.randn(6 * tokens, d, generator=generator).repeat(repeats, 1)
    other = torch.randn(7 * tokens, d, generator=generator)
    pick = torch.Generator().manual_seed(1)
    made = []
    for features in (act, other):
        labels = torch.randint(classes, (len(features),), generator=pick)
        offsets = torch.arange(0, len(features) + 1, tokens)
        made.append(imu.GradientFactors.from_head(features, weight, None, labels, offsets=offsets))
    return made


def _off(found, true):
    """Of each query: the error relative to the norm of its scores."""
    return float(((found.double() - true).norm(dim=0) / true.norm(dim=0)).max())


@pytest.mark.parametrize(("tokens", "d"), [(1, 24), (3, 24), (1, 210)])
@pytest.mark.parametrize("name", COUPLED)
def test_pairs_of_queries_out_of_the_span(name, tokens, d):
    samples, queries = _sets(8, tokens, d)
    options = dict(curvature=name, damping=1e-6, damping_mode="relative", **COUPLED[name])
    found = imu.pairwise_influence(samples, queries, **options)
    wide = [x.to(dtype=torch.float64) for x in (samples, queries)]
    true = imu.pairwise_influence(*wide, **options)
    assert found.dtype == torch.float32
    assert _off(found, true) <= 2e-5


@pytest.mark.parametrize("name", COUPLED)
def test_scores_of_a_target_out_of_the_span(name):
    samples, queries = _sets(8)
    options = dict(curvature=name, damping=1e-6, damping_mode="relative", **COUPLED[name])
    found = imu.influence_scores(samples, target=queries, **options)
    wide = [x.to(dtype=torch.float64) for x in (samples, queries)]
    true = imu.influence_scores(wide[0], target=wide[1], **options)
    assert _off(found[:, None], true[:, None]) <= 2e-5


def test_what_does_not_cancel_is_multiplied_once():
    samples, _ = _sets(8)
    precisions = []

    def spied(factors, x, seen):
        precisions.append(x.dtype)
        return contraction.contracted(factors, x, seen)

    x = samples.mean_gradient().double()
    contraction.scores(samples, x, spied)
    assert precisions == [torch.float32]
    generator = torch.Generator().manual_seed(2)
    both = torch.stack([x, torch.randn(x.shape, generator=generator, dtype=x.dtype)])
    both[1] -= both[1] @ torch.linalg.pinv(samples.act.double()) @ samples.act.double()
    precisions.clear()
    found = contraction.scores(samples, both, spied)
    assert precisions == [torch.float32, torch.float64]
    true = contraction.contracted(samples.to(dtype=torch.float64), both, lambda _: None)
    assert float((found - true).abs().max()) <= 1e-6 * float(true.abs().max())
