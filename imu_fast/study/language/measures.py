"""What a language model still says of questions and answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import check_fraction
from imu_fast.evaluation.evaluate import evaluate
from imu_fast.losses.cross_entropy import IGNORE_INDEX
from imu_fast.study.language.models import descend, log_probabilities, minibatches
from imu_fast.study.language.sequences import Sequences

_RELEARN_RATE, _RELEARN_BATCH = 1e-3, 16


def answers(model: Any, rows: Sequences, tokenizer: Any, *, most: int) -> list[str]:
    """The most likely answer to each prompt, token by token (greedy), as text.

    Args:
        rows: prompts are their tokens before the first that counts.
        most: tokens of an answer.
    """
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    prompts = [
        ids[: int((labels != IGNORE_INDEX).nonzero()[0])]
        for ids, labels in zip(rows.ids, rows.labels, strict=True)
    ]
    # Padded on the left, so that what is said begins at one place.
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    with torch.no_grad():
        said = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=end,
        )
    return list(tokenizer.batch_decode(said[:, width:], skip_special_tokens=True))


def expected_answers(rows: Sequences, tokenizer: Any) -> list[str]:
    """What the rows' labels say."""
    kept = [labels[labels != IGNORE_INDEX] for labels in rows.labels]
    return list(tokenizer.batch_decode(kept, skip_special_tokens=True))


def rouge(model: Any, rows: Sequences, tokenizer: Any) -> float:
    """Mean ROUGE-L recall (Lin 2004) of greedy answers, no longer than the longest expected one.

    As TOFU takes it (Maini et al. 2024), but without a stemmer.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    most = int((rows.labels != IGNORE_INDEX).sum(dim=1).max())
    said = answers(model, rows, tokenizer, most=most)
    pairs = zip(said, expected_answers(rows, tokenizer), strict=True)
    scores = [scorer.score(theirs, ours)["rougeL"].recall for ours, theirs in pairs]
    return math.fsum(scores) / len(scores)


def min_k_scores(model: nn.Module, rows: Sequences, fraction: float = 0.2) -> Tensor:
    """Min-K% (Shi et al. 2024): mean log-probability of the least likely tokens that count: [n].

    Args:
        fraction: of a row's tokens, in (0, 1]; at least one is taken.
    """
    check_fraction("fraction", fraction)
    found = []
    for batch in rows.batches():
        log_p, targets, counts = _counted(model, batch)
        own = log_p.gather(1, targets[:, None])[:, 0]
        for one in own.split(counts.tolist()):
            found.append(one.sort().values[: max(1, int(fraction * len(one) + 1e-9))].mean())
    return torch.stack(found)


def token_divergence(reference: nn.Module, ours: nn.Module, rows: Sequences) -> float:
    """Mean over rows of the mean over tokens that count of ``KL(reference || ours)``, in nats."""
    found = []
    for batch in rows.batches():
        log_p, _, counts = _counted(reference, batch)
        log_q, _, _ = _counted(ours, batch)
        far = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        found += [one.mean() for one in far.split(counts.tolist())]
    return float(torch.stack(found).mean())


def _counted(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that count: log-probabilities [N, V], labels [N], and how many of each row."""
    targets = batch["labels"][:, 1:]
    counts = targets != IGNORE_INDEX
    return log_probabilities(model, batch, counts), targets[counts], counts.sum(dim=1)


def truth_ratios(model: nn.Module, right: Sequences, wrong: Sequences) -> Tensor:
    """A proxy of TOFU's truth ratio: mean probability of wrong answers over the right one's: [n].

    Probabilities are length-normalised. TOFU's own wrong answers and paraphrases of the right one
    are not needed here: the wrong ones are answers to other questions.

    Args:
        right: [n]. wrong: [n * k], k to each question, those of one question together.
    """
    p, q = (evaluate(model, rows.batches())["confidence"] for rows in (right, wrong))
    return q.view(len(p), -1).mean(dim=1) / p.clamp_min(torch.finfo(p.dtype).tiny)


def relearning_steps(
    model: nn.Module, rows: Sequences, *, target: float, seed: int, most: int
) -> int:
    """Steps of AdamW on the forget set, all parameters, until its token accuracy is back.

    Args:
        target: the accuracy that counts as relearned.

    Returns:
        Steps taken; ``most`` if that is not enough.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RELEARN_RATE)
    batches = minibatches(len(rows), _RELEARN_BATCH, seed)
    for step in range(most):
        if evaluate(model, rows.batches())["accuracy"] >= target:
            return step
        descend(model, optimizer, rows.batch(next(batches)))
    return most


def mean_gap(ours: dict[str, float], theirs: dict[str, float], names: Sequence[str]) -> float:
    """Mean absolute difference in these measures, each in [0, 1]."""
    return math.fsum(abs(ours[name] - theirs[name]) for name in names) / len(names)
