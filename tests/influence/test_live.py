"""Weights at layers from a step's own forward pass: the same numbers, and what they cost."""

from __future__ import annotations

import copy

import language_models as lm
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import imu_fast as imu
from imu_fast.errors import InputError

T, D, C = 5, 6, 3


class Net(nn.Module):
    """``mix`` moves samples to other places on the way to the second layer, and back."""

    def __init__(self, mix=None):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, 8), nn.Linear(8, 8), nn.Linear(8, C)
        self.mix = mix

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.mix is None:
            return self.head(torch.relu(self.b(h)).mean(1))
        order = order_of(h)
        h = self.mix(torch.relu(self.b(self.mix(h, order))), order.argsort())
        return self.head(h.mean(1))


def step(model, x, y, weigh):
    """Gradients of one weighted step, its weights, and how many passes went before its own."""
    model.zero_grad()
    with imu.live_weights(model, ["a", "b"], on_empty="uniform") as live:
        logits = model(x)
    weights = live(logits, y) if weigh else torch.ones(len(y))
    (weights * cross_entropy(logits, y, reduction="none")).sum().backward()
    return [p.grad for p in model.parameters()], weights


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_those_of_a_capture_and_the_step_goes_on(frozen):
    model, x, y = Net(), torch.randn(9, T, D), torch.arange(9) % C
    model.head.requires_grad_(not frozen)
    model.a.weight.requires_grad_(not frozen)
    found, weights = step(model, x, y, weigh=True)
    torch.testing.assert_close(
        weights, imu.batch_weights(model, (x, y), layers=["a", "b"], on_empty="uniform")
    )
    other = copy.deepcopy(model)
    other.zero_grad()
    (weights * cross_entropy(other(x), y, reduction="none")).sum().backward()
    for one, p in zip(found, other.parameters(), strict=True):
        assert (one is None) == (p.grad is None)
        if one is not None:
            torch.testing.assert_close(one, p.grad)


STEPS = []


def passes_of(monkeypatch, model, steps):
    """Backward passes that the weights of each step took; they are always the right ones."""
    passes, counted, grad = [], [], torch.autograd.grad

    def counting(*args, **kwargs):
        passes.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    STEPS.clear()
    for _ in range(steps):
        STEPS.append(1)
        x, y = torch.randn(9, T, D), torch.arange(9) % C
        passes.clear()
        _, weights = step(model, x, y, weigh=True)
        counted.append(len(passes))
        truth = imu.capture(copy.deepcopy(model), [(x, y)], layers=["a", "b"])
        torch.testing.assert_close(weights, imu.batch_weights(truth, on_empty="uniform"))
        with torch.no_grad():
            model.a.weight += 0.01 * torch.randn_like(model.a.weight)
    return counted


def test_rows_are_tested_at_first_and_now_and_then(monkeypatch):
    counted = passes_of(monkeypatch, Net(), 24)
    assert counted[:4] == [2, 2, 2, 2] and counted[4:].count(2) <= 2 and 1 in counted


def order_of(h):
    """As they come in the first steps, as if by chance; later by what they are."""
    return torch.arange(len(h)) if len(STEPS) < 7 else h[:, 0, 0].detach().argsort()


def by_value(h, order):
    return h[order]


def by_matrix(h, order):
    return (torch.eye(len(h))[order] @ h.flatten(1)).view_as(h)


def by_mask(h, order):
    return (torch.eye(len(h))[order][:, :, None] * h.flatten(1)).sum(1).view_as(h)


@pytest.mark.parametrize("mix", [by_value, by_matrix, by_mask])
def test_samples_that_are_moved_by_what_they_are_get_no_proof(mix, monkeypatch):
    """Rows of sample i stand at another place, a different one in each batch."""
    model = Net(mix)
    assert passes_of(monkeypatch, model, 12) == [2] * 12


