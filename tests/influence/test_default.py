"""The curvature of data attribution where none is named."""

from __future__ import annotations

import logging

import pytest
import torch
from dense_layers import MLP

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.influence import default

RELATIVE = {"damping": 1e-2, "damping_mode": "relative"}


def captured(layers="head", **given):
    torch.manual_seed(0)
    model, x, y = MLP().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    source = imu.capture(model, (x, y), layers, **given)
    return source, imu.capture(model, (x[:4], y[:4]), layers)


@pytest.mark.parametrize(
    ("layers", "given", "spec"),
    [
        ("head", {}, imu.EKFAC(**RELATIVE)),
        (["a", "b", "c"], {"fisher": "sampled"}, imu.EKFAC(**RELATIVE)),
        (["a", "b"], {"fisher": "exact"}, imu.EKFAC(**RELATIVE)),
        (["a", "b", "c"], {}, imu.EKFAC(fisher="empirical", **RELATIVE)),
    ],
    ids=["head", "sampled", "exact", "without signals"],
)
def test_pairs_and_the_best_of_them_have_one_default_which_is_said(layers, given, spec, caplog):
    source, queries = captured(layers, **given)
    with caplog.at_level(logging.INFO, "imu_fast"):
        pairs = imu.pairwise_influence(source, queries)
    assert f"attribution under curvature={spec!r}" in caplog.text
    assert torch.equal(pairs, imu.pairwise_influence(source, queries, curvature=spec))
    values, indices = imu.top_influences(source, queries, 9)
    assert torch.equal(values, pairs.T.sort(dim=1).values)
    assert torch.equal(pairs.T.gather(1, indices), values)


def test_one_layer_without_a_curvature_decides_for_all():
    source, queries = captured(["a", "b"], fisher="sampled")
    source[0] = captured("a")[0]
    spec = imu.EKFAC(fisher="empirical", **RELATIVE)
    assert default.attribution_curvature(source) == spec
    truth = imu.pairwise_influence(source, queries, curvature=spec)
    assert torch.equal(imu.pairwise_influence(source, queries), truth)


def test_a_layer_too_wide_for_eigenvectors_has_the_diagonal(monkeypatch):
    source, queries = captured()
    monkeypatch.setattr(default, "MAX_ORDER", 5)
    truth = imu.pairwise_influence(source, queries, curvature="fisher_diag")
    assert torch.equal(imu.pairwise_influence(source, queries), truth)


def test_scores_for_unlearning_keep_theirs():
    source, _ = captured()
    truth = imu.influence_scores(source, curvature="fisher_diag")
    assert torch.equal(imu.influence_scores(source), truth)


@pytest.mark.parametrize("given", [{"damping": 0.1}, {"damping_mode": "relative"}])
def test_an_option_of_no_curvature_is_refused(given):
    source, queries = captured()
    for door in (
        lambda: imu.pairwise_influence(source, queries, **given),
        lambda: imu.top_influences(source, queries, 1, **given),
    ):
        with pytest.raises(InputError, match="without a curvature.*curvature='ekfac'"):
            door()
