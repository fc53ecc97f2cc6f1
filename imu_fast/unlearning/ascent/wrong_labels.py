"""Wrong labels that a forget sample is moved to: drawn at random, or the nearest class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.model.batches import device_of, split_batch, to_device
from imu_fast.model.forward import innermost
from imu_fast.model.guard import preserved
from imu_fast.model.loss import counts_of
from imu_fast.model.nested import copied
from imu_fast.model.outputs import logits_in_batches, logits_of
from imu_fast.unlearning.method import Job

# Of the input's own standard deviation: the reach of the single adversarial step.
_REACH = 0.1


def nearest_wrong_labels(job: Job) -> tuple[Tensor, Tensor]:
    """The likeliest class other than the label after one signed gradient step: [n] int64.

    Returns:
        These, and the offsets [n+1] of the samples among them.

    Raises:
        InputError: the inputs are not floating tensors (token ids have no gradient).
    """
    model, output = innermost(job.model), job.reading.output
    found, device = [], device_of(model)
    with preserved(model):
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for batch in job.forget:
            inputs, kwargs, labels = to_device(split_batch(batch), device)
            first = inputs[0] if inputs else None
            if kwargs or not isinstance(first, Tensor) or not first.is_floating_point():
                raise InputError(
                    "method='boundary_shrink' moves the inputs, which must be one floating tensor; "
                    "use method='random_label'"
                )
            x = inputs[0].detach().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(model(x.clone(), *copied(inputs[1:])), labels, output)
                labels = job.reading.labels_of_all(labels, logits, "unlearn()")
                loss = nn.functional.cross_entropy(logits, labels)
                (gradient,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                step = _REACH * x.std() * gradient.sign()
                moved = logits_of(model(x + step, *copied(inputs[1:])), labels, output)
            found.append(moved.scatter(1, labels[:, None], -torch.inf).argmax(dim=1))
    wrong = torch.cat(found)
    return wrong, torch.arange(len(wrong) + 1)


def random_wrong_labels(job: Job) -> tuple[Tensor, Tensor]:
    """A class other than it for each label of the forget set, uniform: [N] int64, and offsets."""
    labels, counts, classes = [], [], 0
    for logits, targets in logits_in_batches(job.model, job.forget, job.reading, "unlearn()"):
        labels.append(targets[targets >= 0])
        counts.append(counts_of(targets))
        classes = logits.shape[-1]
    found, offsets = torch.cat(labels), torch.cat(counts).cumsum(0)
    generator = torch.Generator().manual_seed(job.seed)
    shift = torch.randint(1, classes, found.shape, generator=generator)
    wrong = (found + shift.to(found.device)) % classes
    return wrong, torch.cat([offsets.new_zeros(1), offsets])
