"""Relearning against autograd and by hand; the probe on features that know, and that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from patches import Patches
from torch import nn

from imu_fast.errors import InputError
from imu_fast.evaluation.shallowness import linear_probe, relearning_steps

SCOPES = ["head", "all"]


def network(seed=0):
    torch.manual_seed(seed)
    body = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*body, nn.Linear(16, 3))


def blobs(n=60, seed=1):
    """Three separable classes in six dimensions."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 3 * nn.functional.one_hot(y, 6) + 0.3 * torch.randn(n, 6, generator=generator)
    return x, y


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("lr", "steps"), [(2.0, 1), (1.0, 2), (0.01, 4)])
def test_one_sample_by_hand(scope, lr, steps):
    # z = (0, 2), label 0, p_1 = 0.88. lr=2: z = (1.76, 0.24), right. lr=1: z = (0.88, 1.12), still
    # wrong; then the velocity is 0.9 * 0.88 + 0.56 = 1.35, z = (2.23, -0.23). lr=0.01: not in 4.
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[0.0], [2.0]])
    data = torch.ones(1, 1), torch.tensor([0])
    assert relearning_steps(model, data, target=1.0, lr=lr, max_steps=4, scope=scope) == steps


@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_what_autograd_does(bias):
    # A model that is its own head: both scopes train the same parameters on the same minibatches.
    x = torch.randn(90, 5, dtype=torch.float64)
    y = (x @ torch.randn(5, 4, dtype=torch.float64)).argmax(dim=1)
    model = nn.Linear(5, 4, bias=bias).double()
    found = {
        scope: [
            relearning_steps(
                model, (x, y), target=t, lr=0.05, batch_size=32, max_steps=40, scope=scope
            )
            for t in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
        ]
        for scope in SCOPES
    }
    assert found["head"] == found["all"]
    assert found["head"][-1] == 40 and len(set(found["head"])) > 3


@pytest.mark.parametrize("scope", SCOPES)
def test_ends(scope):
    model = network()
    x, y = blobs()
    assert relearning_steps(model, (x, y), target=0.0, scope=scope) == 0
    assert 0 < relearning_steps(model, (x, y), target=1.0, lr=0.1, scope=scope) < 50
    assert relearning_steps(model, (x, y), target=1.0, lr=1e-9, max_steps=3, scope=scope) == 3
    twins = x[:1].repeat(2, 1), torch.tensor([0, 1])
    assert relearning_steps(model, twins, target=1.0, max_steps=5, scope=scope) == 5
    one_class = x[y == 0], y[y == 0]
    assert relearning_steps(model, one_class, target=1.0, lr=0.1, scope=scope) < 50


@pytest.mark.parametrize("scope", SCOPES)
def test_the_model_is_left_as_it_was(scope):
    model = network().train()
    model[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert relearning_steps(model, blobs(), target=1.0, lr=0.1, scope=scope) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model[0].parameters()] == [False, False]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scope", SCOPES)
def test_a_shuffling_loader_gives_what_tensors_give(scope):
    x, y = blobs()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=7, shuffle=True
    )
    options = {"target": 1.0, "lr": 0.02, "batch_size": 16, "scope": scope}
    steps = relearning_steps(network(), (x, y), **options)
    assert relearning_steps(network(), loader, **options) == steps


def test_a_shallow_edit_comes_back_sooner_than_an_untrained_network():
    x, y = blobs()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model[4].bias.data[0] -= 20  # class 0 is never predicted, and nothing was forgotten
    forget = x[y == 0], y[y == 0]
    edited = relearning_steps(model, forget, target=1.0, lr=0.1, scope="all")
    blank = network(seed=5)
    blank[4].bias.data[0] -= 20
    assert 0 < edited < relearning_steps(blank, forget, target=1.0, lr=0.1, scope="all")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 1.5}, "target=1.5 is an accuracy"),
        ({"target": float("nan")}, "target=nan"),
        ({"lr": 0}, "lr=0 must be"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"scope": "tail"}, "scope='tail' is unknown; choose one of head, all"),
    ],
)
def test_arguments_of_relearning(change, message):
    with pytest.raises(InputError, match=message):
        relearning_steps(network(), blobs(), **{"target": 1.0, **change})


@pytest.mark.parametrize("scope", SCOPES)
def test_descent_that_diverges_has_relearned_nothing(scope):
    model, x, y = network(), torch.ones(60, 6), torch.arange(60) // 59  # not all can be right
    with pytest.raises(InputError, match=r"lr=1e\+38: relearning diverged by step \d"):
        relearning_steps(model, (x, y), target=1.0, lr=1e38, scope=scope, batch_size=10)
    with torch.no_grad():
        model[-1].bias[0] = torch.nan
    with pytest.raises(InputError, match="logits are not finite: the model has diverged"):
        relearning_steps(model, (x, torch.zeros(60).long()), target=0.9, scope=scope)


def test_data_of_relearning():
    with pytest.raises(InputError, match="empty"):
        relearning_steps(network(), [], target=1.0)
    x, _ = blobs(3)
    with pytest.raises(InputError, match="3 samples but 2 labelled"):
        relearning_steps(network(), (x, torch.tensor([0, 1, -100])), target=1.0)


