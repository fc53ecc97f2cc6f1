"""Heads whose large logits are not computed: the same factors, or the ordinary way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.factors.implicit_head import ImplicitHead

D, C = 6, 50


class Language(nn.Module):
    """Features, a head, and what the model does with its logits: ``then(self, head, features)``."""

    def __init__(self, then=None, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lm_head = nn.Linear(4, D), nn.Linear(D, C, bias=bias)
        self.then = then
        self.rows = []

    def forward(self, x):
        a = torch.tanh(self.body(x))
        self.rows.append(len(x))
        return self.lm_head(a) if self.then is None else self.then(self, a)


@pytest.fixture
def large(monkeypatch):
    """Logits of more than two rows are large, and every signal is made where it is needed."""
    monkeypatch.setattr("imu_fast.model.calls.SMALL_BYTES", 2 * C * 4)
    monkeypatch.setattr("imu_fast.factors.gradient_factors.IMPLICIT_BYTES", 1)


@pytest.fixture
def computed(monkeypatch):
    """The shapes of what the head's own products gave, [rows, C]."""
    seen = []
    real = nn.functional.linear

    def linear(x, weight, bias=None):
        out = real(x, weight, bias)
        if out.shape[-1] == C:
            seen.append(out.numel() // C)
        return out

    monkeypatch.setattr(nn.functional, "linear", linear)
    return seen


def sequences():
    x, y = torch.randn(8, 5, 4), torch.randint(C, (8, 5))
    y[1, 2:] = y[3] = -100
    return [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]


def images():
    return [(torch.randn(5, 4), torch.randint(C, (5,))) for _ in range(3)]


def stored(model, batches, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr("imu_fast.model.calls.SMALL_BYTES", 1 << 30)
        patch.setattr("imu_fast.factors.gradient_factors.IMPLICIT_BYTES", 1 << 40)
        return imu.capture(model, batches, **options)


def same(found, truth):
    assert isinstance(truth, imu.GradientFactors)
    assert torch.equal(found.offsets, truth.offsets) and found.name == truth.name
    for curvature in ("fisher_diag", "identity"):
        torch.testing.assert_close(
            imu.influence_scores(found, curvature=curvature),
            imu.influence_scores(truth, curvature=curvature),
            rtol=1e-4,
            atol=1e-6,
        )
    torch.testing.assert_close(found.losses, truth.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data", [sequences, images])
@pytest.mark.parametrize("shift", [False, True])
def test_logits_are_not_computed_and_factors_are_the_same(
    data, shift, large, computed, monkeypatch
):
    if shift and data is images:
        pytest.skip("has no positions")
    model, batches = Language(), data()
    truth = stored(model, batches, monkeypatch, shift=shift)
    del computed[:]
    found = imu.capture(model, batches, shift=shift)
    # A first look at some samples; of every batch, only the dtype of no rows.
    assert isinstance(found, ImplicitHead)
    assert max(computed[:-1]) == (5 if data is sequences else 1)
    alone = [0] if data is sequences else [1]  # the first sample's, of few rows
    assert computed[-5:-1] == [0, *alone, 0, 0]  # and last our own sweep
    same(found, truth)
    assert "forward" not in vars(model.lm_head) and not model.lm_head._forward_hooks


WORKS_WITH_ITS_LOGITS = {
    "temperature": lambda self, a: self.lm_head(a) / 2,
    "softcap": lambda self, a: 3 * torch.tanh(self.lm_head(a) / 3),
    "in place": lambda self, a: self.lm_head(a).mul_(2),
    "converted": lambda self, a: self.lm_head(a).double(),
    "another order": lambda self, a: self.lm_head(a.transpose(0, 1)).transpose(0, 1),
    "in some batches": lambda self, a: self.lm_head(a) * (1 if float(a.sum()) > 0 else 2),
    "in later batches": lambda self, a: (
        self.lm_head(a) + 0.5 if len(self.rows) > 2 else self.lm_head(a)
    ),
    "in large batches": lambda self, a: self.lm_head(a) * 3 if len(a) > 2 else self.lm_head(a),
    "twice": lambda self, a: self.lm_head(a if len(a) < 3 else a + 0 * self.lm_head(a).sum()),
}


@pytest.mark.parametrize("then", WORKS_WITH_ITS_LOGITS)
def test_a_model_that_works_with_its_logits_is_run_as_it_is(then, large, monkeypatch):
    make = lambda: Language(WORKS_WITH_ITS_LOGITS[then])  # noqa: E731
    if then == "in large batches":
        with pytest.raises(imu.InputError, match="change with the rest of its batch"):
            imu.capture(make(), images())
        return
    if then == "twice":
        with pytest.raises(imu.InputError, match="it runs several times, one after another"):
            imu.capture(make(), images())
        return
    batches = sequences() if then == "another order" else images()
    found = imu.capture(make(), batches)
    # What a model does in its first batches is not the same in both runs.
    plain = then == "in later batches"
    same(found, stored(Language() if plain else make(), batches, monkeypatch))


def test_logits_that_are_asked_for_by_a_function(large, monkeypatch):
    model, batches = Language(), images()
    found = imu.capture(model, batches, output=lambda out: out * 2)
    same(found, stored(model, batches, monkeypatch, output=lambda out: out * 2))


def test_heads_that_somebody_watches_compute(large, computed, monkeypatch):
    model, batches = Language(), images()
    shapes = []
    model.lm_head.register_forward_hook(lambda m, args, out: shapes.append(bool(out.isnan().any())))
    same(imu.capture(model, batches), stored(model, batches, monkeypatch))
    assert shapes and not any(shapes)


def test_the_model_is_whole_after_an_error(large):
    model = Language()
    batches = images()
    batches[1] = (batches[1][0], torch.full((5,), C))
    with pytest.raises(InputError, match="samples from 5 on: labels"):
        imu.capture(model, batches)
    assert "forward" not in vars(model.lm_head) and not model.lm_head._forward_hooks
    assert model(batches[0][0]).isfinite().all()


def test_half_precision_stays_half(large, monkeypatch):
    model, batches = Language().bfloat16(), [(x.bfloat16(), y) for x, y in images()]
    found = imu.capture(model, batches)
    assert found.features.dtype == found.weight.dtype == torch.bfloat16
    assert found.weight.data_ptr() == model.lm_head.weight.data_ptr()
    same(found, stored(model, batches, monkeypatch))


def test_autocast_of_the_model_is_seen(large):
    def then(self, a):
        with torch.autocast("cpu", torch.bfloat16):
            return self.lm_head(a)

    found = imu.capture_features(Language(then), images())
    assert found.computed == torch.bfloat16


def test_language_models_against_autograd_one_sample_at_a_time(large):
    """Padded; tied and not; with a softcap, whose logits have to be computed."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(
        vocab_size=C,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    sizes = dict(vocab_size=C, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    models = {
        t.GPT2LMHeadModel(t.GPT2Config(**sizes)): ImplicitHead,
        t.LlamaForCausalLM(t.LlamaConfig(**small, tie_word_embeddings=False)): ImplicitHead,
        t.Gemma2ForCausalLM(t.Gemma2Config(**small, final_logit_softcapping=2.0)): (
            imu.GradientFactors
        ),
    }
    ids, mask = torch.randint(C, (6, 9)), torch.ones(6, 9, dtype=torch.int64)
    mask[1, 6:] = mask[4, 3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    batches = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    for model, kind in models.items():
        factors = imu.capture(model.eval(), batches, shift=True)
        assert type(factors) is kind
        truth = copy.deepcopy(model).double()
        weight = truth.get_output_embeddings().weight.detach().clone().requires_grad_()
        head = truth.get_output_embeddings()
        head.register_forward_hook(
            lambda m, args, out, w=weight: nn.functional.linear(args[0].detach(), w)
        )
        rows = []
        for one, seen, wanted in zip(ids, mask, labels, strict=True):
            logits = truth(input_ids=one[None], attention_mask=seen[None]).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, wanted[1:], ignore_index=-100)
            rows.append(torch.autograd.grad(loss, weight)[0].flatten())
        g = torch.stack(rows)
        expected = -(g @ (g.mean(dim=0) / (g.square().mean(dim=0) + 1e-2)))
        for found in (
            imu.influence_scores(factors),
            imu.influence_scores(model, batches, shift=True),
        ):
            assert float((found.double() - expected).norm() / expected.norm()) < 1e-5
