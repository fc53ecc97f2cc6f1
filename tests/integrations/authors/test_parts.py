"""The four parts against one sample at a time in float64, and what they do where theirs fail."""

from __future__ import annotations

import copy
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from integrations.tiny import (
    Images,
    filled,
    images,
    llama,
    tokens,
)
from per_sample import assert_scores, sample_gradients
from per_sample import scores as scores_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

import imu_fast as imu
from imu_fast.integrations.authors import classification, markov, tofu

VECTOR = nn.CrossEntropyLoss(reduction="none")


class Two(nn.Module):
    """Two layers with ``fc`` in their names, and one without."""

    def __init__(self):
        super().__init__()
        self.body, self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(torch.tanh(self.body(x)))))


def problem(n=9):
    x = torch.randn(n, 4)
    return Two(), [(x[i], i % 3) for i in range(n)]


def image_loss(model, sample):
    x, y = sample
    return cross_entropy(model(x[None].double()), torch.tensor([y]))


def dense(model, dataset, names=("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")):
    return sample_gradients(model, dataset, names, image_loss)


def test_several_layers_in_the_order_of_the_parameters():
    model, dataset = problem()
    truth = dense(model, dataset)
    inverse = classification.compute_fisher_matrix_from_dataset(model, dataset, default_collate)
    assert_scores(inverse, 1 / (truth.square().mean(0) + 0.01))
    found = classification.compute_influence_weights(model, inverse, dataset, default_collate)
    assert_scores(found, scores_of(truth))
    assert found.device.type == "cpu" and model.training


def test_the_lazy_matrix_acts_as_the_tensor_and_is_made_when_asked():
    model, dataset = problem()
    truth = dense(model, dataset)
    lazy, mean = classification.compute_all_gradients(model, dataset, default_collate)
    vector, many = torch.randn(truth.shape[1]), torch.randn(truth.shape[1], 3)
    assert_scores(mean, truth.mean(0))
    assert_scores(lazy @ vector, truth @ vector.double())
    assert_scores(lazy @ many, truth @ many.double())
    assert_scores((lazy * vector) @ mean, (truth * vector) @ truth.mean(0))
    assert_scores(vector[None] * lazy * vector @ mean, (truth * vector**2) @ truth.mean(0))
    assert_scores(lazy.mean(0), truth.mean(0))
    assert_scores(lazy.mean(dim=0, keepdim=True), truth.mean(0, keepdim=True))
    assert_scores((lazy * vector).mean(0), (truth * vector).mean(0))
    assert_scores(lazy[3], truth[3])
    assert_scores(lazy[-1], truth[-1])
    assert lazy.shape == truth.shape == lazy.size() and len(lazy) == 9
    assert "as factors" in repr(lazy)
    for made in (
        lazy[2:4],
        lazy[torch.tensor([2, 3])],
        torch.stack(list(lazy))[2:4],
        torch.cat([lazy, lazy])[2:4],
        lazy.to(torch.float64)[2:4],
        torch.from_numpy(np.asarray(lazy))[2:4],
        (0 * vector + lazy - 0 * vector)[2:4],
        (lazy * torch.ones(9, 1))[2:4],
    ):
        assert_scores(made, truth[2:4])
    assert_scores(lazy.pow(2).mean(0), truth.square().mean(0))
    assert_scores((lazy**2).sum(dim=0), truth.square().sum(0))
    assert_scores(lazy @ vector, truth @ vector.double())
    assert "in memory" in repr(lazy)
    with pytest.raises(AttributeError):
        _ = lazy.no_such_thing


def test_row_zero_as_theirs():
    model, dataset = problem()
    truth = dense(model, dataset)
    truth[0] = truth.mean(0)
    lazy, mean = classification.compute_all_gradients(
        model, dataset, default_collate, first_row_is_mean=True
    )
    vector = torch.randn(truth.shape[1])
    assert_scores(lazy @ vector, truth @ vector.double())
    assert_scores(lazy.mean(0), truth.mean(0))
    assert_scores(mean, truth[0])
    assert_scores((lazy * vector) @ mean, (truth * vector) @ truth[0])
    assert_scores(lazy.to(torch.float64), truth)


