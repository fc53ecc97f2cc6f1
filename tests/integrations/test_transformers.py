"""The Trainer that forgets on other models than causal ones, LoRA, and the callback."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from integrations.stand_in import collate
from integrations.test_open_unlearning import arguments, items, sequence_loss
from integrations.tiny import filled, llama
from per_sample import assert_scores, sample_gradients
from per_sample import scores as scores_of
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
)

import imu_fast as imu
from imu_fast.integrations import _forgetting
from imu_fast.integrations import transformers as ours


def bert():
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    return filled(BertForSequenceClassification(config), 0.5)


def sentences(n=8):
    return [
        {"input_ids": (torch.arange(6) ** 2 + 3 * i) % 19 + 1, "labels": i % 3, "index": i}
        for i in range(n)
    ]


def stacked(samples):
    return {
        "input_ids": torch.stack([s["input_ids"] for s in samples]),
        "labels": torch.tensor([s["labels"] for s in samples]),
    }


def trainer(folder, model, dataset, collator, training=None, **options):
    return ours.UnlearningTrainer(
        model=model,
        args=arguments(folder, **(training or {})),
        train_dataset=dataset,
        data_collator=collator,
        **options,
    )


def test_a_classifier_forgets(tmp_path):
    model, samples = bert(), sentences()

    def loss(model, sample):
        logits = model(input_ids=sample["input_ids"][None]).logits
        return cross_entropy(logits, torch.tensor([sample["labels"]]))

    made = trainer(tmp_path, model, samples, stacked, {"num_train_epochs": 4})
    names = ["classifier.weight", "classifier.bias"]
    roots = scores_of(sample_gradients(model, samples, names, loss)).clamp(max=0).neg().sqrt()
    expected = roots.clamp(max=float(torch.quantile(roots[roots > 0], 0.93)))
    made.compute_loss(model.train(), stacked(samples))
    assert_scores(made.weights, expected)
    was = ours.forget_depth(model, [stacked(samples)])
    with torch.no_grad():
        model.eval()
        logits = model(input_ids=stacked(samples)["input_ids"]).logits
    y = stacked(samples)["labels"]
    assert abs(was[0] - float(cross_entropy(logits, y))) < 1e-6
    assert abs(was[1] - float((logits.argmax(1) == y).float().mean())) < 1e-6
    made.train()
    assert ours.forget_depth(model, [stacked(samples)])[0] > was[0] + 0.1


def test_a_model_that_makes_its_decoder_s_input_of_labels(tmp_path):
    config = BartConfig(
        vocab_size=15,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        dropout=0.0,
    )
    model = filled(BartForConditionalGeneration(config), 0.4)
    batch = collate(items(4))
    del batch["index"]
    made = trainer(tmp_path, model, items(4), collate, layers=["lm_head"])
    loss = made.compute_loss(model.train(), batch)
    assert not made._shift and bool(loss.isfinite())
    with torch.no_grad():
        logits = model(**batch).logits
    values = torch.stack(
        [
            cross_entropy(z, y, ignore_index=-100)
            for z, y in zip(logits, batch["labels"], strict=True)
        ]
    )
    weights = imu.batch_weights(model, batch, layers=["lm_head"], shift=False)
    assert torch.allclose(loss, -(weights * values).sum() / weights.sum(), atol=1e-5)


def test_adapters_alone_are_trained(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(2), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    before = copy.deepcopy(model.state_dict())
    made = trainer(
        tmp_path, model, items(8), collate, {"learning_rate": 0.5}, l1=1e-3, layers=["*lora_B*"]
    )
    made.train()
    assert made._shift
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all("lora_" in name for name in changed)


class Mine(ours.UnlearningMixin, Trainer):
    """A user's own."""

    def log(self, logs, *args, **kwargs):
        self.said = logs
        super().log(logs, *args, **kwargs)


def test_the_mix_in_of_a_trainer_of_one_s_own(tmp_path):
    model = llama(2)
    made = Mine(
        model=model, args=arguments(tmp_path), train_dataset=items(8), data_collator=collate
    )
    made.train()
    assert made.said["train_loss"] < 0
    assert len(made.weights) == 4 and float(made.weights.min()) >= 0


def test_training_stops_at_a_depth(tmp_path, caplog):
    model, batches = llama(2), [collate(items(4)), collate(items(4, first=4))]
    start = ours.forget_depth(model, batches)
    with torch.no_grad():
        hand = torch.stack([sequence_loss(model, item) for item in items(8)]).mean()
    assert abs(start[0] - float(hand)) < 1e-5
    ours.forget_depth(model.train(), batches)
    assert model.training
    stop = ours.StopAtDepth(batches, forget_loss=start[0] + 0.2)
    made = trainer(
        tmp_path,
        model,
        items(8),
        collate,
        {"num_train_epochs": 500, "learning_rate": 0.5},
        callbacks=[stop],
    )
    made.train()
    steps, losses, _ = zip(*stop.records, strict=True)
    assert stop.reached and steps == tuple(range(len(steps))) and len(steps) < 900
    assert losses[-1] >= start[0] + 0.2 > losses[-2]
    assert abs(ours.forget_depth(model, batches)[0] - losses[-1]) < 1e-6
    never = ours.StopAtDepth(batches, forget_accuracy=0.0, forget_loss=1e9, every=2)
    with caplog.at_level(logging.WARNING, "imu_fast"):
        trainer(
            tmp_path, llama(2), items(8), collate, {"learning_rate": 1e-6}, callbacks=[never]
        ).train()
    assert [step for step, *_ in never.records] == [0, 2]
    assert never.reached == (never.records[-1][2] <= 0)
    assert never.reached or "ended before the depth" in caplog.text


def test_a_depth_is_needed_and_something_to_measure():
    with pytest.raises(imu.InputError, match="StopAtDepth has no depth"):
        ours.StopAtDepth([])
    with pytest.raises(imu.InputError, match="forget_loss=-1"):
        ours.StopAtDepth([], forget_loss=-1)
    with pytest.raises(imu.InputError, match="no sample with a label"):
        ours.forget_depth(llama(1), [])


class Sub(LlamaForCausalLM):
    """Of a name that transformers does not know, and whose own signature names little."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


class Unshifted(LlamaForCausalLM):
    """Its own loss is of labels that are those of their positions."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


@pytest.mark.parametrize("kind", [Sub, Unshifted])
def test_which_label_a_position_predicts_is_asked_of_the_models_own_loss(kind):
    """Not of its name; and the mask is among what it gets."""
    made = llama()
    model = kind(made.config).eval()
    model.load_state_dict(made.state_dict())
    samples = items(4)
    batch = collate(samples)
    del batch["index"]
    assert set(_forgetting.accepted(model, batch | {"index": 1})) == set(batch)
    losses = []
    with torch.no_grad():
        for i in range(4):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            losses.append(float(model(**one).loss))
    found, _ = ours.forget_depth(model, [batch])
    assert found == pytest.approx(sum(losses) / 4, rel=1e-5)
