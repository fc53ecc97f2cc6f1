"""The most influential samples of each query are those of the matrix of all pairs."""

from __future__ import annotations

import pytest
import torch

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.influence import top
from imu_fast.reference import fisher_diagonal


def factors(n, seed, classes=4, d=6, tokens=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n * tokens, d, generator=generator)
    weight = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (n * tokens,), generator=generator)
    offsets = torch.arange(n + 1) * tokens
    return imu.GradientFactors.from_head(x, weight, torch.zeros(classes), y, offsets)


@pytest.mark.parametrize("curvature", imu.curvatures())
@pytest.mark.parametrize("by", ["helpful", "harmful", "magnitude"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_against_all_pairs(monkeypatch, curvature, by, tokens):
    source, queries = factors(30, 0, tokens=tokens), factors(7, 1, tokens=tokens)
    pairs = imu.pairwise_influence(source, queries, curvature=curvature).T
    keys = {"helpful": -pairs, "harmful": pairs, "magnitude": pairs.abs()}[by]
    wanted = keys.topk(5, dim=1).indices
    for elements in (1 << 24, 60, 1):
        monkeypatch.setattr(top, "_ELEMENTS", elements)
        values, indices = imu.top_influences(source, queries, 5, by=by, curvature=curvature)
        assert torch.equal(indices, wanted)
        torch.testing.assert_close(values, pairs.gather(1, wanted), rtol=1e-4, atol=1e-5)


def test_layers_add_up_and_ties_go_to_the_lower_index():
    layers, queries = [factors(20, s) for s in (0, 1)], [factors(4, s) for s in (2, 3)]
    values, _ = imu.top_influences(layers, queries, 20, curvature="identity")
    pairs = imu.pairwise_influence(layers, queries, curvature="identity").T
    torch.testing.assert_close(values, pairs.sort(dim=1).values)
    # Of whole numbers sums are exact, wherever in a matrix product a row stands.
    one, query = (
        imu.GradientFactors((8 * f.delta).round(), (8 * f.act).round(), f.offsets, True)
        for f in (factors(6, 0), queries[0])
    )
    twice = one.select(torch.tensor([3, 1, 3, 1, 0, 3]))
    _, indices = imu.top_influences(twice, query, 6, curvature="identity")
    for row in indices.tolist():
        assert row.index(0) < row.index(2) < row.index(5) and row.index(1) < row.index(3)


def test_what_is_refused():
    source, queries = factors(5, 0), factors(3, 1)
    for k, message in ((6, "k=6 is more than the 5 samples"), (0, "k=0"), (1.5, "k=1.5")):
        with pytest.raises(InputError, match=message):
            imu.top_influences(source, queries, k)
    with pytest.raises(InputError, match="by='best'"):
        imu.top_influences(source, queries, 1, by="best")
    with pytest.raises(InputError, match="2 layers, source 1"):
        imu.top_influences(source, [queries, queries], 1)
    with pytest.raises(InputError, match="captured? both"):
        imu.top_influences(source, factors(3, 1, d=5), 1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fisher_diagonal_beside_the_mean_gradient(tokens):
    f = factors(12, 0, tokens=tokens)
    wanted = fisher_diagonal(f.delta.double(), f.act.double(), f.offsets, f.has_bias)
    torch.testing.assert_close(f.fisher_diagonal().double(), wanted, rtol=1e-5, atol=1e-8)
