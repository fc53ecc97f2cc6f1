"""The average gap to a retrained model, and the floor that shows what it does not see."""

import pytest
import torch

from imu_fast.errors import InputError
from imu_fast.evaluation.gap import GAPS, average_gap, random_flips
from imu_fast.evaluation.metrics import distance
from imu_fast.model.outputs import Outputs


def made(n=200, classes=7):
    torch.manual_seed(0)
    logits = torch.randn(n, classes)
    labels = logits.argmax(dim=1)
    labels[:20] = (labels[:20] + 1) % classes  # wrong already
    return Outputs(logits, labels)


def test_the_gap_is_the_mean_of_four_differences():
    ours = dict(zip(GAPS, (0.5, 0.9, 0.8, 0.1), strict=True))
    retrained = dict(zip(GAPS, (0.7, 0.8, 0.8, 0.5), strict=True))
    assert average_gap(ours, retrained) == pytest.approx((0.2 + 0.1 + 0 + 0.4) / 4)
    assert average_gap(ours, ours) == 0
    with pytest.raises(InputError, match="ours has no 'membership'"):
        average_gap({name: 0.5 for name in GAPS[:3]}, retrained)
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(InputError, match=r"retrained\['test_accuracy'\]"):
            average_gap(ours, retrained | {"test_accuracy": bad})


@pytest.mark.parametrize("accuracy", [0.0, 0.25, 0.5, 0.7, 0.9])
def test_flips_reach_the_accuracy_and_touch_nothing_else(accuracy):
    outputs = made()
    flipped = random_flips(outputs, accuracy, seed=3)
    assert flipped.accuracy == pytest.approx(accuracy)
    changed = (flipped.logits != outputs.logits).any(dim=1)
    assert bool(outputs.correct[changed].all()) and not bool(flipped.correct[changed].any())
    assert torch.equal(flipped.logits.sort(dim=1).values, outputs.logits.sort(dim=1).values)
    assert torch.equal(random_flips(outputs, accuracy, seed=3).logits, flipped.logits)
    assert (
        accuracy == 0
        or not torch.equal(random_flips(outputs, accuracy, seed=4).logits, flipped.logits)
        or not bool(changed.any())
    )
    assert distance(flipped, outputs)["kl"] > 0 or not bool(changed.any())


def test_nothing_is_flipped_above_the_accuracy_that_is_there():
    outputs = made()
    assert torch.equal(random_flips(outputs, 0.95).logits, outputs.logits)


def test_bad_input():
    with pytest.raises(InputError, match=r"accuracy=2 must lie in \[0, 1\]"):
        random_flips(made(), 2)
    with pytest.raises(InputError, match="one class"):
        random_flips(Outputs(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)), 0.5)


@pytest.mark.parametrize("accuracy", [0.0, 0.3])
@pytest.mark.parametrize("levels", [1, 2, 4])
def test_flips_of_predictions_that_are_ties(levels, accuracy):
    """Of equal logits the first is predicted: a trade of two that are equal would flip nothing."""
    logits = torch.randint(0, levels, (200, 4), generator=torch.Generator().manual_seed(0)).float()
    outputs = Outputs(logits, logits.argmax(dim=1))
    flipped = random_flips(outputs, accuracy)
    assert flipped.accuracy == pytest.approx(accuracy)
    torch.testing.assert_close(flipped.logits.sort(1).values, logits.sort(1).values)
