"""Weights inside a training step, against one sample at a time; the step itself is undisturbed."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from per_sample import assert_scores, sample_gradients
from per_sample import scores as scores_of
from torch import nn
from torch.nn.functional import cross_entropy

import imu_fast as imu


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Text(nn.Module):
    """Logits [B, T, 7]; ``factor`` of them is what stands behind the head."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.embed, self.head, self.factor = nn.Embedding(7, 6), nn.Linear(6, 7), factor

    def features(self, ids):
        return torch.tanh(self.embed(ids).cumsum(1))

    def forward(self, ids):
        return self.factor * self.head(self.features(ids))


def batch(n=9):
    return torch.randn(n, 5), torch.arange(n) % 3


def text(n=5, length=6):
    ids = torch.randint(7, (n, length))
    labels = ids.clone()
    labels[1, 4:], labels[2, :] = -100, -100
    return ids, labels


def dense(scores, clip=0.93):
    roots = scores.clamp(max=0).neg().sqrt()
    return roots.clamp(max=float(torch.quantile(roots[scores < 0], clip)))


def loss_of_row(model, sample):
    x, y = sample
    return cross_entropy(model(x[None].double()), y[None])


@pytest.mark.parametrize(
    ("layers", "names"),
    [("head", ["head"]), ("body.4", ["body.4"]), (["body.0", "head"], ["body.0", "head"])],
)
@pytest.mark.parametrize("clip", [0.93, 0.5])
def test_weights_of_a_batch(layers, names, clip):
    model, (x, y) = Net().train(), batch()
    parameters = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    truth = sample_gradients(model, zip(x, y, strict=True), parameters, loss_of_row)
    found = imu.batch_weights(model, (x, y), layers=layers, clip_quantile=clip)
    assert found.shape == y.shape and not found.requires_grad
    assert_scores(found, dense(scores_of(truth), clip))


def sequence_loss(shift):
    def loss(model, sample):
        ids, labels = sample
        logits = model(ids[None])[0]
        if shift:
            logits, labels = logits[:-1], labels[1:]
        if not (labels != -100).any():
            return (0 * logits).sum()
        return cross_entropy(logits, labels, ignore_index=-100)

    return loss


@pytest.mark.parametrize("shift", [False, True])
def test_weights_of_sequences(shift):
    model, (ids, labels) = Text(), text()
    truth = sample_gradients(
        model, zip(ids, labels, strict=True), ["head.weight", "head.bias"], sequence_loss(shift)
    )
    expected = dense(scores_of(truth))
    assert_scores(imu.batch_weights(model, (ids, labels), shift=shift), expected)
    criterion = imu.InfluenceWeightedLoss(model.head, shift=shift)
    criterion(model.features(ids), labels)
    assert_scores(criterion.weights, expected)
    assert float(expected[2]) == 0


def test_a_step_that_is_under_way_goes_on_as_if_nothing_had_been():
    model, (x, y) = Net().train(), batch()
    other = copy.deepcopy(model)
    gradients = []
    for one, weighs in ((model, True), (other, False)):
        torch.manual_seed(3)
        one.head.bias.grad = torch.ones(3)
        loss = cross_entropy(one(x), y)
        if weighs:
            imu.batch_weights(one, (x, y))
            imu.batch_weights(one, {"x": x, "labels": y}, layers=["body.0"])
        loss.backward()
        noise = torch.rand(2)
        gradients.append([noise, *(p.grad for p in one.parameters()), *one.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_factors_cost_no_pass():
    model, (x, y) = Net().eval(), batch()
    features = torch.tanh(model.body(x)).detach()
    factors = imu.GradientFactors.from_head(features, model.head.weight, model.head.bias, y)
    assert torch.allclose(imu.batch_weights(factors), imu.batch_weights(model, (x, y)), atol=1e-6)
    both = imu.batch_weights([factors, factors])
    assert torch.allclose(both, 2**0.5 * imu.batch_weights(factors), atol=1e-6)


def test_the_log_says_a_thing_once_for_each_model(caplog):
    class Tied(Text):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

    first, second, batch = Tied(), Tied(), text()
    with caplog.at_level(logging.INFO, "imu_fast"):
        for model in (first, first, second, first):
            imu.batch_weights(model, batch, layers=["head"])
    said = [r.getMessage() for r in caplog.records if "shares its weight" in r.getMessage()]
    assert len(said) == 2
    assert not logging.getLogger("imu_fast").filters


def against(n=4):
    """A batch and factors of which none supports forgetting: without a gradient."""
    delta, act = torch.zeros(n, 3), torch.randn(n, 5)
    return imu.GradientFactors(delta, act, torch.arange(n + 1), False)


def test_a_batch_in_which_none_supports_forgetting():
    assert imu.batch_weights(against()).tolist() == [0.0] * 4
    assert imu.batch_weights(against(), on_empty="uniform").tolist() == [1.0] * 4
    with pytest.raises(imu.InputError, match="none of the 4 influence scores is negative"):
        imu.batch_weights(against(), on_empty="error")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, b: imu.batch_weights(m), "batch=None"),
        (lambda m, b: imu.batch_weights(against(), b), "batch is only used with a model"),
        (lambda m, b: imu.batch_weights(m, b, on_empty="skip"), "on_empty='skip' is unknown"),
        (lambda m, b: imu.batch_weights(m, b, clip_quantile=0), "clip_quantile=0"),
        (lambda m, b: imu.batch_weights(m, b, solver="cg"), "no option solver"),
        (lambda m, b: imu.InfluenceWeightedLoss(m), "head is a Net"),
        (lambda m, b: imu.InfluenceWeightedLoss(m.head, objective="npo"), "objective='npo'"),
        (lambda m, b: imu.InfluenceWeightedLoss(m.head, shift="no"), "shift='no'"),
    ],
)
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(imu.InputError, match=said):
        call(Net(), batch())


