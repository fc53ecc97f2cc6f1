"""Random projections: of what size, the same for a seed, and unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.attribution.projection import Projection
from imu_fast.errors import InputError
from imu_fast.factors.indexed import LayerFacts


def layer(classes, inputs, bias=True):
    return LayerFacts("layer", classes, inputs, bias, "float32")


@pytest.mark.parametrize("size", [1, 2, 7, 16, 64, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (128, 128)])
def test_sides(size, shape):
    facts, projection = layer(*shape), Projection(size, 0)
    a, b = projection.sides(facts)
    assert 1 <= a <= facts.num_classes and 1 <= b <= facts.width and a * b <= size
    if facts.num_classes * facts.width <= size:
        assert (a, b) == (facts.num_classes, facts.width)
    left, right = projection.matrices(facts)
    assert left.shape == (a, facts.num_classes) and right.shape == (b, facts.width)
    for matrix in (left, right):  # E[A^T A] = I: columns have unit norm
        torch.testing.assert_close(matrix.square().sum(0), torch.ones(len(matrix.T)).double())


def test_projections_are_what_they_are_said_to_be():
    """``A g B^T`` of gradients that are formed, of samples of several lengths."""
    generator = torch.Generator().manual_seed(0)
    delta, act = (torch.randn(9, k, generator=generator) for k in (6, 5))
    offsets = torch.tensor([0, 3, 3, 4, 9])
    for bias in (True, False):
        f = imu.GradientFactors(delta, act, offsets, bias)
        projection = Projection(6, 3)
        left, right = projection.matrices(f)
        wide = torch.cat([act, torch.ones(9, 1)], dim=1) if bias else act
        for i in range(4):
            rows = slice(int(offsets[i]), int(offsets[i + 1]))
            g = delta[rows].double().T @ wide[rows].double()
            found = projection.rows([f])[i].double()
            torch.testing.assert_close(found, (left @ g @ right.T).flatten(), rtol=1e-5, atol=1e-5)


def test_inner_products_are_unbiased():
    """The mean over seeds is within four standard errors of the inner product, for each pair."""
    generator = torch.Generator().manual_seed(0)
    delta, act = (torch.randn(12, k, generator=generator).double() for k in (9, 8))
    f = imu.GradientFactors(delta, act, torch.tensor([0, 4, 5, 9, 12]), True)
    truth = imu.pairwise_similarity(f, f, metric="product")
    found = []
    for seed in range(600):
        rows = Projection(16, seed).rows([f])
        assert rows.shape == (4, 16)
        found.append(rows @ rows.T)
    each = torch.stack(found)
    error = (each.mean(0) - truth).abs()
    assert (error <= 4 * each.std(0) / math.sqrt(len(each))).all()
    # Of single tokens: (1 + 2/a) (1 + 2/b) - 1 of the squared norm is near the variance.
    flat = imu.GradientFactors(delta, act, torch.arange(13), False)
    norms = torch.stack([Projection(16, s).rows([flat]).square().sum(1) for s in range(600)])
    exact = imu.self_influence(flat, curvature="identity")
    assert (norms.std(0) / exact <= 1.2 * math.sqrt(1.5 * 1.5 - 1)).all()


def test_a_seed_is_the_same_whatever_other_layers_there_are(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    data = torch.randn(9, 5), torch.arange(9) % 3

    def act(name, **options):
        made = imu.build_index(model, data, tmp_path / name, projection=6, **options)
        return next(made.factors()[0].chunks()).act

    both = act("both", layers=["0", "2"])
    assert torch.equal(both, act("again", layers=["0", "2"], chunk_size=9))
    assert torch.equal(both[:, 6:], act("one", layers=["2"]))
    assert not torch.equal(both, act("other", layers=["0", "2"], seed=1))


def test_curvatures_that_projections_have_not(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Linear(5, 3), (torch.randn(9, 5), torch.arange(9) % 3)
    index = imu.build_index(model, data, tmp_path / "a", projection=6)
    queries = index.capture(model, data)
    for name in set(imu.curvatures()) - {"fisher", "identity"}:
        for call in (
            lambda c: index.scores(queries, curvature=c),
            lambda c: index.top(queries, 2, curvature=c),
            lambda c: index.self_influence(curvature=c),
        ):
            with pytest.raises(InputError, match=f"curvature='{name}' is of a layer's outputs"):
                call(name)
    with pytest.raises(InputError, match="queries are no projections of this index"):
        index.scores(imu.capture(model, data))
    other = imu.build_index(model, data, tmp_path / "b", projection=6, seed=1)
    with pytest.raises(InputError, match="queries are no projections of this index"):
        index.scores(other.capture(model, data))
    more = imu.build_index(model, (data[0][:4], data[1][:4]), tmp_path / "c", projection=6)
    assert more.scores(queries).shape == (4, 9)  # other samples, the same projection
    with pytest.raises(InputError, match="k=10 is more than the 9 samples"):
        index.top(queries, 10)
    absolute = index.scores(queries, damping=0.5)
    assert torch.equal(absolute, index.scores(queries, curvature="fisher", damping=0.5))
