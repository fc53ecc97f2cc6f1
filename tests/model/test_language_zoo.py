"""Architectures of transformers that the tables of language_models.py do not have."""

from __future__ import annotations

import copy
import logging

import language_models as lm
import pytest
import torch
import zoo

import imu_fast as imu

transformers = pytest.importorskip("transformers")

CAUSAL = """GPTNeoXForCausalLM PhiForCausalLM Phi3ForCausalLM MistralForCausalLM Qwen2ForCausalLM
    BloomForCausalLM FalconForCausalLM MptForCausalLM GPTJForCausalLM StableLmForCausalLM
    Olmo2ForCausalLM MambaForCausalLM GPTBigCodeForCausalLM GemmaForCausalLM BertLMHeadModel
    RobertaForCausalLM OpenAIGPTLMHeadModel"""
# In name causal, but its own loss does not shift.
UNSHIFTED = "BartForCausalLM"
SEQ2SEQ = "MarianMTModel PegasusForConditionalGeneration MBartForConditionalGeneration"
MASKED = "RobertaForMaskedLM DistilBertForMaskedLM ElectraForMaskedLM"
TOKENS = "DistilBertForTokenClassification DebertaV2ForTokenClassification"
CASES = [
    (name, form)
    for form, names in (
        ("causal", CAUSAL),
        ("unshifted", UNSHIFTED),
        ("seq2seq", SEQ2SEQ),
        ("masked", MASKED),
        ("tokens", TOKENS),
    )
    for name in names.split()
]


def batch(form):
    ids = torch.randint(3, 90, (4, 12))
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    if form in ("causal", "unshifted"):
        labels[:, :2] = -100
    elif form == "seq2seq":
        labels = torch.randint(3, 90, (4, 8))
        labels[2, 6:] = -100
    elif form == "masked":
        labels = labels.masked_fill(torch.rand(labels.shape) < 0.5, -100)
        labels[:, 3] = 7
    else:
        labels = torch.randint(zoo.CLASSES, ids.shape).masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_the_models_own_loss(name, form, caplog):
    """Its loss is a mean over tokens: so are losses, and gradients of the head, weighed by T_i."""
    transformers.logging.set_verbosity_error()
    model = zoo._tiny(getattr(transformers, name), False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    data = batch(form)
    with caplog.at_level(logging.INFO, "imu_fast"):
        factors = imu.capture(model, [data])
    assert "own loss" not in caplog.text
    assert ("predicts the next token" in caplog.text) == (form == "causal")
    counts = factors.offsets.diff().double()
    exact = lm.untied(model, factors.name)
    weight = exact.get_submodule(factors.name).weight
    own = exact(**data).loss
    assert float((counts * factors.losses.double()).sum() / counts.sum()) == pytest.approx(
        float(own.detach()), rel=1e-5
    )
    (truth,) = torch.autograd.grad(own, weight)
    owner = torch.repeat_interleave(torch.arange(4), factors.offsets.diff())
    share = (counts / counts.sum())[owner]
    act = copy.deepcopy(factors.act[:, : truth.shape[1]]).double()
    found = (factors.delta.double() * share[:, None]).T @ act
    assert float((found - truth).norm() / truth.norm()) < 1e-5
