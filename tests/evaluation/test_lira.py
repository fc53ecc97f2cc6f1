"""The likelihood-ratio attack, against loops over samples and scipy's normal distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

import imu_fast as imu
from imu_fast.evaluation.lira import lira, scaled_confidence
from imu_fast.model.outputs import Outputs

nan = math.nan


@pytest.fixture
def confidences():
    """Of an attacked model [n], of models without [m, n] and with each sample [k, n]."""
    g = torch.Generator().manual_seed(0)
    out = torch.randn(6, 9, generator=g, dtype=torch.float64)
    inside = 1.5 + 0.5 * torch.randn(5, 9, generator=g, dtype=torch.float64)
    out[0, :4], inside[1, 2] = nan, nan
    return torch.randn(9, generator=g, dtype=torch.float64), out, inside


def by_loops(t, out, inside, pooled):
    def normal(values):
        columns = [[v for v in column if not math.isnan(v)] for column in values.T.tolist()]
        means = [float(np.mean(c)) for c in columns]
        if pooled:
            squares = sum((v - m) ** 2 for c, m in zip(columns, means, strict=True) for v in c)
            spread = math.sqrt(squares / sum(len(c) - 1 for c in columns))
            return means, [spread] * len(columns)
        return means, [float(np.std(c, ddof=1)) for c in columns]

    means, spreads = normal(out)
    found = []
    for i, value in enumerate(t.tolist()):
        z = (value - means[i]) / spreads[i]
        if inside is None:
            found.append(norm.ppf(norm.cdf(z)))
        else:
            of_in = [part[i] for part in normal(inside)]
            found.append(norm.logpdf(value, *of_in) - norm.logpdf(value, means[i], spreads[i]))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("variance", ["global", "sample", "auto"])
@pytest.mark.parametrize("online", [False, True])
def test_scores_are_those_of_loops(confidences, variance, online):
    t, out, inside = confidences
    inside = inside if online else None
    expected = by_loops(t, out, inside, pooled=variance != "sample")
    torch.testing.assert_close(lira(t, out, inside, variance=variance), expected, rtol=1e-9, atol=0)


def test_auto_takes_each_samples_own_spread_where_models_are_many():
    g = torch.Generator().manual_seed(1)
    t, out = torch.randn(3, generator=g), torch.randn(64, 3, generator=g)
    assert torch.equal(lira(t, out), lira(t, out, variance="sample"))
    assert torch.equal(lira(t, out[:63]), lira(t, out[:63], variance="global"))


def test_a_sample_without_models_has_no_score(confidences):
    t, out, _ = confidences
    out[:, 3] = nan
    out[1:, 5] = nan
    found = lira(t, out)
    assert found.isnan().tolist() == [i in (3, 5) for i in range(9)], "one is not enough"
    assert torch.equal(found.isnan(), lira(t, out, variance="sample").isnan())


@pytest.mark.parametrize("variance", ["global", "sample"])
@pytest.mark.parametrize("models", [2, 3, 6, 10, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_that_agree_have_no_spread_whatever_their_number(models, variance, dtype):
    """The mean of equal numbers may round to another, and a spread of 1e-17 scores 1e15."""
    t = torch.tensor([0.5, 0.1, 3.0, -0.3], dtype=dtype)
    out = torch.tensor([0.1, 0.7, 1.1, 2.3], dtype=dtype).repeat(models, 1)
    for column in (slice(0, 1), slice(1, 2), slice(None)):
        with pytest.raises(imu.InputError, match="there is no spread"):
            lira(t[column], out[:, column], variance=variance)
    absent = torch.cat([out[:, :1], torch.full((1, 1), nan, dtype=dtype)])
    with pytest.raises(imu.InputError, match="there is no spread"):
        lira(t[:1], absent, variance=variance)


def test_scaled_confidence_does_not_saturate():
    logits = torch.tensor([[40.0, 0.0, 0.0], [0.0, 1e4, 0.0], [-1e4, 0.0, 5.0], [0.1, 0.2, 0.3]])
    labels = torch.tensor([0, 1, 0, 2])
    found = scaled_confidence(Outputs(logits, labels))
    log_p = torch.log_softmax(logits.double(), 1)[range(4), labels]
    assert float(found[3]) == pytest.approx(float(log_p[3] - torch.log1p(-log_p[3].exp())))
    tail = -1e4 - math.log1p(math.exp(-5)) - 5
    assert found[:3].tolist() == pytest.approx([40 - math.log(2), 1e4 - math.log(2), tail])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(target=torch.tensor([0.0, nan])), "target has shape"),
        (dict(target=torch.zeros(2, 1)), "target has shape"),
        (dict(out=torch.zeros(3, 3)), r"pass \[models, 2\]"),
        (dict(out=torch.full((3, 2), math.inf)), "is infinite"),
        (dict(out=torch.randn(1, 2)), "no sample has two models"),
        (dict(out=torch.ones(3, 2)), "there is no spread"),
        (dict(variance="mine"), "variance='mine' is unknown"),
    ],
)
def test_bad_input_is_refused(change, match):
    given = {"target": torch.zeros(2), "out": torch.randn(3, 2)} | change
    with pytest.raises(imu.InputError, match=match):
        lira(given.pop("target"), given.pop("out"), **given)
    with pytest.raises(imu.InputError, match="one class"):
        scaled_confidence(Outputs(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)))