def test_a_data_set_that_draws_random_numbers_is_read_once_in_order_and_goes_on_drawing():
    class Noisy(list):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn(4), y

    model, dataset = problem()
    torch.manual_seed(1)
    noisy = [(x + torch.randn(4), y) for x, y in dataset]
    following = torch.randn(2)
    torch.manual_seed(1)
    inverse = classification.compute_fisher_matrix_from_dataset(
        model, Noisy(dataset), default_collate
    )
    assert torch.equal(torch.randn(2), following)
    assert_scores(inverse, 1 / (dense(model, noisy).square().mean(0) + 0.01))


def test_samples_of_other_shapes_run_apart():
    model = filled(Images())
    dataset = [*images(4), (torch.randn(2, 7, 7), 1)]
    truth = sample_gradients(model, dataset, ["fc.weight", "fc.bias"], image_loss)
    inverse = classification.compute_fisher_matrix_from_dataset(model, dataset, default_collate)
    assert_scores(inverse, 1 / (truth.square().mean(0) + 0.01))


def test_what_has_no_fc_or_more_than_linear_layers_is_refused():
    with pytest.raises(imu.InputError, match="no parameter with 'fc' in its name"):
        classification.get_last_params(nn.Linear(2, 2))
    model = nn.ModuleDict({"fc": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))})
    with pytest.raises(imu.InputError, match="'fc.0.weight'.*belongs to no linear layer"):
        classification.compute_fisher_matrix_from_dataset(model, problem()[1], default_collate)
    model, dataset = problem()
    with pytest.raises(imu.InputError, match=r"inv_fisher_diag is \(3,\); expected the \(53,\)"):
        classification.compute_influence_weights(model, torch.ones(3), dataset, default_collate)
    with pytest.raises(imu.InputError, match="dataset is empty"):
        classification.compute_fisher_matrix_from_dataset(model, [], default_collate)


def test_the_largest_magnitudes_whatever_the_sign():
    dataset = list(range(5))
    subset, indices = classification.select_top_influential_data(
        dataset, torch.tensor([0.1, -3.0, 2.0, -0.5, 0.0]), 0.5
    )
    assert indices.tolist() == [1, 2] and list(subset) == [1, 2]
    _, indices = classification.select_top_influential_data(dataset, np.arange(5.0), 0.01)
    assert indices.tolist() == [4]


def steps_by_hand(model, dataset, weights, names, lr, alpha, rates):
    """Full-batch SGD with momentum 0.9 and weight decay 5e-4, in float64."""
    model = copy.deepcopy(model).double().train()
    parameters = dict(model.named_parameters())
    chosen, velocity = [parameters[name] for name in names], [0.0] * len(names)
    x, y = default_collate(dataset)
    for rate in rates:
        losses = cross_entropy(model(x.double()), y, reduction="none")
        loss = -(weights * losses).sum() / weights.sum()
        loss = loss + alpha * sum(p.abs().sum() for p in chosen)
        gradients = torch.autograd.grad(loss, chosen)
        with torch.no_grad():
            for k, (p, g) in enumerate(zip(chosen, gradients, strict=True)):
                velocity[k] = 0.9 * velocity[k] + g + 5e-4 * p
                p -= lr * rate * velocity[k]
    return model


