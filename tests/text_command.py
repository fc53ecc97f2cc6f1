"""What tests of texts on the command line share: files, samples made by hand, what is read."""

from __future__ import annotations

import json

import pytest
import text_models as tm
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
AUTO = {
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "bert": transformers.AutoModelForSequenceClassification,
}


def labelled(path):
    names = ["bad", "fair", "good"]
    return tm.lines(
        path,
        [
            {"text": a, "label": names[i % 3] if i % 2 else i % 3}
            for i, (_, a) in enumerate(tm.PAIRS)
        ],
    )


def file_of(kind, folder):
    return labelled(folder / "c.jsonl") if kind == "bert" else tm.pairs(folder / "qa.jsonl")


def one_at_a_time(kind, words):
    """Each sample as its model takes it, made by hand, in a batch of its own."""
    made = []
    for i, (question, answer) in enumerate(tm.PAIRS):
        if kind == "bert":
            ids, labels = words(answer)["input_ids"], i % 3
        elif kind == "t5":
            ids, labels = words(question)["input_ids"], words(answer)["input_ids"]
        else:
            ids = [*words(f"{question} {answer}")["input_ids"], words.eos_token_id]
            prompt = words(question)["input_ids"]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
        made.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    return made


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def of(rows, name):
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def token_losses(model, samples):
    with torch.no_grad():
        return torch.stack([model(**sample).loss.double() for sample in samples])


def edited(folder, name, change):
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))
