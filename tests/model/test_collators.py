"""Batches as the libraries of language models make them."""

from __future__ import annotations

import logging

import language_models as lm
import pytest
import torch
from per_sample import assert_scores, scores
from torch.utils.data import DataLoader

import imu_fast as imu

transformers = pytest.importorskip("transformers")

N, LENGTHS = 6, (9, 5, 7, 3, 9, 6)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(lm.VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", unk_token="w1", mask_token="w2", eos_token="w3"
    )


def features(**more):
    """Ragged samples, as a tokenised data set has them."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        ids = torch.randint(4, lm.VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * length})
        made[-1] |= {key: value(ids) for key, value in more.items()}
    return made


def truth(model, batches, dtype=torch.float64):
    """Scores of the head by the model's own loss, one sample at a time, as they come in batches."""
    model = lm.untied(model, head := lm.head_of(model))
    weight = [p.requires_grad_() for p in model.get_submodule(head).parameters()]
    rows = []
    for batch in batches:
        for sample in lm.samples(dict(batch)):
            loss = model(**sample).loss
            found = torch.autograd.grad(loss, weight)
            rows.append(torch.cat([g.flatten() for g in found]))
    return scores(torch.stack(rows))


def check(model, loader, tolerance=1e-5):
    expected = truth(model, loader)
    found = imu.influence_scores(model, loader)
    assert len(found) == N
    assert_scores(found, expected, tolerance)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_language_modelling(kind, side, tokenizer):
    tokenizer.padding_side = side
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    check(lm.make(kind), DataLoader(features(), batch_size=4, collate_fn=collate))


def test_masked_language_modelling(tokenizer):
    tokenizer.padding_side = "right"
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4, seed=0)
    torch.manual_seed(0)
    batches = list(DataLoader(features(), batch_size=4, collate_fn=collate))
    assert all(bool((b["labels"] >= 0).any(dim=1).all()) for b in batches)
    check(lm.make("bert masked"), batches)


@pytest.mark.parametrize("kind", ["bart", "t5"])
@pytest.mark.parametrize("given", [True, False])
def test_seq2seq(kind, given, tokenizer):
    """With ``model`` the collator makes the decoder's input; without, the model does."""
    model = lm.make(kind)
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model=model if given else None)
    samples = features(labels=lambda ids: ids[::-1][:4])
    batches = list(DataLoader(samples, batch_size=4, collate_fn=collate))
    assert ("decoder_input_ids" in batches[0]) == given
    check(model, batches)


def test_token_classification(tokenizer):
    collate = transformers.DataCollatorForTokenClassification(tokenizer)
    samples = features(labels=lambda ids: [i % 5 for i in ids])
    check(lm.make("bert tokens"), DataLoader(samples, batch_size=4, collate_fn=collate))


def test_the_loader_of_a_trainer(tokenizer, tmp_path, caplog):
    """Fields that the model does not take are left out, and said."""
    tokenizer.padding_side = "right"
    model = lm.make("llama")
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    samples = features(labels=list, length=len, index=lambda ids: ids[0])
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[]
    )

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return samples[i]

    trainer = transformers.Trainer(model, arguments, collate, eval_dataset=Samples())
    loader = trainer.get_eval_dataloader()
    expected = truth(model, loader)
    assert_scores(imu.influence_scores(model, loader)[:N], expected)
    plain = DataLoader(samples, batch_size=4, collate_fn=collate)
    with caplog.at_level(logging.WARNING, "imu_fast"):
        assert_scores(imu.influence_scores(model, plain), expected)
    assert "takes no index, length: not used" in caplog.text


def tofu(samples):
    """As TOFU's data sets give them: stacked tuples."""
    padded = [
        (s["input_ids"] + [0] * (12 - len(s["input_ids"])), len(s["input_ids"])) for s in samples
    ]
    ids = torch.tensor([p for p, _ in padded])
    mask = (torch.arange(12) < torch.tensor([n for _, n in padded])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return ids, labels, mask


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("form", ["tofu", "mask first", "bool mask", "indices too"])
def test_tuples_with_a_mask(kind, form):
    model = lm.make(kind)
    ids, labels, mask = tofu(features())
    named = [{"input_ids": ids, "labels": labels, "attention_mask": mask}]
    batch = {
        "tofu": (ids, labels, mask),
        "mask first": (ids, mask, labels),
        "bool mask": (ids, labels, mask.bool()),
        "indices too": (ids, labels, mask, torch.arange(len(ids))),
    }[form]
    expected = truth(model, named)
    assert_scores(imu.influence_scores(model, [batch]), expected)
    columns = DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=4)
    assert_scores(imu.influence_scores(model, columns), expected)


def test_a_mask_that_may_be_labels_is_refused():
    model = lm.make("bert tokens")
    ids, labels, mask = tofu(features())
    with pytest.raises(imu.InputError, match="Data"):
        imu.influence_scores(model, [(ids, (labels > 20).long(), mask)])
    named = [{"input_ids": ids, "attention_mask": mask, "labels": (labels > 20).long()}]
    picked = {"input_ids": 0, "attention_mask": 2}
    told = imu.Data([(ids, (labels > 20).long(), mask)], labels=1, inputs=picked)
    assert torch.equal(imu.influence_scores(model, told), imu.influence_scores(model, named))


def test_packed_rows(tokenizer, caplog):
    """Samples one after another in one row, told by their positions."""
    collate = transformers.DataCollatorWithFlattening()
    model = lm.make("llama")
    model.config._attn_implementation = "eager"
    samples = features(labels=list)
    batches = [dict(collate(samples[:3])), dict(collate(samples[3:]))]
    with caplog.at_level(logging.WARNING, "imu_fast"):
        found = imu.influence_scores(model, batches)
    assert len(found) == 2
    assert_scores(found, truth(model, batches))
    assert "several sequences in a row" in caplog.text


def test_datasets_of_ragged_samples():
    """One sample at a time, each of its own length, padded by nobody."""
    model = lm.make("llama")
    samples = [
        {k: torch.tensor(v) for k, v in s.items()}
        for s in features(labels=lambda ids: [-100, *ids[1:]])
    ]

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return samples[i]

    expected = truth(model, [{k: v[None] for k, v in s.items()} for s in samples])
    assert_scores(imu.influence_scores(model, Samples()), expected)
    assert_scores(imu.influence_scores(model, DataLoader(Samples(), batch_size=None)), expected)
    assert_scores(imu.influence_scores(model, samples), expected)
