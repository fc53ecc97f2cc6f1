"""Scores of single tokens: shares of their samples'."""

from __future__ import annotations

import pytest
import torch
from dense_layers import Attention
from torch import nn
from torch.nn import functional as F

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.ops.tokens import sum_over_tokens

SPECS = ["identity", "fisher_diag", "fisher", "ggn", "ggn_block", "kfac", "ekfac"]


def sequences():
    torch.manual_seed(0)
    ids, labels = torch.randint(5, (2, 4, 5))
    labels[0, :2] = labels[2, 1:] = -100
    return Attention().double(), ids, labels


@pytest.mark.parametrize("curvature", SPECS)
@pytest.mark.parametrize("layer", ["head", "qkv"])
def test_tokens_of_a_sample_add_up_to_its_score(curvature, layer):
    model, ids, labels = sequences()
    more = {} if layer == "head" else {"fisher": "sampled"}
    f = imu.capture(model, (ids, labels), layer, shift=False, **more)
    scores = imu.influence_scores(f, curvature=curvature)
    tokens = imu.influence_scores(f, curvature=curvature, per="token")
    assert tokens.shape == (f.num_tokens,) and len(tokens) > f.n
    torch.testing.assert_close(sum_over_tokens(tokens, f.offsets), scores)
    pairs = imu.pairwise_influence(f, f.samples(1, 3), curvature=curvature)
    tokens = imu.pairwise_influence(f, f.samples(1, 3), curvature=curvature, per="token")
    assert tokens.shape == (f.num_tokens, 2)
    torch.testing.assert_close(sum_over_tokens(tokens, f.offsets), pairs)


def test_a_token_of_the_head_is_its_own_losses_gradient():
    """By autograd: the derivative of the token's loss over its sample's number of them."""
    model, ids, labels = sequences()
    f = imu.capture(model, (ids, labels), shift=False)
    found = imu.influence_scores(f, curvature="identity", per="token")
    parameters = [model.fc.weight, model.fc.bias]
    rows = []
    for sample, wanted in zip(model(ids), labels, strict=True):
        valid = (wanted != -100).nonzero().flatten()
        for t in valid:
            loss = F.cross_entropy(sample[t], wanted[t]) / len(valid)
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    g = torch.stack(rows)
    torch.testing.assert_close(found, -(g @ g.sum(dim=0)) / f.n)
    direct = imu.influence_scores(
        model, (ids, labels), shift=False, curvature="identity", per="token"
    )
    torch.testing.assert_close(direct, found)


def test_a_vocabulary_whose_signal_is_not_stored():
    x, weight, offsets = torch.randn(7, 4), torch.randn(9, 4), torch.tensor([0, 3, 3, 7])
    labels = torch.randint(9, (7,))
    made = [
        imu.GradientFactors.from_head(x, weight, None, labels, offsets, implicit=implicit)
        for implicit in (True, False)
    ]
    head, stored = (imu.influence_scores(f, per="token") for f in made)
    torch.testing.assert_close(head, stored)
    torch.testing.assert_close(
        sum_over_tokens(head, offsets), imu.influence_scores(made[0]), rtol=1e-4, atol=1e-6
    )


def test_what_has_no_tokens_is_refused():
    model, ids, labels = sequences()
    layers = imu.capture(model, (ids, labels), ["qkv", "up"], shift=False)
    with pytest.raises(InputError, match="per='token' of 2 layers"):
        imu.influence_scores(layers, per="token")
    with pytest.raises(InputError, match="per='token' of 2 layers"):
        imu.pairwise_influence(layers, layers, per="token")
    with pytest.raises(InputError, match="per='tokens'"):
        imu.influence_scores(layers[0], per="tokens")
    with pytest.raises(InputError, match="first_row_is_mean=True"):
        imu.influence_scores(layers[0], per="token", first_row_is_mean=True)


@pytest.mark.parametrize("size", [2, 6], ids=["by group", "by column"])
def test_a_layer_of_several_groups_has_no_tokens(size):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4 * (size - 1) ** 2, 3)
    )
    data = torch.randn(3, 4, size, size), torch.tensor([0, 1, 2])
    f = imu.capture(model, data, "0")
    for made in (imu.influence_scores, lambda x, **how: imu.pairwise_influence(x, x, **how)):
        with pytest.raises(InputError, match="per='token' of layer '0'.*several groups.*'sample'"):
            made(f, per="token")
