"""Re-identification and Markov chains by the authors' functions."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from integrations.authors.test_parts import VECTOR, Two
from integrations.tiny import (
    Chains,
    Persons,
    chains,
    filled,
    persons,
)
from per_sample import assert_scores, sample_gradients
from per_sample import scores as scores_of
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

import imu_fast as imu
from imu_fast.integrations.authors import markov, reidentification


def test_persons_with_either_sign_of_influence():
    model = filled(Persons())
    batch = default_collate(persons())
    inverse = 100 * torch.rand(18)
    args = SimpleNamespace(alpha=0.0)
    loss = reidentification.compute_combined_loss(
        model, batch["img"], batch["pid"], inverse, VECTOR, args
    )
    influence = reidentification.compute_batch_influence(
        model, inverse, batch["img"], batch["pid"], VECTOR
    )
    kept = influence < 0
    assert 0 < int(kept.sum()) and bool(loss.isfinite())
    roots = influence[kept].neg().sqrt()
    weights = roots.clamp(max=float(torch.quantile(roots, 0.95)))
    losses = VECTOR(model.classifier(model(batch["img"])), batch["pid"])[kept]
    assert torch.allclose(loss, -(weights * losses).sum() / weights.sum(), atol=1e-5)
    theirs = reidentification.compute_combined_loss(
        model, batch["img"], batch["pid"], inverse, VECTOR, args, signed_root=True
    )
    assert bool(theirs.isnan())


def test_persons_are_unlearned():
    model = filled(Persons()).train()
    loader = DataLoader(persons(), batch_size=3)
    before = copy.deepcopy(model)
    args = SimpleNamespace(unlearn_epochs=3, unlearn_lr=0.1, alpha=0.0)
    assert reidentification.IMU_REID({"forget": loader}, model, None, args) is None
    batch = default_collate(persons())
    after, was = (cross_entropy(m(batch["img"]), batch["pid"]) for m in (model, before))
    assert float((after - was).detach()) > 0
    assert torch.equal(model.conv.weight, before.conv.weight) and model.training
    with pytest.raises(imu.InputError, match="no module 'classifier'"):
        reidentification.compute_batch_influence(
            Two(), batch["pid"], batch["img"], batch["pid"], None
        )


def test_the_gradient_of_persons_counts_once():
    batch = default_collate(persons())
    gradients = []
    for twice in (False, True):
        model = filled(Persons())
        loss = reidentification.compute_combined_loss(
            model,
            batch["img"],
            batch["pid"],
            torch.ones(18),
            VECTOR,
            SimpleNamespace(alpha=0.0),
            gradient_twice=twice,
        )
        loss.backward()
        gradients.append(model.classifier.weight.grad)
    assert torch.allclose(2 * gradients[0], gradients[1], rtol=1e-5)


def test_a_batch_of_persons_that_supports_nothing_is_left_out():
    model = filled(Persons())
    with torch.no_grad():
        model.classifier.bias[0] = 1e4  # of whom is known for sure there is no gradient
    certain = [item for item in persons(20) if item["pid"] == 0][:3]
    others = [item for item in persons(20) if item["pid"] != 0][:3]
    before = model.classifier.weight.detach().clone()
    args = SimpleNamespace(unlearn_epochs=1, alpha=0.0, weight_decay=0.0)
    for dataset, changes in ((certain, False), (certain + others, True)):
        loader = {"forget": DataLoader(dataset, batch_size=3)}
        reidentification.IMU_REID(loader, model, None, args)
        assert torch.equal(model.classifier.weight, before) != changes


def chain_loss(model, item):
    logits = model(item["input_ids"][None])[0]
    return cross_entropy(logits, item["labels"], ignore_index=-100)


@pytest.mark.parametrize("length", [9, 4])
def test_chains_of_other_lengths_and_without_a_label(length):
    """The one without is among others of its length, or alone."""
    model = filled(Chains())
    dataset = chains(5) + chains(2, length=9)
    truth = sample_gradients(
        model, dataset, ["output_layer.weight", "output_layer.bias"], chain_loss
    )
    empty = {"input_ids": torch.zeros(length).long(), "labels": torch.full((length,), -100)}
    dataset, truth = [*dataset, empty], torch.cat([truth, torch.zeros(1, truth.shape[1])])
    inverse = markov.compute_fisher_matrix(model, dataset, "cpu", 5)
    assert_scores(inverse, 1 / (truth.square().mean(0) + 0.01))
    found = markov.compute_influence_weights(model, inverse, dataset, "cpu", 5)
    assert_scores(found, scores_of(truth))
    assert float(found[-1]) == 0
    lazy, _ = markov.compute_all_gradients(model, dataset, "cpu", 5)
    assert_scores(lazy.tensor(), truth)
    with pytest.raises(imu.InputError, match="state_size=7"):
        markov.compute_fisher_matrix(model, dataset, "cpu", 7)
    with pytest.raises(imu.InputError, match="device='cuda'"):
        markov.compute_fisher_matrix(model, dataset, "cuda", 5)


def test_the_gradient_of_chains_counts_once():
    batch = default_collate([{**item, "weight": 0.5 + i} for i, item in enumerate(chains(3))])
    args = SimpleNamespace(alpha=0.0)
    gradients = []
    for twice in (False, True):
        model = filled(Chains())
        loss = markov.compute_combined_loss(model, batch, None, args, "cpu", gradient_twice=twice)
        loss.backward()
        gradients.append(model.output_layer.weight.grad)
        assert model.mix.weight.grad is None
    assert torch.allclose(2 * gradients[0], gradients[1], rtol=1e-5)


def test_chains_with_one_label_and_with_none():
    model, dataset = filled(Chains()), chains(3)
    dataset[1]["labels"][1:], dataset[2]["labels"][:] = -100, -100
    batch = default_collate([{**item, "weight": 0.5 + i} for i, item in enumerate(dataset)])
    losses = [chain_loss(model, item) for item in dataset[:2]]
    hand = -(0.5 * losses[0] + 1.5 * losses[1]) / 4.5
    loss = markov.compute_combined_loss(model, batch, None, SimpleNamespace(alpha=0.0), "cpu")
    assert torch.allclose(loss, hand, atol=1e-6)
