"""Outputs, membership attacks and distances against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from imu_fast.errors import InputError
from imu_fast.evaluation.evaluate import evaluate
from imu_fast.evaluation.metrics import distance, membership, membership_accuracy, roc_auc
from imu_fast.model.outputs import Outputs, outputs_of


def with_confidence(*p):
    """Two-class outputs whose samples, all labelled 0, have these p_y."""
    p = torch.tensor(p, dtype=torch.float64)
    return Outputs(torch.stack([p.log(), (1 - p).log()], dim=1), torch.zeros(len(p), dtype=int))


def test_outputs_of_two_samples():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]], dtype=torch.float64)
    outputs = Outputs(logits, torch.tensor([0, 0]))
    wanted = torch.tensor([0.75, 0.25], dtype=torch.float64)
    torch.testing.assert_close(outputs.confidence, wanted)
    torch.testing.assert_close(outputs.loss, -wanted.log())
    torch.testing.assert_close(outputs.probabilities, torch.stack([wanted, wanted.flip(0)]))
    assert outputs.correct.tolist() == [True, False] and outputs.accuracy == 0.5
    assert outputs.mean_loss == pytest.approx(math.log(16 / 3) / 2)


def test_outputs_of_saturated_and_single_class_logits():
    outputs = Outputs(torch.tensor([[1e30, -1e30], [1e30, -1e30]]), torch.tensor([0, 1]))
    assert outputs.confidence.tolist() == [1, 0] and outputs.loss[0] == 0
    assert math.isfinite(outputs.mean_loss) and outputs.accuracy == 0.5
    alone = Outputs(torch.randn(3, 1), torch.zeros(3, dtype=int))
    assert alone.accuracy == 1 and alone.mean_loss == 0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=int), r"\(2, 3\) and labels \(3,\)"),
        (torch.zeros(2, 4, 3), torch.zeros(2, dtype=int), r"pass \[n, C\] and \[n\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=int), "are empty"),
        (torch.zeros(2, 3).half(), torch.zeros(2, dtype=int), "float16; pass float32"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"labels\[1\]=3 is outside \[0, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2), r"labels has dtype torch.float32; .* int64"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), "1 labels are ignore_index"),
    ],
)
def test_outputs_are_checked(logits, labels, message):
    with pytest.raises(InputError, match=message):
        Outputs(logits, labels)


def test_outputs_of_a_model_and_its_modes():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    model.train()[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(7, 4), torch.arange(7) % 3
    outputs = outputs_of(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not outputs.logits.requires_grad and torch.equal(outputs.labels, y)
    torch.testing.assert_close(outputs.logits, model.eval()(x).detach())
    with pytest.raises(InputError, match="loader is empty"):
        outputs_of(model, [])


def test_half_precision_is_widened_and_a_model_that_has_diverged_is_refused():
    model = nn.Linear(4, 3).bfloat16()
    data = torch.randn(5, 4).bfloat16(), torch.arange(5) % 3
    assert outputs_of(model, data).logits.dtype == torch.float32
    nn.init.constant_(model.weight, math.nan)
    with pytest.raises(InputError, match=r"logits are not finite at sample 0 \(5 of 5 samples\)"):
        evaluate(model, data)


def test_membership_of_two_samples_each():
    # Of the pairs (forget, unseen) three of four are in order; the distributions differ most,
    # by a half, between 0.3 and 0.6.
    found = membership(
        with_confidence(0.9, 0.6), with_confidence(0.95, 0.85), with_confidence(0.8, 0.3)
    )
    assert found["auc"] == 0.75 and found["ks"] == 0.5
    assert 0 <= found["svc"] <= 1


def test_membership_at_its_ends():
    high, low = with_confidence(0.9, 0.95, 0.99), with_confidence(0.1, 0.2)
    assert membership(high, high, low) == {"auc": 1, "ks": 1, "svc": 1}
    assert membership(low, high, low) == {"auc": 0.5, "ks": 0, "svc": 0}
    past = membership(low, high, high)
    assert past["auc"] == 0 and past["ks"] == 1
    same = membership(*[with_confidence(0.7, 0.7, 0.7)] * 3)
    assert same["auc"] == 0.5 and same["ks"] == 0 and same["svc"] in (0, 1)


def test_membership_does_not_hide_ties_of_saturated_confidence():
    sure = Outputs(torch.tensor([[1e4, 0.0]]).repeat(5, 1), torch.zeros(5, dtype=int))
    assert membership(sure, sure, sure)["auc"] == 0.5


def test_the_attack_trains_on_a_bounded_balanced_seeded_subsample(monkeypatch):
    svm = pytest.importorskip("sklearn.svm")
    sizes = []

    class Recorded(svm.SVC):
        def fit(self, x, y):
            sizes.append((len(x), sum(y)))
            return super().fit(x, y)

    monkeypatch.setattr(svm, "SVC", Recorded)
    p = torch.rand(2500, dtype=torch.float64)
    retain, unseen, forget = (
        with_confidence(*part.tolist()) for part in p.split([1200, 1100, 200])
    )
    first = membership(forget, retain, unseen, seed=1)
    assert first == membership(forget, retain, unseen, seed=1)
    assert sizes == [(2000, 1000)] * 2
    sides = retain.confidence, unseen.confidence, forget.confidence
    assert first["svc"] == membership_accuracy(*sides, seed=1, max_samples=1000)
    membership_accuracy(*sides)
    assert sizes[-1] == (2200, 1100)
    with pytest.raises(InputError, match="max_samples=0"):
        membership_accuracy(*sides, max_samples=0)


def test_distance_of_two_samples():
    ours, reference = with_confidence(0.9, 0.4), with_confidence(0.6, 0.8)
    kl = [
        0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1),
        0.8 * math.log(0.8 / 0.4) + 0.2 * math.log(0.2 / 0.6),
    ]
    found = distance(ours, reference)
    # Sorted, the confidences are 0.4, 0.9 and 0.6, 0.8: moved by 0.2 and 0.1.
    assert found["w1"] == pytest.approx(0.15)
    assert found["kl"] == pytest.approx(sum(kl) / 2)
    assert found["agreement"] == 0.5


def test_distance_is_zero_to_itself_and_finite_when_saturated():
    outputs = Outputs(100 * torch.randn(50, 7), torch.arange(50) % 7)
    assert distance(outputs, outputs) == {"w1": 0, "kl": 0, "agreement": 1}
    alone = Outputs(torch.randn(3, 1), torch.zeros(3, dtype=int))
    assert distance(alone, Outputs(alone.logits + 1, alone.labels)) == distance(alone, alone)
    sure = Outputs(torch.tensor([[1e4, 0.0]]), torch.tensor([0]))
    wrong = Outputs(torch.tensor([[0.0, 1e4]]), torch.tensor([0]))
    assert distance(wrong, sure) == {"w1": 1, "kl": 1e4, "agreement": 0}


def test_models_are_compared_on_the_same_samples():
    outputs = Outputs(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
    with pytest.raises(InputError, match=r"\(3, 2\) and reference \(2, 2\)"):
        distance(outputs, Outputs(torch.zeros(2, 2), torch.tensor([0, 1])))
    with pytest.raises(InputError, match="differ first at sample 1"):
        distance(outputs, Outputs(torch.zeros(3, 2), torch.tensor([0, 0, 0])))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_diverged_model_is_an_error_that_says_so(position):
    sets = [with_confidence(0.5, 0.6)] * 3
    sets[position] = Outputs(torch.tensor([[0.0, 0.0], [math.nan, 0.0]]), torch.tensor([0, 0]))
    name = ("forget", "retain", "unseen")[position]
    with pytest.raises(InputError, match=f"{name}.logits is not finite at sample 1"):
        membership(*sets)
    if position < 2:
        with pytest.raises(InputError, match="logits is not finite at sample 1"):
            distance(*sets[:2])


@pytest.mark.parametrize("n", [1, 2, 7, 200])
@pytest.mark.parametrize("m", [1, 3, 311])
@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
def test_roc_auc_is_sklearns_with_all_ties(n, m, levels):
    metrics = pytest.importorskip("sklearn.metrics")
    positive, negative = (torch.randint(0, levels, (k,)).float() / levels for k in (n, m))
    member = [1] * n + [0] * m
    expected = metrics.roc_auc_score(member, torch.cat([positive, negative]).numpy())
    assert roc_auc(positive, negative) == pytest.approx(expected, abs=1e-12)
    pairs = (positive[:, None] - negative).sign().double()
    assert roc_auc(positive, negative) == pytest.approx(float((pairs.mean() + 1) / 2), abs=1e-12)


def test_roc_auc_refuses_what_has_no_order():
    some = torch.rand(3)
    for bad in (torch.zeros(0), torch.tensor([0.5, torch.nan]), torch.zeros(2, 2)):
        with pytest.raises(InputError, match="positive has shape"):
            roc_auc(bad, some)
        with pytest.raises(InputError, match="negative has shape"):
            roc_auc(some, bad)
    assert roc_auc(torch.tensor([torch.inf, 1.0]), torch.tensor([0.0, -torch.inf])) == 1.0


def test_evaluate_by_hand():
    import imu_fast as imu

    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(5, 3), torch.randn(20, 5), torch.arange(20) % 3
    found, logits = imu.evaluate(model, (x, y)), model(x).detach()
    assert found["accuracy"] == float((logits.argmax(1) == y).double().mean()) and found["n"] == 20
    expected = float(torch.nn.functional.cross_entropy(logits, y))
    assert abs(found["loss"] - expected) < 1e-6
    torch.testing.assert_close(found["confidence"], logits.softmax(1)[torch.arange(20), y])


def test_the_attack_learns_on_what_is_held_out_of_kept_classes():
    g = torch.Generator().manual_seed(0)

    def between(n, low, high):
        return with_confidence(*(low + (high - low) * torch.rand(n, generator=g)).tolist())

    retain, heldout = between(200, 0.8, 0.99), between(150, 0.5, 0.9)
    forget, unseen = between(50, 0.01, 0.2), between(40, 0.01, 0.2)
    default = membership(forget, retain, unseen)
    found = membership(forget, retain, unseen, heldout=heldout)
    assert (default["auc"], default["ks"]) == (found["auc"], found["ks"])
    confidences = (retain.confidence, heldout.confidence, forget.confidence)
    assert found["svc"] == membership_accuracy(*confidences, max_samples=1000)
    assert default == membership(forget, retain, unseen, heldout=unseen)


@pytest.mark.parametrize("size", [1e4, 1e38, 1.7e308])
def test_distance_of_extreme_logits_is_a_number(size):
    z = torch.tensor([[size, -size, 0.0], [-size, size, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    assert not math.isnan(distance(Outputs(-z, labels), Outputs(z, labels))["kl"])
    assert distance(Outputs(z, labels), Outputs(z, labels))["kl"] == 0
