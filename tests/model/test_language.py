"""Scores of language models against autograd of their own loss, one sample at a time, float64."""

from __future__ import annotations

import logging

import language_models as lm
import pytest
import torch
from per_sample import assert_scores, scores

import imu_fast as imu
from imu_fast.errors import InputError

pytest.importorskip("transformers")

CASES = [(kind, tied) for kind, k in lm.KINDS.items() for tied in (False, True)[: 1 + k.tied]]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_scores_by_the_one_line_call(kind, tied, padding):
    model, data = lm.make(kind, tied), lm.batch(kind, padding=padding)
    truth = scores(lm.gradients(model, kind, data, lm.KINDS[kind].head))
    assert_scores(imu.influence_scores(model, [data]), truth)
    one_by_one = imu.influence_scores(model, lm.samples(data))
    assert_scores(one_by_one, truth)


@pytest.mark.parametrize("kind", lm.KINDS)
def test_scores_of_attention_layers(kind):
    model, data, layer = lm.make(kind), lm.batch(kind), lm.KINDS[kind].attention
    truth = scores(lm.gradients(model, kind, data, layer))
    assert_scores(imu.influence_scores(model, [data], layers=[layer]), truth)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "granite", "bart", "bert tokens"])
def test_half_precision(kind):
    """Against float64 at the same rounded weights: what is left is the forward's own rounding."""
    model, data = lm.make(kind).bfloat16(), lm.batch(kind)
    truth = scores(lm.gradients(model, kind, data, lm.KINDS[kind].head))
    found = imu.influence_scores(model, [data])
    assert_scores(found, truth, 5e-3)
    assert imu.capture(model, [data]).delta.dtype == torch.float32


def lora(model, **more):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_adapters(kind):
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    model, data = lora(lm.make(kind), target_modules=targets), lm.batch(kind)
    truth = scores(lm.gradients(model, kind, data, "base_model.model." + lm.KINDS[kind].head))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert_scores(imu.influence_scores(model, [data]), truth)
    chosen = [n for n, m in model.named_modules() if "lora_" in n and hasattr(m, "weight")]
    total = sum(scores(lm.gradients(model, kind, data, name)) for name in chosen)
    assert_scores(imu.influence_scores(model, [data], layers=chosen), total)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_quantised_base_with_a_float_head():
    """As 8- and 4-bit loaders leave it: layers that are no nn.Linear, and the head as it was."""

    class Int8(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
            self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
            self.register_buffer("scale", scale)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))

    model, data = lm.make("llama"), lm.batch("llama")
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(block, name, Int8(module))
    truth = scores(lm.gradients(model, "llama", data, "lm_head"))
    assert_scores(imu.influence_scores(model, [data]), truth)


def test_gradient_checkpointing_and_training_mode():
    model, data = lm.make("llama"), lm.batch("llama")
    layer = lm.KINDS["llama"].attention
    expected = imu.influence_scores(model, [data], layers=[layer])
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(imu.influence_scores(model, [data], layers=[layer]), expected)
    assert model.training and model.is_gradient_checkpointing


def test_more_than_the_head_of_a_tied_model_is_said(caplog):
    model, data = lm.make("llama", tied=True), lm.batch("llama")
    with caplog.at_level(logging.WARNING, "imu_fast"):
        imu.influence_scores(model, [data])
    assert "shares its weight with model.embed_tokens.weight" in caplog.text


@pytest.mark.parametrize("kind", lm.KINDS)
def test_the_models_own_loss_is_ours(kind, caplog):
    """A mean over tokens, ours over each sample's: ``sum_i T_i l_i / sum_i T_i``."""
    model, data = lm.make(kind), lm.batch(kind)
    with caplog.at_level(logging.INFO, "imu_fast"):
        factors = imu.capture(model, [data])
    counts = factors.offsets.diff().double()
    own = float(model(**data).loss)
    assert float((counts * factors.losses.double()).sum() / counts.sum()) == pytest.approx(own)
    assert "own loss" not in caplog.text
    causal = lm.KINDS[kind].batch == "causal"
    assert caplog.text.count("predicts the next token") == causal


@pytest.mark.parametrize("name", ["shift", "shift_labels"])
def test_shift_is_settable(name):
    model, data = lm.make("llama"), lm.batch("llama")
    own = imu.capture(model, [data])
    assert torch.equal(imu.capture(model, [data], **{name: True}).delta, own.delta)
    kept = imu.capture(model, [data], **{name: False})
    assert kept.offsets.diff().tolist() == [int((row != -100).sum()) for row in data["labels"]]
    with pytest.raises(InputError, match="shift='no' must be True, False or 'auto'"):
        imu.capture(model, [data], **{name: "no"})


