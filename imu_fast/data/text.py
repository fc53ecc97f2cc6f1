"""A file of texts as batches of a language model or a text classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from imu_fast.data.chat import IGNORED, Chat, Encoded, Encoder, Plain, template_of
from imu_fast.data.text_files import (
    FORMS,
    Example,
    Keys,
    Records,
    examples_of,
    form_of,
    read_records,
)
from imu_fast.errors import InputError, check_choice, check_count

Task = Literal["causal", "seq2seq", "classifier"]
TASKS = ("causal", "seq2seq", "classifier")
# What tokenizers say that know no limit is about 1e30.
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Padded:
    """Collates examples: padded on the right to the longest of a batch.

    Args:
        pad: the token that padding is; it is masked, and has no label.
    """

    pad: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` [n, T]; ``labels`` [n, T], [n, T'] or [n]; int64."""
        ids = [torch.tensor(one.input_ids) for one in batch]
        made = {
            "input_ids": _stacked(ids, self.pad),
            "attention_mask": _stacked([torch.ones_like(x) for x in ids], 0),
        }
        labels = [torch.tensor(one.labels) for one in batch]
        made["labels"] = _stacked(labels, IGNORED) if labels[0].dim() else torch.stack(labels)
        return made


def _stacked(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@dataclass(frozen=True)
class TextData:
    """A file of texts, ready for a model.

    Attributes:
        loader: batches in the file's order; every door of the package takes it.
        records: the file's lines. examples: what they say.
        tokens: [n], how many labels of each count.
        remarks: how the file was read, a line each.
    """

    loader: DataLoader[Any]
    records: Records
    examples: list[Example]
    encoder: Encoder
    tokens: list[int]
    remarks: list[str]

    @property
    def pad(self) -> int:
        """The token that padding is."""
        assert isinstance(self.loader.collate_fn, Padded)
        return self.loader.collate_fn.pad

    @property
    def first(self) -> str:
        """The first example as the model reads it, and what counts of it."""
        return self.encoder.shown(self.loader.dataset[0])

    def answer(self, text: str) -> list[int]:
        """The tokens of another answer to every example's prompt: a refusal.

        Raises:
            InputError: an example has no prompt or no room behind it, or the text has other tokens
                there than behind the first.
        """
        places = [self.records.at(example.number) for example in self.examples]
        pairs = zip(self.examples, places, strict=True)
        answers = [self.encoder.answer(example, text, where) for example, where in pairs]
        odd = next((k for k, answer in enumerate(answers) if answer != answers[0]), None)
        if odd is not None:
            raise InputError(
                f"the refusal has other tokens behind the prompt of {places[odd]} than behind the "
                "first; begin it with a space, or end all prompts alike"
            )
        return answers[0]


def load_text(
    path: Path | str,
    tokenizer: Any,
    *,
    task: Task = "causal",
    keys: Keys = Keys(),  # noqa: B008  # frozen
    template: str = "auto",
    turns: Literal["all", "last"] = "all",
    max_length: int | None = None,
    label_ids: Mapping[str, int] | None = None,
    batch_size: int = 8,
    argument: str = "data",
) -> TextData:
    """Read questions and answers, prompts and completions, conversations, or text.

    Of an answer every token counts, and the one that ends it; of a question none (label -100).

    Args:
        path: ``.jsonl``, ``.json`` or ``.csv``; what its lines are is read off the first.
        tokenizer: of transformers.
        task: what the model does: ``"causal"``, ``"seq2seq"``, or ``"classifier"``, whose lines are
            ``{"text", "label"}``.
        keys: names of the fields. template, turns: see :mod:`imu_fast.data.chat`.
        max_length: tokens that an example may have; what is longer is cut at its end. None: the
            tokenizer's own limit.
        label_ids: a classifier's ``config.label2id``.

    Raises:
        InputError: the file cannot be used; names the line.
    """
    check_choice("task", task, TASKS)
    check_choice("turns", turns, ("all", "last"))
    check_count("batch_size", batch_size)
    if max_length is None:
        own = getattr(tokenizer, "model_max_length", None)
        max_length = own if isinstance(own, int) and own < _NO_LIMIT else None
    else:
        check_count("max_length", max_length, minimum=2)
    if task == "classifier" and not label_ids:
        raise InputError("label_ids=None: a classifier's classes are needed, config.label2id")
    records = read_records(Path(path), argument)
    form, names = form_of(records, keys, labelled=task == "classifier")
    examples = examples_of(records, form, names)
    chats = [bool(example.messages) for example in examples]
    if any(chats) and not all(chats):
        odd = examples[chats.index(not chats[0])].number
        raise InputError(
            f"{records.at(odd)} is {'text' if chats[0] else 'a list of messages'}, those before "
            "are not; store all alike"
        )
    if turns == "last" and not chats[0]:
        raise InputError("turns='last' is for conversations; these lines have one answer each")
    around = template_of(template, tokenizer, form, task, chats[0])
    encoder = Encoder(tokenizer, task, around, turns, max_length, label_ids or {})
    made = [encoder.encode(example, records.at(example.number)) for example in examples]
    remarks = [f"{records.argument}: {len(made)} lines of {FORMS[form][1]} ({', '.join(names)})"]
    if chats[0] or form == "qa":
        remarks[0] += f", by {around}"
    if isinstance(around, Chat):
        labels, special = made[0].labels, set(tokenizer.all_special_ids)
        if isinstance(labels, list) and not special & set(labels):
            remarks.append("the chat template ends an answer by no special token; -v shows it")
    if isinstance(around, Plain) and encoder.endless and task != "classifier":
        remarks.append("the tokenizer has no token that ends a text, so none is put there")
    cut = [example.number for example, one in zip(examples, made, strict=True) if one.cut]
    if cut:
        remarks.append(
            f"{len(cut)} of {len(made)} are cut at max_length={max_length} tokens (first: "
            f"{records.at(cut[0]).rsplit(': ', 1)[1]})"
        )
    pad, said = _padding(tokenizer)
    loader: DataLoader[Any] = DataLoader(
        made,  # type: ignore[arg-type]  # a list is a dataset
        batch_size=batch_size,
        collate_fn=Padded(pad),
    )
    tokens = [one.tokens(task) for one in made]
    return TextData(loader, records, examples, encoder, tokens, remarks + said)


def _padding(tokenizer: Any) -> tuple[int, list[str]]:
    """The token that padding is, and what is to be said of it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id), []
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id), [
            "the tokenizer has no token for padding: the one that ends a text, masked and without "
            "a label"
        ]
    return 0, ["the tokenizer has no token for padding: token 0, masked and without a label"]