def test_one_graph_under_two_shapes():
    """As many positions as samples: another order of the axes is another graph."""
    model = Net(lambda h, order: h.transpose(0, 1))
    straight, n = Net(), T
    straight.load_state_dict(model.state_dict())
    for _ in range(8):
        x, y = torch.randn(n, T, D), torch.arange(n) % C
        for one in (model, straight):
            found = imu.capture(one, [(x, y)], layers=["b"])[0]
            torch.testing.assert_close(found.act.view(n, T, 8), torch.tanh(one.a(x)))


def test_what_a_language_models_step_costs():
    """Counted: the three products of the chosen layers, and the pass through what is above."""
    model, data = lm.make("llama"), lm.batch("llama", 8)
    names = [f"model.layers.1.self_attn.{k}_proj" for k in "qkvo"]
    inputs = {k: v for k, v in data.items() if k != "labels"}

    def flops(weigh):
        with FlopCounterMode(display=False) as count:
            with imu.live_weights(model, names, shift=True, on_empty="uniform") as live:
                logits = model(**inputs).logits
            weights = live(logits, data["labels"]) if weigh else torch.ones(8)
            losses = cross_entropy(
                logits[:, :-1].transpose(1, 2), data["labels"][:, 1:], reduction="none"
            )
            (weights[:, None] * losses).sum().backward()
        return count.get_total_flops(), weights

    for _ in range(5):
        scored, weights = flops(True)
    expected = imu.batch_weights(model, data, layers=names, on_empty="uniform")
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    tokens, width, hidden = 8 * lm.LENGTH, 16, 32
    own = 3 * 4 * 2 * tokens * width**2
    above = 2 * tokens * (width * lm.VOCABULARY + 3 * width * hidden + width**2)
    above += 5 * 2 * tokens * lm.LENGTH * width  # attention, recomputed from what it kept
    plain, _ = flops(False)
    assert 0 < scored - plain <= own + above < plain


def test_the_weighted_loss_costs_no_more_than_its_head():
    head, features, labels = nn.Linear(16, 40), torch.randn(32, 9, 16), torch.randint(40, (32, 9))
    criterion = imu.InfluenceWeightedLoss(head)
    with FlopCounterMode(display=False) as count:
        criterion(features.requires_grad_(), labels).backward()
    assert count.get_total_flops() <= 2 * 3 * 2 * 32 * 9 * 16 * 40


def test_what_cannot_be_said_is_refused():
    model, x, y = Net(), torch.randn(4, T, D), torch.arange(4) % C
    with imu.live_weights(model, "a") as live:
        pass
    with pytest.raises(InputError, match="no layer has run"):
        live(model(x), y)
    with imu.live_weights(model, "a") as live:
        logits = model(x)
    with pytest.raises(InputError, match="shift='auto'"):
        live(logits[:, None].expand(-1, 2, -1), torch.zeros(4, 2).long())
    with pytest.raises(InputError, match="no graph"):
        live(logits.detach(), y)
    with pytest.raises(InputError, match="output says"), imu.live_weights(model, "a", output=0):
        pass


@pytest.mark.parametrize("ran", [False, True], ids=["new", "has run"])
@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
@pytest.mark.parametrize("layers", [["a"], ["a", "b"], ["head"]])
def test_a_compiled_model_is_watched_as_it_was(how, ran, layers):
    """Compiled code calls no hooks that came after it; afterwards it is compiled again."""
    model, x, y = Net(), torch.randn(9, T, D), torch.arange(9) % C
    want = imu.batch_weights(model, (x, y), layers=layers)
    modules = [model.get_submodule(name) for name in layers]
    run = torch.compile(model, backend="eager") if how == "whole" else model
    if how == "in place":
        model.compile(backend="eager")
    elif how == "a part":
        for module in (model.a, model.b, model.head):
            module.compile(backend="eager")
    if ran:
        run(x).sum().backward()
    with imu.live_weights(run, modules) as live:
        logits = run(x)
    torch.testing.assert_close(live(logits, y), want)
    logits.sum().backward()
    run(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(x)
