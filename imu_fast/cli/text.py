"""A model of text and its lines, as a user names them; and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from imu_fast.cli.arguments import Texts
from imu_fast.cli.chunks import Checkpoint
from imu_fast.cli.influences import influences, said, wide
from imu_fast.cli.language_models import LanguageModel, Source, check_vocabulary, load
from imu_fast.cli.padding import check_padding
from imu_fast.cli.processes import Processes
from imu_fast.cli.score_files import (
    check_apart,
    check_ending,
    check_free,
    check_out,
    save_lines,
    save_scores,
    write_or_rescue,
)
from imu_fast.data.chat import Encoded
from imu_fast.data.text import TextData, load_text
from imu_fast.data.text_files import Keys, read_records
from imu_fast.errors import InputError

# Lines are of very different lengths, and padded to the longest of a batch.
BATCH_SIZE = 8


def source_of(texts: Texts, device: torch.device) -> Source:
    """What the flags name as the model."""
    assert texts.model is not None  # is_text has asked
    return Source(
        texts.model,
        texts.base,
        texts.tokenizer,
        texts.merge,
        texts.dtype,
        texts.trust_remote_code,
        device,
    )


@dataclass(frozen=True)
class Reader:
    """Reads files of texts for one model."""

    texts: Texts
    made: LanguageModel
    batch_size: int

    def read(self, path: Path, argument: str = "data") -> TextData:
        """A file; says how it is read.

        Raises:
            InputError: it cannot be used.
        """
        texts, made = self.texts, self.made
        if made.task == "classifier":
            _check_one_class(made.config)
        found = load_text(
            path,
            made.tokenizer,
            task=made.task,
            keys=Keys(
                texts.question_key,
                texts.answer_key,
                texts.text_key,
                texts.label_key,
                texts.messages_key,
            ),
            template=texts.template or "auto",
            turns=texts.turns or "all",  # type: ignore[arg-type]  # checked there
            max_length=self._max_length(),
            label_ids=getattr(made.config, "label2id", None),
            batch_size=self.batch_size,
            argument=argument,
        )
        encoded: Any = found.loader.dataset
        check_vocabulary(made.model, max(map(_largest, encoded)))
        if made.task == "classifier":
            _pad_of_classifier(made, found, encoded)
        else:
            check_vocabulary(made.model, found.pad)
        if self.batch_size > 1:
            check_padding(made.model, encoded, found.pad, argument)
        for remark in found.remarks:
            typer.echo(remark)
        if texts.verbose:
            typer.echo(f"{argument}, first: {found.first}")
        return found

    def _max_length(self) -> int | None:
        """What is asked for, or the tokenizer's or model's limit."""
        asked, positions = self.texts.max_length, self.made.positions
        if asked is not None and positions is not None and asked > positions:
            raise InputError(
                f"max_length={asked} is more than the model's {positions} positions; pass at most "
                f"{positions}"
            )
        if asked is not None:
            return asked
        own = self.made.tokenizer.model_max_length
        return positions if positions is not None and positions < own else None


def _check_one_class(config: Any) -> None:
    kind = getattr(config, "problem_type", None)
    if config.num_labels < 2 or kind not in (None, "single_label_classification"):
        raise InputError(
            f"the model has num_labels={config.num_labels} and problem_type={kind!r}; lines have "
            "one class each, so it must be a classifier of one among several"
        )


def _largest(one: Encoded) -> int:
    labels = one.labels if isinstance(one.labels, list) else []
    return max(max(one.input_ids), max(labels, default=0))


def _pad_of_classifier(made: LanguageModel, data: TextData, encoded: list[Encoded]) -> None:
    """A decoder takes the last token that is not the config's padding; let that be ours."""
    if getattr(made.config, "pad_token_id", None) == data.pad:
        return
    one_length = len({len(one.input_ids) for one in encoded}) == 1
    if any(data.pad in one.input_ids for one in encoded):
        if one_length or data.loader.batch_size == 1:
            return
        raise InputError(
            f"the model's config has pad_token_id={made.config.pad_token_id}, and the tokenizer's "
            f"padding, token {data.pad}, is in a text; set pad_token_id in config.json"
        )
    check_vocabulary(made.model, data.pad)
    made.config.pad_token_id = data.pad
    typer.echo(f"config.pad_token_id is set to {data.pad}, which tells where a text ends")


def opened(
    texts: Texts, batch_size: int | None, device: torch.device, *, trained: bool = False
) -> Reader:
    """The model, and what reads its data; says what it is.

    Raises:
        InputError: it cannot be loaded.
    """
    made = load(source_of(texts, device), trained=trained)
    typer.echo(made.described)
    return Reader(texts, made, BATCH_SIZE if batch_size is None else batch_size)


def score_lines(
    texts: Texts,
    data: Path,
    out: Path | None,
    how: tuple[Any, Any, bool],
    batch_size: int | None,
    device: torch.device,
    force: bool,
    here: Processes,
    checkpoint: Checkpoint | None = None,
) -> None:
    """``imu-fast score --model``: scores beside each line, in the file's order.

    Args:
        how: the curvature, the layers, and whether self-influence is asked for.
    """
    spec, layers, self_influence = how
    out = Path("scores.jsonl") if out is None else out
    check_ending(out, ".jsonl")
    check_out(out)
    names = ["score", "weight", *(["self_influence"] if self_influence else []), "loss", "tokens"]
    records = read_records(data)
    check_apart("out", out, data=data)
    check_free(out, force)
    if out.suffix == ".jsonl":
        for number, line in zip(records.numbers, records.objects, strict=True):
            if taken := [name for name in names if name in line]:
                raise InputError(
                    f"{records.at(number)} has {', '.join(map(repr, taken))} already, which the "
                    "scores are written as; rename it, or write a .csv"
                )
    reader = opened(texts, batch_size, device)
    found = reader.read(data)
    model = reader.made.model
    columns, factors = influences(
        model, found.loader, spec, layers, self_influence, here, checkpoint
    )
    losses = getattr(factors, "losses", None)
    if losses is None:  # of layers that are not the head
        losses = _losses(model, here.share(found.loader), columns["score"])
    columns |= {"loss": here.whole(wide(losses)), "tokens": torch.tensor(found.tokens)}
    if not here.first:
        return
    if out.suffix == ".jsonl":
        lists = {name: column.tolist() for name, column in columns.items()}
        write_or_rescue(out, lambda path: save_lines(path, found.records.objects, lists))
    else:
        numbers = [str(number) for number in found.records.numbers]
        named = {"influence": columns["score"], **columns}
        del named["score"]
        write_or_rescue(out, lambda path: save_scores(path, numbers, named))
    said(columns["score"], out)


def _losses(model: torch.nn.Module, loader: Any, scores: torch.Tensor) -> torch.Tensor:
    if not len(loader):  # of a process without lines
        return scores.new_empty(0)
    from imu_fast.model.outputs import measured
    from imu_fast.model.reading import Reading

    return measured(model, loader, Reading(), "score").loss.to(scores.dtype)
