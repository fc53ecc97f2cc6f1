"""Questions about made-up authors (TOFU, Maini et al. 2024), some of whom are to be forgotten.

A small model is trained from scratch on questions and answers. The forget set is all questions
about a few authors, drawn by seed; the unseen ones are about authors that no model is trained on.
A file has a line a question: ``split``, ``index``, ``question``, ``answer``; 20 questions in a row
are about one author, where several lines have one index of one split, about one author each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from imu_fast.data.chat import PLAIN, Encoded, Encoder
from imu_fast.data.text import Padded
from imu_fast.data.text_files import Example, Records, read_records
from imu_fast.errors import InputError, check_count, check_installed
from imu_fast.evaluation.evaluate import evaluate
from imu_fast.evaluation.metrics import roc_auc
from imu_fast.losses.cross_entropy import IGNORE_INDEX
from imu_fast.study.cells import Json
from imu_fast.study.language.experiment import Experiment, Material, Measure
from imu_fast.study.language.measures import (
    mean_gap,
    min_k_scores,
    relearning_steps,
    rouge,
    token_divergence,
    truth_ratios,
)
from imu_fast.study.language.models import Network
from imu_fast.study.language.sequences import Sequences
from imu_fast.study.report.blocks import Metric
from imu_fast.unlearning.depth import StopRule

_QUESTIONS = 20  # about each author
_PAD, _END = "<pad>", "<end>"
# Wrong answers to each question, for the truth ratio.
_WRONG = 4
_RELEARNED = 0.9
_SETS = ("forget", "kept", "unseen")
GAPS = (
    *("forget_probability", "forget_rouge", "min_k"),
    *("kept_probability", "kept_rouge", "unseen_probability"),
)


@dataclass(frozen=True)
class More:
    """What measures need beside rows: the tokenizer, and wrong answers to the forget questions."""

    tokenizer: Any
    wrong: Sequences


def made_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) of these texts alone.

    Args:
        vocabulary: tokens at most; 256 bytes, padding and the end of a text are among them.
    """
    check_installed("a tokenizer", "tokenizers", "transformers", install="'imu_fast[text]'")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PAD, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=_PAD, eos_token=_END)