def test_the_loop_by_hand():
    model, dataset = filled(Images()), images(8)
    truth = sample_gradients(model, dataset, ["fc.weight", "fc.bias"], image_loss)
    scores = scores_of(truth)
    order = [i for i in scores.argsort().tolist() if scores[i] < 0][:4]
    kept = scores[order].neg().sqrt()
    kept = kept.clamp(max=float(torch.quantile(kept, 0.93)))
    args = SimpleNamespace(
        unlearn_lr=0.1, unlearn_epochs=4, alpha=0.01, top_data=0.5, decreasing_lr="3", lr=0.05
    )
    assert int((scores < 0).sum()) in (8, 9)
    args.warmup = 2  # then the rate stays where it has risen to, until the schedule lowers it
    hand = steps_by_hand(
        model,
        [dataset[i] for i in order],
        kept,
        ["fc.weight", "fc.bias"],
        0.05,
        0.01,
        [0.5, 1.0, 1.0, 0.1],
    )
    state = torch.random.get_rng_state()
    model.conv.weight.requires_grad_(False)
    classification.IMU({"forget": DataLoader(dataset, batch_size=3)}, model, None, args)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_scores(model.fc.weight.detach(), hand.fc.weight.detach())
    assert_scores(model.fc.bias.detach(), hand.fc.bias.detach())
    assert not model.training and model.fc.weight.grad is None
    assert model.fc.weight.requires_grad and not model.conv.weight.requires_grad


def unlearned(model, dataset, **options):
    model = copy.deepcopy(model)
    args = SimpleNamespace(unlearn_lr=0.1, unlearn_epochs=2, top_data=1.0)
    mask = options.pop("mask", None)
    classification.IMU({"forget": DataLoader(dataset)}, model, None, args, mask, **options)
    return model


def test_evaluation_mode_leaves_statistics_alone():
    model, dataset = filled(Images()), images()
    drifted, kept = unlearned(model, dataset), unlearned(model, dataset, batchnorm="eval")
    assert torch.equal(kept.bn.running_mean, model.bn.running_mean)
    assert int(drifted.bn.num_batches_tracked) == 4  # two steps, each batch seen twice
    assert not torch.equal(kept.fc.weight, model.fc.weight)


def test_a_mask_holds_parameters():
    model, dataset = filled(Images()), images()
    mask = {"fc.weight": torch.zeros(3, 5), "fc.bias": torch.ones(3)}
    masked = unlearned(model, dataset, mask=mask)
    assert torch.equal(masked.fc.weight[0] == 0, model.fc.weight[0] == 0)
    moved = (masked.fc.weight - model.fc.weight).detach().abs().max()
    assert float(moved) < 1e-3  # weight decay alone
    assert float((masked.fc.bias - model.fc.bias).detach().abs().max()) > 1e-2
    with pytest.raises(imu.InputError, match="mask lacks"):
        unlearned(model, dataset, mask={"fc.bias": torch.ones(3)})


def test_one_selected_sample_is_enough_and_none_is_an_error():
    model, dataset = filled(Images()), images()
    args = SimpleNamespace(top_data=0.01, unlearn_epochs=1)
    before = model.fc.weight.detach().clone()
    classification.IMU({"forget": DataLoader(dataset)}, model, None, args)
    assert not torch.equal(before, model.fc.weight)
    with pytest.raises(imu.InputError, match="none of the 2 influence scores is negative"):
        markov.select_top_negative_influence([1, 2], torch.tensor([0.5, 1.0]), 1.0)


def test_an_error_in_the_loop_leaves_the_model_as_it_was():
    class Fails(Images):
        def forward(self, x):
            if self.training and self.fc.weight[0, 0] != start:
                raise KeyboardInterrupt
            return super().forward(x)

    model = filled(Fails())
    start = float(model.fc.weight.detach()[0, 0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        unlearned_in_place = SimpleNamespace(unlearn_epochs=3)
        classification.IMU({"forget": DataLoader(images())}, model, None, unlearned_in_place)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"criterion": nn.MSELoss()}, "criterion=MSELoss"),
        ({"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)}, "plain cross-entropy"),
        ({"args": SimpleNamespace(rewind_epoch=2)}, "args.rewind_epoch=2"),
        ({"batchnorm": "off"}, "batchnorm='off' is unknown"),
    ],
)
def test_what_the_loop_would_ignore_is_refused(changes, said):
    model = filled(Images())
    given = {"criterion": None, "args": SimpleNamespace(), **changes}
    with pytest.raises(imu.InputError, match=said):
        classification.IMU({"forget": DataLoader(images())}, model, **given)


