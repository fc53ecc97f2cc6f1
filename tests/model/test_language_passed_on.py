"""Forwards that hand what they do not name to another one, and losses that are not the model's."""

from __future__ import annotations

import logging

import language_models as lm
import pytest
import torch
from per_sample import assert_scores, scores

import imu_fast as imu
from imu_fast.errors import InputError

transformers = pytest.importorskip("transformers")


class Named(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


class Anything(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Twice(Named):
    def forward(self, *args, labels=None, **kwargs):
        return super().forward(*args, labels=labels, **kwargs)


def of(kind):
    """The same weights in another class."""
    made = lm.make("llama")
    model = kind(made.config).eval()
    model.load_state_dict(made.state_dict())
    return model


def adapted(model, task):
    peft = pytest.importorskip("peft")
    targets = ["query"] if task == "SEQ_CLS" else ["q_proj"]
    config = peft.LoraConfig(r=2, task_type=task, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("kind", [Named, Anything, Twice])
@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_subclasses_get_every_field_that_their_base_takes(kind, form, caplog):
    """The mask of padding on the left, above all: without it every score is another."""
    model, data = of(kind), lm.batch("llama", padding="left")
    truth = scores(lm.gradients(model, "llama", data, "lm_head"))
    ids, mask, labels = data["input_ids"], data["attention_mask"], data["labels"]
    batch = data if form == "dict" else (ids, labels, mask)
    assert_scores(imu.influence_scores(model, [batch]), truth)
    assert "takes no" not in caplog.text
    imu.influence_scores(model, [data | {"index": torch.arange(6)}])
    assert "takes no index: not used" in caplog.text


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapters_get_every_field_that_their_base_takes(task):
    data = lm.batch("llama")
    data["position_ids"] = (2 * torch.arange(lm.LENGTH)).expand(6, -1).clone()
    data["position_ids"][:, 5:] += 3
    model = adapted(lm.make("llama"), task)
    truth = scores(lm.gradients(model, "llama", data, "base_model.model.lm_head"))
    assert_scores(imu.influence_scores(model, [data]), truth)


def test_adapters_of_classifiers_get_token_types():
    data = lm.batch("bert sequences")
    data["token_type_ids"] = (torch.arange(lm.LENGTH) > 3).long().expand(6, -1)
    data = {k: v[[0, 1, 3, 4, 5]] for k, v in data.items()}
    model = adapted(lm.make("bert sequences"), "SEQ_CLS")
    head = "base_model.model.classifier.modules_to_save.default"
    truth = scores(lm.gradients(model, "bert sequences", data, head))
    assert_scores(imu.influence_scores(model, [data]), truth)


class Penalised(transformers.LlamaForCausalLM):
    """A term that makes its loss that of no position."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 50.0
        return output


class Weighed(transformers.BertForSequenceClassification):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = 2 * torch.nn.functional.cross_entropy(output.logits, labels)
        return output


OTHER = "the model's own loss on the first samples is"


@pytest.mark.parametrize("kind", [Penalised, Weighed])
@pytest.mark.parametrize("door", ["scores", "head", "all"])
def test_another_loss_is_told_at_every_door(kind, door, caplog):
    """Whatever the term does to the question which label belongs to which position."""
    name = "llama" if kind is Penalised else "bert sequences"
    model, data = kind(lm.make(name).config).eval(), lm.batch(name)
    data = {k: v[[0, 1, 3, 4, 5]] for k, v in data.items()}
    with caplog.at_level(logging.WARNING, "imu_fast"):
        if door == "scores":
            imu.influence_scores(model, [data])
        else:
            imu.unlearn(model, [data], "uniform", scope=door, epochs=1, lr=1e-3)
    assert OTHER in caplog.text


def test_another_loss_of_floating_labels_is_told(caplog):
    """DeBERTa's own loss of them is a cross-entropy where problem_type is open, BERT's is not."""
    sizes = dict(vocab_size=lm.VOCABULARY, hidden_size=16, intermediate_size=32, num_labels=5)
    more = dict(num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    config = transformers.DebertaV2Config(**sizes, **more)
    deberta = transformers.DebertaV2ForSequenceClassification(config).eval()
    data = lm.batch("bert sequences") | {"labels": (torch.rand(6, 5) > 0.5).float()}
    with caplog.at_level(logging.WARNING, "imu_fast"):
        imu.influence_scores(lm.make("bert sequences"), [data], loss="auto")
        assert OTHER not in caplog.text
        imu.influence_scores(deberta, [data], loss="auto")
        assert OTHER in caplog.text


def test_labels_that_are_shifted_already_are_no_other_loss(caplog):
    model, data = lm.make("llama"), lm.batch("llama")
    ahead = {
        "input_ids": data["input_ids"][:, :-1],
        "attention_mask": data["attention_mask"][:, :-1],
        "labels": data["labels"][:, 1:],
    }
    with caplog.at_level(logging.WARNING, "imu_fast"):
        imu.influence_scores(model, [ahead])
    assert "next position already" in caplog.text and OTHER not in caplog.text


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_adapters_that_have_no_part_in_the_model_are_refused(alpha):
    model = adapted(lm.make("llama"), "CAUSAL_LM")
    model.merge_adapter()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"have no part in what the model computes.*unmerge"):
        imu.unlearn(model, [lm.batch("llama")], "uniform", scope="all", epochs=1, alpha=alpha)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
