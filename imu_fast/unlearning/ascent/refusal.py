"""The forget set with a refusing answer in the place of each sample's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.model.batches import ForgetSet, Parts
from imu_fast.model.forward import Forward, forward_of
from imu_fast.unlearning.method import Job

_PER_TOKEN = ("input_ids", "attention_mask")


def check_answer(name: str, value: Any) -> None:
    """Raise InputError unless this is one answer's token ids, or not given yet."""
    if value is None:
        return
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.zeros(0)
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or bool((ids < 0).any()):
        raise InputError(
            f"{name}={value!r}; pass the token ids of the refusing answer, such as "
            "tokenizer(' I do not know.').input_ids"
        )


def refusing(job: Job, answer: Any, batch_size: int) -> ForgetSet:
    """Each forget sample's prompt with the refusing answer, which alone has labels.

    A decoder's prompt is what stands before the first label of the sample; where the decoder's
    input is made from the labels, the answer is simply these.

    Raises:
        InputError: no answer, samples of one label, or a sample without a prompt.
    """
    if answer is None:
        raise InputError("objective='refusal' needs answer=, the token ids of the refusing answer")
    if not job.sequences:
        raise InputError(
            "objective='refusal' with answer= is for sequences; samples of one label have no text "
            "to refuse with: objective='relabel' moves them to another class"
        )
    ids, forward = torch.as_tensor(answer).to(torch.int64), forward_of(job.model)
    made: list[Parts] = []
    for batch in job.forget:
        made += [_refused(batch.taken([i]), ids, forward, job) for i in range(batch.n)]
    return ForgetSet(list(Parts.gathered(made, batch_size)), batch_size, job.model)


def _refused(sample: Parts, answer: Tensor, forward: Forward, job: Job) -> Parts:
    loss = job.reading.loss
    assert isinstance(loss, CrossEntropy)
    labels = sample.labels[0]
    answer = answer.to(labels.device)
    if forward.labels is not None and forward.labels in sample.kwargs:  # the decoder's input
        return sample._replace(
            labels=answer[None], kwargs={**sample.kwargs, forward.labels: answer[None]}
        )
    named = dict(zip(forward.positional, sample.args, strict=False)) | sample.kwargs
    key = "input_ids" if "input_ids" in named else next(iter(named), "")
    ids = named.get(key)
    valid = torch.nonzero(labels != loss.ignore_index).flatten()
    start = int(valid[0]) + (loss.shift is not True) if len(valid) else len(labels)
    other = [k for k, v in named.items() if k not in (key, *_PER_TOKEN) and isinstance(v, Tensor)]
    if not isinstance(ids, Tensor) or ids.shape != sample.labels.shape or other:
        raise InputError(
            f"answer= is put after the prompt in the model's token ids, of the labels' shape, and "
            f"its attention_mask; this forget set has {', '.join(named) or 'other inputs'}. Pass "
            "a forget set of refusing answers with objective='relabel' yourself"
        )
    if start == 0:
        raise InputError(
            "answer= follows a prompt, and a forget sample has none: its first token has a label. "
            f"Give the prompt's tokens the label {loss.ignore_index}"
        )
    prompt = ids[0, :start]
    made = torch.cat([prompt, answer])
    wanted = torch.full_like(made, loss.ignore_index)
    wanted[start:] = answer
    if loss.shift is not True:  # labels of the next position
        wanted = torch.cat([wanted[1:], wanted.new_full((1,), loss.ignore_index)])
    kwargs: dict[str, Any] = {key: made[None]}
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor):
        kwargs["attention_mask"] = torch.cat([mask[0, :start], mask.new_ones(len(answer))])[None]
    return Parts([], kwargs, wanted[None])