@pytest.mark.parametrize("objective", ["ce", "log1mp", "margin"])
@pytest.mark.parametrize("given", [False, True])
def test_the_loss_and_its_gradient(objective, given):
    model, (ids, labels) = Text().double(), text()
    criterion = imu.InfluenceWeightedLoss(model.head, objective=objective, shift=True)
    assert not list(criterion.parameters())
    features = model.features(ids)
    loss = criterion(features, labels, model.head(features) if given else None)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    values = []
    for i in range(len(ids)):
        z, y = model(ids)[i, :-1], labels[i, 1:]
        z, y = z[y != -100], y[y != -100]
        p = z.softmax(1).gather(1, y[:, None])[:, 0]
        others = z.scatter(1, y[:, None], -torch.inf)
        f = {
            "ce": -p.log(),
            "log1mp": (1 - p).log(),
            "margin": -(z.gather(1, y[:, None])[:, 0] - others.amax(1)).clamp_min(0),
        }[objective]
        values.append(f.sum() / max(len(y), 1))
    weights = imu.batch_weights(model, (ids, labels), shift=True)
    hand = -(weights * torch.stack(values)).sum() / weights.sum()
    hand.backward()
    assert torch.allclose(loss, hand)
    assert all(torch.allclose(a, p.grad) for a, p in zip(found, model.parameters(), strict=True))


def test_a_loss_without_a_weight_is_zero_and_so_is_its_gradient():
    model, (ids, labels) = Text(), text()
    loss = imu.InfluenceWeightedLoss(model.head)(model.features(ids), torch.full_like(labels, -100))
    loss.backward()
    assert float(loss.detach()) == 0 and float(model.head.weight.grad.abs().max()) == 0


def test_logits_of_another_head_are_refused():
    model, (ids, labels) = Text(factor=0.5), text()
    criterion = imu.InfluenceWeightedLoss(model.head)
    with pytest.raises(imu.InputError, match=r"logits are not head\(features\)"):
        criterion(model.features(ids), labels, model(ids))
    with pytest.raises(imu.InputError, match="logits have shape"):
        criterion(model.features(ids), labels, model(ids)[0])
    with pytest.raises(imu.InputError, match="features have shape"):
        criterion(model.features(ids), labels[:, 1:])


def test_half_precision_under_autocast():
    model, (ids, labels) = Text(), text()
    criterion = imu.InfluenceWeightedLoss(model.head, shift=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.features(ids).bfloat16()
        loss = criterion(features, labels, model.head(features))
    exact = imu.InfluenceWeightedLoss(model.head, shift=True)(model.features(ids), labels)
    assert loss.dtype == torch.float32 and abs(float(loss / exact) - 1) < 0.05


class Cosine(nn.Linear):
    def forward(self, input):
        norm = nn.functional.normalize
        return 5 * nn.functional.linear(norm(input, dim=1), norm(self.weight, dim=1))


def hooked(kind):
    head = nn.Linear(6, 3)
    if kind == "before":
        head.register_forward_pre_hook(lambda m, args: (2 * args[0] - 1,))
    else:
        head.register_forward_hook(lambda m, args, output: 0.2 * output)
    return head


@pytest.mark.parametrize(
    "make", [lambda: Cosine(6, 3, bias=False), lambda: hooked("before"), lambda: hooked("after")]
)
@pytest.mark.parametrize("given", [False, True])
def test_a_head_that_is_not_linear_in_its_inputs_is_refused(make, given):
    head, features, y = make(), torch.randn(9, 6), torch.arange(9) % 3
    criterion = imu.InfluenceWeightedLoss(head)
    with pytest.raises(imu.InputError, match=r"not act W\^T \+ b.*batch_weights"):
        criterion(features, y, head(features) if given else None)