@dataclass(frozen=True)
class Tofu(Experiment):
    """The experiment, and its sizes.

    Attributes:
        path: of the questions.
        forget: groups of ``forget10`` that are forgotten, each all lines of 20 indices.
        kept, unseen: authors of ``retain`` that are trained on, and that no model is.
        measured: kept questions that are measured, and questions that are answered for ROUGE-L.
        relearned: steps of relearning at most.
    """

    name: ClassVar[str] = "tofu"
    title: ClassVar[str] = "Questions about authors, some of whom are forgotten"
    depth: ClassVar[str] = (
        "token accuracy on the forget set no higher than the original's on questions about authors "
        "that it never saw, which a user can measure"
    )
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "gap",
            "gap",
            3,
            "average gap: mean absolute difference to the retrained model in answer probability, "
            "ROUGE-L and Min-K% AUC on forget questions, in the first two on kept ones, and in the "
            "first on unseen ones",
        ),
        Metric(
            "kl_forget", "KL, forget", 3, "divergence in nats from the retrained model, a token"
        ),
        Metric("kl_kept", "KL, kept", 3, "the same on kept questions"),
        Metric("kl_unseen", "KL, unseen", 3, "the same on unseen ones"),
        Metric("forget_probability", "p, forget", 3, "answer probability, length-normalised"),
        Metric("kept_probability", "p, kept", 3, "the same on kept questions"),
        Metric("unseen_probability", "p, unseen", 3, "the same on unseen ones"),
        Metric("forget_rouge", "ROUGE-L, forget", 3, "recall of greedy answers"),
        Metric("kept_rouge", "ROUGE-L, kept", 3, "the same on kept questions"),
        Metric("min_k", "Min-K% AUC", 3, "how well the least likely 20 % tell forget from unseen"),
        Metric(
            "truth_ks",
            "truth KS",
            3,
            "Kolmogorov-Smirnov distance to the retrained model of a proxy of the truth ratio, "
            "whose wrong answers are those to other questions",
        ),
        Metric("relearn", "relearn", 1, "steps until 0.9 of forget accuracy is back; at most 20"),
    )
    margins: ClassVar[dict[str, float]] = {"gap": 0.01, "kl_forget": 0.05, "kl_kept": 0.05}

    path: str = ""
    forget: int = 1
    kept: int = 5
    unseen: int = 3
    measured: int = 20
    relearned: int = 20
    vocabulary: int = 1200
    layers: int = 2
    width: int = 64
    epochs: int = 40
    lr: float = 3e-3
    max_steps: int = 40
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in (
            "forget",
            "kept",
            "unseen",
            "measured",
            "relearned",
            "layers",
            "width",
            "epochs",
        ):
            check_count(name, getattr(self, name))
        check_count("vocabulary", self.vocabulary, minimum=258)
        self._lines()

    def settings(self) -> Json:
        """Without the path, which is of one machine only; the data have a fingerprint."""
        return {k: v for k, v in asdict(self).items() if k != "path"}

    def _lines(self) -> tuple[Records, dict[tuple[str, int], list[int]]]:
        """The file, and which of its lines are of each split and twenty indices.

        Raises:
            InputError: it cannot be read, or has too few authors.
        """
        records = read_records(Path(self.path), "data_path")
        found: dict[tuple[str, int], list[int]] = {}
        for place, (number, line) in enumerate(zip(records.numbers, records.objects, strict=True)):
            known = all(isinstance(line.get(k), str) for k in ("split", "question", "answer"))
            if not known or not isinstance(line.get("index"), int):
                raise InputError(
                    f"{records.at(number)} needs split, question and answer (text) and index (a "
                    "whole number)"
                )
            found.setdefault((line["split"], line["index"] // _QUESTIONS), []).append(place)
        for split, wanted in (("forget10", self.forget), ("retain", self.kept + self.unseen)):
            there = sum(name == split for name, _ in found)
            if there < wanted:
                raise InputError(
                    f"data_path={self.path!r} has {there} groups of 20 indices in split "
                    f"{split!r}; {wanted} are needed"
                )
        return records, found

    def material(self, seed: int) -> Material:
        records, groups = self._lines()
        lines = records.objects
        generator = torch.Generator().manual_seed(seed)

        def drawn(split: str) -> list[list[int]]:
            those = [places for (name, _), places in groups.items() if name == split]
            return [those[k] for k in torch.randperm(len(those), generator=generator).tolist()]

        authors = drawn("retain")
        chosen = {
            "forget": drawn("forget10")[: self.forget],
            "kept": authors[: self.kept],
            "unseen": authors[self.kept : self.kept + self.unseen],
        }
        tokenizer = made_tokenizer(
            [f"{line['question']} {line['answer']}" for line in lines], self.vocabulary
        )
        encoder = Encoder(tokenizer, "causal", PLAIN, "all", None, {})
        places = {name: [p for group in those for p in group] for name, those in chosen.items()}
        # Wrong answers: to other forget questions.
        others = len(places["forget"])
        k = min(_WRONG, others - 1)
        wrong = [
            (places["forget"][i], places["forget"][(i + 1 + j) % others])
            for i in range(others)
            for j in torch.randperm(others - 1, generator=generator)[:k].tolist()
        ]
        asked = {name: [(place, place) for place in those] for name, those in places.items()}

        def encoded(pairs: list[tuple[int, int]]) -> list[Encoded]:
            return [
                encoder.encode(
                    Example(records.numbers[q], lines[q]["question"], lines[a]["answer"]),
                    records.at(records.numbers[q]),
                )
                for q, a in pairs
            ]

        rows = _padded(
            {**{n: encoded(p) for n, p in asked.items()}, "wrong": encoded(wrong)}, tokenizer
        )
        few = torch.randperm(len(rows["kept"]), generator=generator)[: self.measured]
        network = Network(
            vocabulary=len(tokenizer),
            # A generated answer to the longest prompt may be as long as the longest row.
            length=2 * rows["forget"].ids.shape[1],
            layers=self.layers,
            width=self.width,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
        )
        return Material(
            forget=rows["forget"],
            kept=rows["kept"],
            # Facts that are to stay are those trained on; of them no other question knows.
            validation=rows["kept"],
            sets={"forget": rows["forget"], "kept": rows["kept"][few], "unseen": rows["unseen"]},
            network=network,
            more=More(tokenizer, rows["wrong"]),
        )

    def stop(self, retrained: Callable[[], nn.Module], material: Material) -> StopRule:
        return StopRule(unseen_accuracy=material.sets["unseen"].batches())

    def measure(
        self, material: Material, original: nn.Module, retrained: nn.Module, seed: int
    ) -> Measure:
        check_installed("the truth ratio", "scipy")
        from scipy.stats import ks_2samp

        sets, more = material.sets, material.more
        few = slice(0, self.measured)
        learned = evaluate(original, material.forget.batches())["accuracy"]

        def seen(model: nn.Module) -> Json:
            row = {
                f"{name}_probability": float(
                    evaluate(model, rows.batches())["confidence"].double().mean()
                )
                for name, rows in sets.items()
            }
            for name in ("forget", "kept"):
                row[f"{name}_rouge"] = rouge(model, sets[name][few], more.tokenizer)
            scores = (min_k_scores(model, sets[name]) for name in ("forget", "unseen"))
            return row | {"min_k": roc_auc(*scores)}

        reference = seen(retrained)
        ratios = truth_ratios(retrained, material.forget, more.wrong).numpy()

        def measured(model: nn.Module) -> Json:
            row = seen(model)
            row["gap"] = mean_gap(row, reference, GAPS)
            for name in _SETS:
                row[f"kl_{name}"] = token_divergence(retrained, model, sets[name])
            ours = truth_ratios(model, material.forget, more.wrong).numpy()
            row["truth_ks"] = float(ks_2samp(ours, ratios, method="asymp").statistic)
            target = _RELEARNED * learned
            row["relearn"] = relearning_steps(
                model, material.forget, target=target, seed=seed, most=self.relearned
            )
            return row

        return measured


def _padded(rows: dict[str, list[Encoded]], tokenizer: Any) -> dict[str, Sequences]:
    """All to one length, so that they can be joined."""
    longest = max(len(one.input_ids) for those in rows.values() for one in those)
    found = {}
    for name, those in rows.items():
        made = Padded(tokenizer.pad_token_id)(those)
        short = longest - made["input_ids"].shape[1]
        columns = zip(
            ("input_ids", "attention_mask", "labels"),
            (tokenizer.pad_token_id, 0, IGNORE_INDEX),
            strict=True,
        )
        found[name] = Sequences(
            *(nn.functional.pad(made[column], (0, short), value=value) for column, value in columns)
        )
    return found