def test_probe_on_features_that_know_and_that_do_not():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    mask = torch.rand(400, generator=generator) < 0.5
    noise = torch.randn(400, 8, generator=generator)
    assert linear_probe(1e-3 * nn.functional.one_hot(y, 8) + 1e-5 * noise, y, mask) == 1.0
    assert linear_probe(noise, y, mask) < 0.45
    assert linear_probe(noise, y, mask, seed=3) == linear_probe(noise, y, mask, seed=3)
    assert linear_probe(noise, y, mask, seed=3) != linear_probe(noise, y, mask, seed=4)


def test_probe_on_degenerate_features():
    y = torch.tensor([0] * 30 + [1] * 10)
    mask = y == 1
    constant = torch.ones(40, 3)
    assert linear_probe(constant, y, mask) == 0.0  # all that is left is the larger class
    assert linear_probe(constant, y, ~mask) == 1.0
    everything = torch.ones(40, dtype=torch.bool)
    assert linear_probe(torch.randn(40, 3), torch.zeros(40, dtype=int), everything) == 1.0
    # One forget sample to train on and one to test; bfloat16 features.
    x = nn.functional.one_hot(y, 3).bfloat16()
    two = torch.zeros(40, dtype=torch.bool)
    two[-2:] = True
    assert linear_probe(x, y, two) == 1.0


def test_probe_bounds_what_it_trains_on(monkeypatch):
    linear_model = pytest.importorskip("sklearn.linear_model")
    sizes = []
    fit = linear_model.LogisticRegression.fit

    def recorded(self, x, y, *args):
        sizes.append(x.shape)
        return fit(self, x, y, *args)

    monkeypatch.setattr(linear_model.LogisticRegression, "fit", recorded)
    mask = torch.arange(3600) < 101
    linear_probe(torch.randn(3600, 2), torch.arange(3600) % 2, mask)
    assert sizes == [(50 + 1500, 2)]


@pytest.mark.parametrize(
    ("features", "labels", "mask", "message"),
    [
        (torch.ones(4), torch.zeros(4), torch.ones(4) > 0, r"pass \[N, d\], \[N\] and \[N\]"),
        (torch.ones(4, 2), torch.zeros(3), torch.ones(4) > 0, r"labels \(3,\)"),
        (torch.ones(4, 2), torch.zeros(4), torch.ones(3) > 0, r"forget_mask \(3,\)"),
        (torch.ones(4, 2), torch.zeros(4), torch.ones(4), "float32; pass a tensor .N. of bool"),
        (torch.ones(4, 2), torch.zeros(4), torch.arange(4) < 1, "marks 1 samples"),
        (torch.ones(4, 2) / 0, torch.zeros(4), torch.ones(4) > 0, "features is not finite"),
    ],
)
def test_arguments_of_the_probe(features, labels, mask, message):
    with pytest.raises(InputError, match=message):
        linear_probe(features, labels.long(), mask)


def by_torch(model, x, y, scope, lr, batch_size, steps):
    """Steps of torch's SGD, in float64; samples twice, which changes no mean."""
    model = copy.deepcopy(model).double().eval()
    x, chosen = x.double(), model[4] if scope == "head" else model
    optimizer = torch.optim.SGD(chosen.parameters(), lr=lr, momentum=0.9)
    generator, batches = torch.Generator().manual_seed(0), []
    for step in range(steps):
        if bool((model(x).argmax(1) == y).all()):
            return step
        batches = batches or list(torch.randperm(len(x), generator=generator).split(batch_size))
        rows = batches.pop(0).repeat(2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return steps


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_resolution_of_half_precision_add_up(dtype, scope):
    """Rounded away, what was hardly gone takes longer, or would never come back."""
    model = network().to(dtype)
    model[4].bias.data[0] -= 1
    x, y = (part[::3] for part in blobs())  # class 0
    x, options = x.to(dtype), {"lr": 3e-4, "batch_size": 8, "max_steps": 250}
    expected = by_torch(model, x, y, scope, 3e-4, 8, 250)
    assert 80 < expected < 240
    steps = relearning_steps(model, (x, y), target=1.0, scope=scope, **options)
    assert abs(steps - expected) <= 2


def test_batches_of_one_sample_are_those_of_a_larger_one():
    """torch's CPU backward of a batch norm is wrong for one sample alone on some versions."""
    torch.manual_seed(0)
    model = Patches().double().eval()
    x, y = torch.randn(6, 2, 5, 5).double(), torch.zeros(6).long()
    model.fc.bias.data[0] -= 4
    options = {"target": 1.0, "scope": "all", "lr": 0.05, "max_steps": 200}
    alone = relearning_steps(model, (x[:1], y[:1]), **options)
    assert 3 < alone < 200
    assert alone == relearning_steps(model, (x[:1].repeat(2, 1, 1, 1), y[:2]), **options)


def test_a_head_that_is_not_what_makes_the_logits_is_refused():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return 3 * torch.tanh(self.fc(x) / 3)

    model, (x, y) = Capped(), blobs()
    with pytest.raises(InputError, match="logits were linear in it; here .*tanh.*scope='all'"):
        relearning_steps(model, (x, y), target=1.0)
    assert relearning_steps(model, (x, y), target=1.0, lr=0.1, scope="all") < 50


def test_the_probe_takes_no_labels_of_ignore_index():
    y = torch.where(torch.arange(40) < 5, -100, 1)
    with pytest.raises(InputError, match="leave these rows out"):
        linear_probe(torch.randn(40, 3), y, torch.arange(40) < 10)
