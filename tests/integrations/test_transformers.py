"""The Trainer that forgets on other models than causal ones, LoRA, and the callback."""

from __future__ import annotations

import contextlib
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


@pytest.mark.parametrize("kept", [None, "NLL", "KL"])
def test_a_step_runs_the_wrapper_that_sums_gradients(kept, tmp_path):
    """DistributedDataParallel sums what backward gives only after a forward pass of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    summed = []

    def hook(state, bucket):
        summed.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    try:
        model, samples = bert(), sentences()
        options = {} if kept is None else {"alpha": 1.0, "retain_loss_type": kept}
        made = trainer(tmp_path, model, samples, stacked, **options)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, hook)
        batch = stacked(samples)
        given = batch if kept is None else {"forget": batch, "retain": batch}
        made.compute_loss(wrapped.train(), given).backward()
        assert sum(summed) == sum(p.numel() for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


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


def test_processes_of_one_training_stop_together(monkeypatch):
    """Whatever part of the forget set each has."""
    model = llama(2)
    parts = [[collate(items(3))], [collate(items(5, first=3))]]
    sums = [ours._sums(model, part, None) for part in parts]
    monkeypatch.setattr(ours.distributed, "several", lambda: True)
    monkeypatch.setattr(ours.distributed, "together", lambda what: contextlib.nullcontext())
    monkeypatch.setattr(ours.distributed, "gather", lambda own: sums)
    whole = ours.forget_depth(model, [*parts[0], *parts[1]])
    for part in parts:
        found = ours.StopAtDepth(part, forget_loss=1.0)._depth(model)
        assert found == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(("every", "accumulated"), [(1, 1), (5, 1), (1, 2)])
def test_what_is_deep_enough_already_stays_as_it_is(tmp_path, caplog, every, accumulated):
    """Weights and buffers, though a Trainer runs one batch whatever it is asked."""
    model, batches = llama(2), [collate(items(4))]
    model.register_buffer("seen", torch.zeros(()))

    def count(module, *_):
        module.seen += module.training

    model.register_forward_hook(count)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    start = ours.forget_depth(model, batches)[0]
    stop = ours.StopAtDepth(batches, forget_loss=start - 0.1, every=every)
    training = {"num_train_epochs": 9, "learning_rate": 0.5}
    training["gradient_accumulation_steps"] = accumulated
    made = trainer(tmp_path, model, items(8), collate, training, callbacks=[stop])
    with caplog.at_level(logging.WARNING, "imu_fast"):
        made.train()
    assert stop.reached and [step for step, *_ in stop.records] == [0]
    assert "as deep as was asked for before any step" in caplog.text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_last_state_is_measured_whatever_the_interval(tmp_path):
    model, batches = llama(2), [collate(items(4))]
    stop = ours.StopAtDepth(batches, forget_loss=99, every=2)
    training = {"max_steps": 3, "learning_rate": 0.5}
    trainer(tmp_path, model, items(8), collate, training, callbacks=[stop]).train()
    assert [step for step, *_ in stop.records] == [0, 2, 3] and not stop.reached
    assert stop.records[-1][1] == pytest.approx(ours.forget_depth(model, batches)[0], abs=1e-6)


@pytest.mark.parametrize(
    ("training", "options", "said"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1"),
        ({}, {"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func"),
        ({}, {"model": None, "model_init": lambda: llama(1), "layers": ["*.q_proj"]}, "model_init"),
    ],
)
def test_what_the_loss_of_a_trainer_would_use_is_refused(tmp_path, training, options, said):
    given = {"model": llama(1), "train_dataset": items(4), "data_collator": collate, **options}
    with pytest.raises(imu.InputError, match=said):
        ours.UnlearningTrainer(args=arguments(tmp_path, **training), **given)


def without_labels(samples):
    return [{**item, "labels": torch.full_like(item["labels"], -100)} for item in samples]


@pytest.mark.parametrize("kind", ["NLL", "KL"])
@pytest.mark.parametrize("objective", ["ce", "npo", "simnpo", "log1mp", "margin"])
def test_samples_without_a_label_are_in_no_mean(tmp_path, kind, objective, caplog):
    """In the retain term as in the forget term; where a batch has none, its term is zero."""
    model = llama(2)
    options = {"objective": objective, "retain_loss_type": kind}
    made = trainer(tmp_path, model, items(4), collate, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    model.train()

    def loss(forget, retain=None):
        batch = {"forget": collate(forget)}
        found = made.compute_loss(model, batch | ({"retain": collate(retain)} if retain else {}))
        model.zero_grad()
        found.backward()
        return float(found.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])

    kept, none = items(3, first=20), without_labels(items(3, first=20))
    nothing = loss(without_labels(items(3)))  # the first batch: it does not show the shift
    assert nothing[0] == 0 and not bool(nothing[1].any()) and made._shift is None
    assert not bool(made.weights.any()) and "nothing of it is forgotten" in caplog.text
    alone, both = loss(items(4)), loss(items(4), kept)
    mixed = loss(items(4), [*kept, *none])
    assert mixed[0] == pytest.approx(both[0], rel=1e-6) and mixed[0] != pytest.approx(alone[0])
    assert torch.allclose(mixed[1], both[1], rtol=1e-4, atol=1e-6)
    unkept = loss(items(4), none)
    assert unkept[0] == pytest.approx(alone[0], rel=1e-6) and bool(unkept[1].isfinite().all())
    assert torch.allclose(unkept[1], alone[1], rtol=1e-4, atol=1e-6)
    only = loss(without_labels(items(2)), kept)
    assert only[0] == pytest.approx(both[0] - alone[0], abs=1e-5)


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


class Plain(torch.nn.Module):
    """Takes no labels, and returns its logits alone."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.body(x).tanh())