def test_labels_that_are_shifted_already_are_told(caplog):
    model, data = lm.make("qwen3"), lm.batch("qwen3")
    following = torch.cat([data["labels"][:, 1:], torch.full((6, 1), -100)], dim=1)
    with caplog.at_level(logging.WARNING, "imu_fast"):
        found = imu.influence_scores(model, [data | {"labels": following}])
    assert "label t is input t + 1" in caplog.text
    assert_scores(found, imu.influence_scores(model, [data]).double())


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert masked"])
def test_long_rows_are_tried_on_some_positions(kind, caplog, monkeypatch):
    """Logits of a large vocabulary are kept of a few."""
    monkeypatch.setattr("imu_fast.model.causal._ELEMENTS", lm.VOCABULARY * 8)
    model, data, rows = lm.make(kind), lm.batch(kind, length=24), []
    model.register_forward_hook(lambda m, a, output: rows.append(output.logits.shape[:2].numel()))
    with caplog.at_level(logging.INFO, "imu_fast"):
        found = imu.capture(model, [data])
    assert sorted(rows)[-3] <= 16 and rows.count(max(rows)) == 1  # its batch, and a row of it
    assert "cannot be cut" not in caplog.text
    assert "own loss" not in caplog.text
    shift = lm.KINDS[kind].batch == "causal"
    assert torch.equal(found.delta, imu.capture(model, [data], shift=shift).delta)


class Own(torch.nn.Module):
    """A model without a loss; ``mixes`` lets positions see what comes after them."""

    def __init__(self, mixes=False):
        super().__init__()
        self.emb, self.lm_head = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11)
        self.mixes = mixes

    def forward(self, ids):
        x = self.emb(ids)
        x = x.mean(1, keepdim=True) + x if self.mixes else x.cumsum(1)
        return self.lm_head(x)


@pytest.mark.parametrize(
    ("mixes", "own_inputs", "shifted"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_a_model_without_a_loss(mixes, own_inputs, shifted, caplog):
    model, ids = Own(mixes), torch.randint(11, (4, 7))
    labels = ids if own_inputs else (ids * 3 + 1) % 11
    with caplog.at_level(logging.INFO, "imu_fast"):
        found = imu.capture(model, [(ids, labels)])
    assert torch.equal(found.delta, imu.capture(model, (ids, labels), shift=shifted).delta)
    assert ("taken for a causal language model" in caplog.text) == shifted
    assert caplog.text.count("shift=True or shift=False says it") == 1


class WithLoss(Own):
    """nanoGPT's form: ``(logits, loss)``, of the last position alone where no targets are given."""

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        if targets is None:
            return logits[:, -1:], None
        flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, flat


def test_a_model_that_leaves_positions_out_without_labels_gets_them():
    model, ids = WithLoss(), torch.randint(11, (4, 8))
    x, y = ids[:, :-1], ids[:, 1:]
    found = imu.capture(model, [(x, y)])
    assert found.offsets.diff().tolist() == [7] * 4
    assert float(found.losses.mean()) == pytest.approx(float(model(x, y)[1]))


def test_terms_of_a_loss_that_belong_to_no_sample_are_named(caplog):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    more = dict(num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    config = transformers.MixtralConfig(**sizes, **more, output_router_logits=True)
    model = transformers.MixtralForCausalLM(config).eval()
    with caplog.at_level(logging.WARNING, "imu_fast"):
        imu.influence_scores(model, [lm.batch("llama")])
    assert "left out: aux_loss (" in caplog.text


def test_another_loss_of_the_model_is_told(caplog):
    class Smoothed(WithLoss):
        def forward(self, idx, labels=None):
            logits = Own.forward(self, idx)
            if labels is None:
                return {"logits": logits}
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
            )
            return {"loss": loss, "logits": logits}

    ids = torch.randint(11, (4, 7))
    with caplog.at_level(logging.WARNING, "imu_fast"):
        found = imu.capture(Smoothed(), [{"idx": ids, "labels": ids}])
    assert found.offsets.diff().tolist() == [6] * 4
    assert "the model's own loss on the first samples is" in caplog.text


def test_a_sequence_of_one_token_has_no_label_that_is_predicted():
    """Whatever comes first, and though its labels have the shape of others'."""
    model, data = lm.make("llama"), lm.batch("llama")
    one = {"input_ids": torch.randint(1, 9, (3, 1))}
    one["labels"] = one["input_ids"].clone()
    for batches, place in (([one, data], 0), ([data, one], 6)):
        found = imu.influence_scores(model, batches)
        assert not found[place : place + 3].any() and bool(found.any())
        factors = imu.capture(model, batches, layers=lm.KINDS["llama"].attention)
        assert not factors.offsets.diff()[place : place + 3].any()
    losses = [imu.evaluate(model, batches)["loss"] for batches in ([one, data], [data])]
    assert losses[0] == losses[1]
    with pytest.raises(InputError, match="none of 3 samples has a label to be predicted"):
        imu.influence_scores(model, [one])
