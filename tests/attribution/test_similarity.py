"""Cosines and products of gradients, against dense per-sample gradients in float64."""

from __future__ import annotations

from dataclasses import replace

import per_sample
import pytest
import torch
from cases import LargestTensor, Pieces, every_case, head_factors
from torch import nn

import imu_fast as imu
from imu_fast import reference
from imu_fast.errors import InputError

cosine = torch.nn.functional.cosine_similarity


def dense(*layers):
    parts = [
        reference.sample_gradients(f.delta, f.act, f.offsets, f.has_bias).flatten(1) for f in layers
    ]
    return torch.cat(parts, dim=1)


@every_case
def test_pairs_and_targets_are_those_of_dense_gradients(case):
    f = head_factors(case)
    queries = f.select(torch.arange(f.n).flip(0)[:5])
    g, h = dense(f), dense(queries)
    found = imu.pairwise_similarity(f, queries)
    torch.testing.assert_close(found, cosine(g[:, None], h, dim=2, eps=1e-300))
    torch.testing.assert_close(
        imu.similarity_scores(f, target=queries), cosine(g, h.mean(dim=0)[None], dim=1, eps=1e-300)
    )
    pieces = Pieces(f, 3)
    torch.testing.assert_close(imu.pairwise_similarity(pieces, Pieces(queries, 2)), found)
    torch.testing.assert_close(imu.similarity_scores(pieces), imu.similarity_scores(f))


def test_products_are_influence_under_the_identity_with_the_other_sign():
    f = head_factors_of_size(30)
    q = f.select(torch.tensor([3, 1]))
    torch.testing.assert_close(
        imu.pairwise_similarity(f, q, metric="product"),
        -imu.pairwise_influence(f, q, curvature="identity"),
    )
    torch.testing.assert_close(
        imu.similarity_scores(f, target=q, metric="product"),
        -imu.influence_scores(f, curvature="identity", target=q),
    )


def head_factors_of_size(n, dtype=torch.float64):
    x, w, b = torch.randn(n, 6), torch.randn(4, 6), torch.randn(4)
    y = torch.randint(4, (n,))
    return imu.GradientFactors.from_head(x.to(dtype), w.to(dtype), b.to(dtype), y)


def test_layers_are_one_vector_with_one_norm():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(23, 5), torch.randint(3, (23,))

    def loss(m, sample):
        return nn.functional.cross_entropy(m(sample[0].double()[None]), sample[1][None])

    names = [name for name, _ in model.named_parameters()]
    truth = per_sample.sample_gradients(model, list(zip(x, y, strict=True)), names, loss)
    layers = imu.capture(model, (x, y), layers=["0", "2"])
    queries = imu.capture(model, (x[:4], y[:4]), layers=["0", "2"])
    found = imu.pairwise_similarity(layers, queries)
    torch.testing.assert_close(found.double(), cosine(truth[:, None], truth[:4], dim=2), **CLOSE)
    scores = imu.similarity_scores(model, (x, y), target=queries, layers=["0", "2"])
    target = truth[:4].mean(dim=0)[None]
    torch.testing.assert_close(scores.double(), cosine(truth, target, dim=1), **CLOSE)


CLOSE = dict(rtol=1e-5, atol=1e-6)


def test_a_gradient_whose_square_is_no_float32_has_its_direction():
    f = head_factors_of_size(9, torch.float32)
    small = torch.logspace(-37, 0, 9)[:, None]
    scaled = replace(f, delta=f.delta * small, labels=None, losses=None, loss=None)
    found, truth = imu.pairwise_similarity(scaled, scaled), imu.pairwise_similarity(f, f)
    torch.testing.assert_close(found, truth, **CLOSE)
    assert float(found.diagonal().min()) > 1 - 1e-6
    target = scaled.select(torch.tensor([0]))
    torch.testing.assert_close(imu.similarity_scores(scaled, target=target), truth[:, 0], **CLOSE)


def test_zero_gradients_are_like_nothing():
    f = head_factors_of_size(5)
    f = replace(f, delta=f.delta * torch.tensor([1, 0, 1, 0, 1.0])[:, None])
    for found in (imu.pairwise_similarity(f, f), imu.similarity_scores(f)[:, None]):
        assert bool(torch.isfinite(found).all()) and bool((found[[1, 3]] == 0).all())
        assert bool((found[0] != 0).any())
    assert bool((imu.similarity_scores(f, target=torch.zeros(4, 7)) == 0).all())


def test_no_gradient_of_a_single_sample_is_formed():
    n, d, c = 40, 300, 50
    f = imu.GradientFactors.from_head(
        torch.randn(n, d), torch.randn(c, d), None, torch.randint(c, (n,))
    )
    with LargestTensor() as seen:
        imu.pairwise_similarity(f, f)
        imu.similarity_scores(f, target=f)
    assert seen.largest <= max(n * d, c * d)


def test_refusals():
    f = head_factors_of_size(5)
    other = imu.GradientFactors.from_head(
        torch.randn(3, 5).double(), torch.randn(4, 5).double(), None, torch.zeros(3).long()
    )
    with pytest.raises(InputError, match="metric='cos' is unknown; choose one of cosine, product"):
        imu.pairwise_similarity(f, f, metric="cos")
    with pytest.raises(InputError, match="metric="):
        imu.similarity_scores(f, metric="cos")
    with pytest.raises(InputError, match="queries has layers"):
        imu.pairwise_similarity(f, other)
    with pytest.raises(InputError, match="queries has layers"):
        imu.pairwise_similarity([f, f], f)
    with pytest.raises(InputError, match="target has layers"):
        imu.similarity_scores(f, target=other)
