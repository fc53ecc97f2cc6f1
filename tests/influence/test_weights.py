"""Which samples are kept, in which order, with which weights: against the oracle, and by hand."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import every_dtype
from hypothesis import example, given, settings
from hypothesis import strategies as st

import imu_fast as imu
from imu_fast import reference
from imu_fast.errors import EmptySelectionError, InputError
from imu_fast.influence.weights import QUANTILE_OVER

every_quantile = pytest.mark.parametrize("over", QUANTILE_OVER)


def check(scores, top_fraction=1.0, clip_quantile=0.93, over="kept"):
    """The indices are the oracle's, and the weights to the rounding of a root and two products.

    Or it is refused: where nothing is negative, or every weight would be clipped to zero.
    """
    arguments = dict(top_fraction=top_fraction, clip_quantile=clip_quantile, quantile_over=over)
    kept, truth = reference.influence_weights(scores, *arguments.values())
    if not any(truth):
        message = "would clip every weight to zero" if kept else "influence scores is negative"
        with pytest.raises(InputError if kept else EmptySelectionError, match=message):
            imu.influence_weights(scores, **arguments)
        return None
    before = scores.clone()
    indices, weights = imu.influence_weights(scores, **arguments)
    assert indices.tolist() == kept
    assert indices.dtype == torch.int64 and weights.dtype == scores.dtype
    truth = torch.tensor(truth, dtype=torch.float64)
    eps = torch.finfo(scores.dtype).eps
    torch.testing.assert_close(weights.double(), truth, rtol=4 * eps, atol=4 * eps * truth.max())
    assert torch.equal(scores, before)
    return indices, weights


def test_by_hand():
    """Four of six are negative; half of them, the largest first, and a quantile of 1 clips none."""
    scores = torch.tensor([-4.0, 2.0, -9.0, -1.0, 0.0, -16.0])
    indices, weights = imu.influence_weights(scores, clip_quantile=1.0)
    assert indices.tolist() == [5, 2, 0, 3] and weights.tolist() == [4, 3, 2, 1]
    indices, weights = imu.influence_weights(scores, 0.5, 1.0)
    assert indices.tolist() == [5, 2] and weights.tolist() == [4, 3]


def test_quantiles_by_hand():
    """Of 1, 2, 3, 4 the median is 2.5; of 0, 0, 1, 2, 3, 4 it is 1.5."""
    scores = torch.tensor([-4.0, 2.0, -9.0, -1.0, 0.0, -16.0])
    _, weights = imu.influence_weights(scores, clip_quantile=0.5)
    assert weights.tolist() == [2.5, 2.5, 2, 1]
    _, weights = imu.influence_weights(scores, clip_quantile=0.5, quantile_over="all")
    assert weights.tolist() == [1.5, 1.5, 1.5, 1]
    # The two that are not among the top are zeros too: 0, 0, 0, 0, 3, 4.
    _, weights = imu.influence_weights(scores, 0.5, 0.7, quantile_over="all")
    torch.testing.assert_close(weights, torch.tensor([1.5, 1.5]))


def test_the_default_is_the_authors_classification_code():
    scores = -(torch.arange(1.0, 102.0).double() ** 2)
    _, weights = imu.influence_weights(scores)
    torch.testing.assert_close(weights.amax(), torch.tensor(94.0).double())
    assert len(weights) == 101 and weights[-1] == 1


@every_quantile
@every_dtype
@pytest.mark.parametrize("n", [1, 2, 13, 1000])
@pytest.mark.parametrize("top_fraction", [1e-9, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("clip_quantile", [0.8, 0.93, 1.0])
def test_random(n, top_fraction, clip_quantile, dtype, over):
    scores = torch.randn(n, dtype=dtype) - 3.0  # nearly all are negative
    scores[0] = -9.0
    check(scores, top_fraction, clip_quantile, over)


@settings(max_examples=300, deadline=None)
@example([-1.0], 1.0, 0.93, torch.float32, "kept")
@example([-1.0] * 7, 0.5, 0.5, torch.float64, "kept")
@example([-2.0, -1.0, -2.0, -1.0, 0.0, -0.0], 0.5, 0.93, torch.float32, "kept")
@example([-1.0] * 100, 0.29, 0.93, torch.float32, "kept")
@given(
    st.lists(
        st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.sampled_from([-2.0, -1.0, 0.0]),
        min_size=1,
        max_size=60,
    ),
    st.floats(0, 1, exclude_min=True) | st.integers(1, 100).map(lambda k: k / 100),
    st.floats(1e-3, 1),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(QUANTILE_OVER),
)
def test_is_the_oracle(values, top_fraction, clip_quantile, dtype, over):
    check(torch.tensor(values, dtype=dtype), top_fraction, clip_quantile, over)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50), st.floats(0.01, 1))
def test_what_holds_of_every_selection(values, top_fraction):
    scores = torch.tensor(values, dtype=torch.float64)
    if not bool((scores < 0).any()):
        return
    indices, weights = imu.influence_weights(scores, top_fraction)
    left = torch.ones(len(scores), dtype=torch.bool)
    left[indices] = False
    kept, others = -scores[indices], -scores[left]
    assert bool((kept > 0).all()) and len(indices.unique()) == len(indices)
    assert bool((kept.diff() <= 0).all()) and bool((weights.diff() <= 0).all())
    assert len(others) == 0 or float(kept.min()) >= float(others.max())
    assert bool((weights > 0).all()) and bool((weights <= kept.sqrt()).all())


@every_dtype
def test_ties_keep_the_samples_order(dtype):
    scores = -torch.randint(1, 4, (5000,)).to(dtype)
    indices, _ = check(scores, 0.37)
    magnitude = -scores[indices]
    same = magnitude.diff() == 0
    assert bool((indices.diff()[same] > 0).all()) and bool(same.any())


@every_dtype
@pytest.mark.parametrize("top_fraction, count", [(1.0, 9), (0.5, 4), (0.01, 1)])
def test_all_equal(top_fraction, count, dtype):
    scores = torch.full((9,), -4.0, dtype=dtype)
    indices, weights = check(scores, top_fraction)
    assert indices.tolist() == list(range(count)) and weights.tolist() == [2.0] * count


def test_one_sample_and_one_negative():
    assert check(torch.tensor([-4.0]))[1].tolist() == [2.0]
    indices, weights = check(torch.tensor([1.0, 0.0, -9.0, 5.0]), 0.1)
    assert indices.tolist() == [2] and weights.tolist() == [3.0]


@pytest.mark.parametrize(
    "top_fraction, negatives, kept",
    [
        (0.29, 100, 29),  # the float product is 28.999999999999996
        (0.57, 100, 57),  # 56.99999999999999
        (0.07, 100, 7),  # 7.000000000000001
        (1 / 3, 3, 1),
        (1 - 0.9, 100, 10),  # 0.09999999999999998
        (1 - 0.9999, 10_000, 1),  # 0.9999999999998899
        (0.29 - 1.7e-16, 100, 29),  # several roundings
        (0.29 - 1e-9, 100, 28),  # more than rounding
        (0.299, 10, 2),  # int, not round
        (0.999999, 100_000, 99_999),
        (0.1, 9, 1),  # at least one
        (5e-324, 3, 1),
        (1.0, 7, 7),
        (math.nextafter(1.0, 0.0), 7, 7),
        (0.5, 3, 1),
    ],
)
def test_how_many_are_kept(top_fraction, negatives, kept):
    scores = torch.cat([torch.ones(2), -torch.arange(1.0, negatives + 1)])
    indices, _ = imu.influence_weights(scores, top_fraction)
    assert indices.tolist() == list(range(negatives + 1, negatives + 1 - kept, -1))
    if negatives <= 100:
        assert len(reference.influence_weights(scores, top_fraction, 1.0)[0]) == kept


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_zero_is_not_negative(kept):
    indices, _ = imu.influence_weights(torch.tensor([0.0, -0.0, -1e-30, 1.0]), kept)
    assert indices.tolist() == [2]


def test_nothing_is_negative():
    scores = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    assert issubclass(EmptySelectionError, InputError)
    with pytest.raises(
        EmptySelectionError, match=r"none of the 3 .*smallest 0.*on_empty='uniform'"
    ):
        imu.influence_weights(scores)
    assert reference.influence_weights(scores, 1.0, 0.93) == ([], [])
    for permute in (False, True):
        with pytest.warns(UserWarning, match="using uniform weights") as caught:
            indices, weights = imu.influence_weights(scores, on_empty="uniform", permute=permute)
        assert caught[0].filename == __file__
        assert indices.tolist() == [0, 1, 2] and weights.tolist() == [1, 1, 1]
        assert weights.dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imu.influence_weights(-scores, on_empty="uniform")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays(dtype):
    indices, weights = imu.influence_weights(torch.tensor([-4.0, 1.0, -9.0]).to(dtype), 1.0, 1.0)
    assert indices.tolist() == [2, 0] and weights.tolist() == [3, 2] and weights.dtype == dtype


def test_more_samples_than_torch_takes_a_quantile_of():
    n = 2**24 + 3
    scores = torch.arange(1, n + 1, dtype=torch.float64).square_().neg_()
    indices, weights = imu.influence_weights(scores)
    assert indices[0] == n - 1 and indices[-1] == 0 and len(indices) == n
    torch.testing.assert_close(float(weights[0]), 1 + 0.93 * (n - 1), rtol=1e-14, atol=0)
    assert weights[-2:].tolist() == [2, 1]


def test_permuted_weights_are_the_same_ones_elsewhere():
    scores = -torch.rand(50, dtype=torch.float64)
    indices, weights = imu.influence_weights(scores, 0.8)
    one, two, again = (
        imu.influence_weights(scores, 0.8, permute=True, seed=seed) for seed in (1, 2, 1)
    )
    for found, moved in (one, two, again):
        assert torch.equal(found, indices)
        assert torch.equal(moved.sort().values, weights.sort().values)
        assert not torch.equal(moved, weights)
    assert torch.equal(one[1], again[1]) and not torch.equal(one[1], two[1])
    state = torch.get_rng_state()
    imu.influence_weights(scores, permute=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_quantile_that_would_clip_everything_to_zero_is_refused():
    scores = torch.cat([torch.ones(99), -torch.ones(1)])
    with pytest.raises(
        InputError, match=r"clip_quantile=0\.93 .*only 1 of 100 samples.*quantile_over='kept'"
    ):
        imu.influence_weights(scores, quantile_over="all")
    assert check(scores, 1.0, 1.0, "all")[1].tolist() == [1.0]
    assert check(scores, 1.0, 0.93, "kept")[1].tolist() == [1.0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(scores=None), "scores is a NoneType"),
        (dict(scores=torch.zeros(0)), r"scores has shape \(0,\)"),
        (dict(scores=torch.zeros(2, 2)), r"scores has shape \(2, 2\)"),
        (dict(scores=torch.tensor(-1.0)), r"scores has shape \(\)"),
        (dict(scores=torch.tensor([-1])), "dtype torch.int64"),
        (dict(scores=torch.tensor([-1.0, torch.nan])), "scores is not finite at sample 1"),
        (dict(scores=torch.tensor([-torch.inf])), "scores is not finite at sample 0"),
        (dict(top_fraction=0.0), r"top_fraction=0.0 must be finite and > 0"),
        (dict(top_fraction=1.5), r"top_fraction=1.5 must lie in \(0, 1\]"),
        (dict(top_fraction="most"), "top_fraction='most' is not a number"),
        (dict(clip_quantile=-0.1), "clip_quantile=-0.1"),
        (dict(clip_quantile=1.01), "clip_quantile=1.01"),
        (dict(clip_quantile=math.nan), "clip_quantile=nan"),
        (dict(quantile_over="some"), "quantile_over='some' is unknown; choose one of kept, all"),
        (dict(on_empty="none"), "on_empty='none' is unknown; choose one of error, uniform"),
        (dict(seed=-1), "seed=-1"),
    ],
)
def test_what_is_refused(change, message):
    arguments = dict(scores=torch.tensor([-1.0, 1.0])) | change
    with pytest.raises(InputError, match=message):
        imu.influence_weights(**arguments)