class OfLabels(torch.nn.Module):
    """``(logits, loss)``; without labels the logits are the last position's."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11)

    def forward(self, input_ids, labels=None):
        h = self.embed(input_ids).cumsum(1)
        if labels is None:
            return self.fc(h[:, -1:]), None
        z = self.fc(h)
        return z, cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["plain", "of labels"])
def test_models_of_ones_own(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "plain":
        model, batch = Plain(), {"x": torch.randn(8, 4), "labels": torch.arange(8)[:, None] % 3}
        each = cross_entropy(model(batch["x"]), batch["labels"][:, 0], reduction="none")
    else:
        ids = torch.randint(11, (8, 6))
        model, batch = OfLabels(), {"input_ids": ids, "labels": ids.clone()}
        z = model(**batch)[0][:, :-1]
        each = cross_entropy(z.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    made = trainer(tmp_path, model, [{}], lambda samples: batch, {"num_train_epochs": 3})
    loss = made.compute_loss(model, batch)
    weights = imu.batch_weights(model, batch)
    assert torch.allclose(loss, -(weights * each).sum() / weights.sum(), atol=1e-5)
    assert ours.forget_depth(model, [batch])[0] == pytest.approx(float(each.mean()), rel=1e-5)
    both = {"forget": batch, "retain": batch}
    if kind == "plain":
        with pytest.raises(imu.InputError, match="it returns none.*use retain_loss_type='KL'"):
            made.compute_loss(model, both)
    else:
        kept = made.compute_loss(model, both)
        assert torch.allclose(kept, loss + each.mean(), atol=1e-5)
    made.train()
    assert ours.forget_depth(model, [batch])[0] > float(each.mean())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.randint(2, (8, 3)).float(), "dtype torch.float32|probabilities"),
        (torch.eye(3)[torch.arange(8) % 3], "one-hot or soft labels"),
        (torch.randint(2, (8, 3)), r"labels have shape \(8, 3\)"),
        (torch.randn(8), "labels have dtype torch.float32"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, said):
    batch = {"input_ids": stacked(sentences())["input_ids"], "labels": labels}
    made = trainer(tmp_path, bert(), [{}], lambda samples: batch)
    with pytest.raises(imu.InputError, match=said):
        made.train()
    with pytest.raises(imu.InputError, match=said):
        ours.forget_depth(bert(), [batch])


def test_batches_that_can_be_read_once_are_refused():
    with pytest.raises(imu.InputError, match="which can be read once"):
        ours.StopAtDepth(iter([]), forget_loss=1.0)