def test_the_combined_loss_reaches_the_last_parameters_alone():
    model = filled(Images()).train()
    x, y = default_collate(images())
    weight = torch.rand(len(y))
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    args = SimpleNamespace(alpha=0.3)
    loss = classification.compute_combined_loss(model, x, y, weight, VECTOR, args)
    assert model.conv.weight.grad is None and model.conv.weight.requires_grad and model.training
    reference = copy.deepcopy(filled(Images()).train())
    hand = -(weight * VECTOR(reference(x), y)).sum() / weight.sum() + 0.3 * (
        reference.fc.weight.abs().sum() + reference.fc.bias.abs().sum()
    )
    assert torch.allclose(loss, hand)
    loss.backward(), hand.backward()
    assert model.conv.weight.grad is None
    assert torch.allclose(model.fc.weight.grad, reference.fc.weight.grad, atol=1e-6)
    with pytest.raises(imu.InputError, match="a loss per sample"):
        classification.compute_combined_loss(model, x, y, weight, nn.CrossEntropyLoss(), args)
    with pytest.raises(imu.InputError, match="weight sums to 0"):
        classification.compute_combined_loss(model, x, y, 0 * weight, VECTOR, args)


def projections(model, layers):
    return [
        name
        for name, _ in model.named_parameters()
        if any(f"layers.{k}.self_attn" in name for k in layers)
    ]


@pytest.mark.parametrize(
    ("has", "asked", "taken"),
    [(22, None, (19, 20, 21)), (20, None, (19,)), (4, None, (1, 2, 3)), (4, (0, 2), (0, 2))],
)
def test_layers_of_a_language_model(has, asked, taken):
    model = llama(has)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for p in tofu.get_last_params(model, asked)]
    assert found == projections(model, taken) and len(found) == 4 * len(taken)


def test_a_layer_that_is_not_there():
    with pytest.raises(imu.InputError, match=r"layers=\[7\]: the model has no layer \[7\]"):
        tofu.get_last_params(llama(3), [7])
    with pytest.raises(imu.InputError, match="no parameter with 'layers.I'"):
        tofu.get_last_params(Two())


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_a_batch_of_text(shift, left):
    model = llama(3)
    ids, mask, labels = tokens()
    if left:
        ids, mask, labels = ids.flip(1), mask.flip(1), labels.flip(1)

    def loss(model, i):
        logits = model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0]
        target = labels[i]
        if shift:
            logits, target = logits[:-1], target[1:]
        return cross_entropy(logits, target, ignore_index=-100)

    truth = sample_gradients(model, range(len(ids)), projections(model, (0, 1, 2)), loss)
    inverse = tofu.compute_fisher_diag_batch(
        model, ids, labels, 11, shift=shift, attention_mask=mask
    )
    assert_scores(inverse, 1 / (truth.square().mean(0) + 0.01))
    roots = scores_of(truth).clamp(max=0).neg().sqrt()
    found = tofu.compute_influence_for_batch(
        model, ids, labels, 11, "cpu", shift=shift, attention_mask=mask
    )
    assert_scores(found, roots.clamp(max=float(torch.quantile(roots, 0.93))))


def test_labels_that_are_not_shifted_are_spoken_of(caplog):
    ids, _, labels = tokens()
    tofu._warn_unshifted.cache_clear()
    with caplog.at_level(logging.WARNING, "imu_fast"):
        tofu.compute_fisher_diag_batch(llama(2), ids, labels, 11, shift=True)
        assert "pass shift=True" not in caplog.text
        tofu.compute_fisher_diag_batch(llama(2), ids, labels, 11)
    assert "pass shift=True" in caplog.text
    with pytest.raises(imu.InputError, match="state_size=12"):
        tofu.compute_fisher_diag_batch(llama(2), ids, labels, 12)


def test_seeded_loaders():
    args = SimpleNamespace(batch_size=2)
    first = [b.tolist() for b in classification.replace_loader_dataset(torch.arange(6), args)]
    number = random.random()
    again = [b.tolist() for b in classification.replace_loader_dataset(torch.arange(6), args)]
    assert first == again and random.random() == number
