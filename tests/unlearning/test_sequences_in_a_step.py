"""Scores of sequences inside an ascent's own step: their cost, and a capture beside them."""

from __future__ import annotations

import language_models as lm
import pytest
import torch

import imu_fast as imu

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [False, True])
def test_scores_inside_a_step_cost_the_heads_share_of_it(tied):
    """Counted: no more than what the head itself costs, forward and twice backward."""
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode
    data = lm.batch("llama", 8)

    def flops(steps, weights, **options):
        count = counter(display=False)
        with count:
            imu.unlearn(
                lm.make("llama", tied),
                [data],
                imu.Ascent(weights=weights, scope=imu.Network(), batch_size=8, max_steps=steps),
            )
        return count.get_total_flops()

    plain = flops(3, imu.Uniform()) - flops(2, imu.Uniform())
    scored = flops(3, imu.Influence(reweight="batch")) - flops(2, imu.Influence(reweight="batch"))
    head = 3 * 2 * 8 * (lm.LENGTH - 1) * lm.VOCABULARY * 16
    assert 0 < scored - plain <= head < plain


@pytest.mark.parametrize("objective", ["ce", "npo", "simnpo", "relabel"])
def test_scores_inside_a_step_are_those_of_a_capture(objective, monkeypatch):
    """Several batches, some of their samples, in the order of their magnitudes."""
    from imu_fast.unlearning.ascent.network import NetworkSteps

    data = lm.batch("llama", 12)
    options = {"scope": "all", "reweight": "batch", "batch_size": 5, "epochs": 2, "lr": 0.01}
    inside = imu.unlearn(lm.make("llama"), [data], objective=objective, **options)
    monkeypatch.setattr(NetworkSteps, "seen", lambda self, rows, layers: self.subject)
    captured = imu.unlearn(lm.make("llama"), [data], objective=objective, **options)
    for (name, a), (_, b) in zip(
        inside.model.named_parameters(), captured.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert inside.steps == captured.steps
    torch.testing.assert_close(inside.batch_losses, captured.batch_losses, rtol=1e-4, atol=1e-5)


ATTENTION = [f"model.layers.1.self_attn.{k}_proj" for k in "qkvo"]


def flops_of(work):
    counter = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode
    with counter(display=False) as count:
        work()
    return count.get_total_flops()


def activations_share(tokens, width, hidden, vocabulary, length):
    """One backward pass to the last layer's q, k, v: head, MLP, attention; no weight's gradient."""
    head = 2 * tokens * width * vocabulary
    mlp = 3 * 2 * tokens * width * hidden
    attention = 5 * 2 * tokens * length * width + 2 * tokens * width**2
    return head + mlp + attention


def test_scores_of_layers_inside_a_step_cost_their_share_of_it():
    """Counted: three products of the layers' size, and the backward pass down to them, once."""
    data = lm.batch("llama", 8)

    def steps(count, weights):
        model, scope = lm.make("llama"), imu.Layers(layers=ATTENTION)
        ascent = imu.Ascent(weights=weights, scope=scope, batch_size=8, max_steps=count, epochs=99)
        return flops_of(lambda: imu.unlearn(model, [data], ascent))

    live = imu.Influence(reweight="batch", scored="trained")
    plain = steps(9, imu.Uniform()) - steps(8, imu.Uniform())
    scored = steps(9, live) - steps(8, live)
    tokens, width = 8 * lm.LENGTH, 16
    own = 3 * 4 * 2 * tokens * width**2
    reach = activations_share(tokens, width, 32, lm.VOCABULARY, lm.LENGTH)
    assert 0 < scored - plain <= own + reach < plain


@pytest.mark.parametrize("objective", ["ce", "npo"])
def test_scores_of_layers_inside_a_step_are_those_of_a_capture(objective, monkeypatch):
    from imu_fast.unlearning.ascent.network import NetworkSteps

    data = lm.batch("llama", 12)
    options = {"scope": "layers", "layers": ATTENTION, "reweight": "batch", "scored": "trained"}
    options |= {"objective": objective, "batch_size": 5, "epochs": 3, "lr": 0.01}
    inside = imu.unlearn(lm.make("llama"), [data], **options)
    monkeypatch.setattr(NetworkSteps, "seen", lambda self, rows, layers: self.subject)
    captured = imu.unlearn(lm.make("llama"), [data], **options)
    for (name, a), (_, b) in zip(
        inside.model.named_parameters(), captured.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert inside.steps == captured.steps > 3
