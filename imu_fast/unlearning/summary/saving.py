"""One pass over the training data, and its summary in a file."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.errors import InputError, check_choice, check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.statistics import second_moment
from imu_fast.model.capture import capture_features
from imu_fast.model.guard import door
from imu_fast.model.head import shared_with
from imu_fast.model.head_features import HeadFeatures
from imu_fast.model.labels import class_labels
from imu_fast.model.outputs import measured
from imu_fast.model.reading import Reading, ReadingOptions
from imu_fast.storage import writable
from imu_fast.unlearning.head_weight import HeadWeight
from imu_fast.unlearning.identity import of_head
from imu_fast.unlearning.subject import check_head_layer, naming
from imu_fast.unlearning.summary.hessian import HESSIANS, head_hessian
from imu_fast.unlearning.summary.summary import TrainingSummary, class_sums

logger = logging.getLogger("imu_fast")


@door
def save_summary(
    model: nn.Module,
    train_loader: Any,
    path: str | os.PathLike[str],
    *,
    weight_decay: float = 0.0,
    unseen: Any = None,
    kind: Literal["auto", "exact", "blocks", "kfac"] = "auto",
    layers: str | nn.Module = "head",
    progress: bool = False,
    **reading: Unpack[ReadingOptions],
) -> TrainingSummary:
    """Keep of a training set what forgetting some of it needs: sums at the head, no sample.

    One forward pass over the training data, in evaluation mode; give it without augmentation, as
    the forget set will be given. Features of all N samples are held while it runs, 4 N d bytes; all
    sums are float64. What is kept, its size and what it loses are logged, and in the summary's
    repr.

    Args:
        model: a classifier that ends in a linear layer, trained.
        train_loader: the training data: whatever :func:`imu_fast.unlearn` takes.
        path: a safetensors file, replaced atomically.
        weight_decay: lam of the training, as given to SGD: the mean loss had ``lam/2 ||theta||^2``
            beside it. 0: none, which is torch's default for SGD.
        unseen: the model's accuracy on data that it never saw, in [0, 1], or such data, on which it
            is measured now: how deep random samples are to be forgotten. None: not kept.
        kind: of the Hessian: ``"exact"``, 4 P^2 bytes with P = (C - 1) D and N P^2 FLOPs;
            ``"blocks"``, 8 C D^2 bytes; ``"kfac"``, 8 (C^2 + D^2). ``"auto"``: exact up to
            P = 5000, K-FAC beyond.
        layers: the head, by name or as a module; ``"head"``: found.
        reading: ``output``, ``loss``, ``ignore_index``, as of :func:`imu_fast.capture_features`.

    Returns:
        The :class:`TrainingSummary` that was written.

    Raises:
        InputError, NoHeadFoundError: bad arguments or data, a head that is not linear up to the
            logits or tied to another layer, samples without a label or with several; the path
            cannot be written.
        WriteError: the file system refuses; what was there is untouched.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    lam = check_positive("weight_decay", weight_decay, allow_zero=True)
    check_choice("kind", kind, ("auto", *HESSIANS))
    check_head_layer("layers", layers)
    how = Reading.of("save_summary()", reading)
    how.of_classes("save_summary()")
    writable(path)
    accuracy = _accuracy(unseen, model, how)
    found = capture_features(model, train_loader, layers, progress=progress, **how.given())
    _check(found)
    if tied := [name for part, _ in found.parts for name in shared_with(model, part)]:
        raise InputError(
            f"the head {found.name!r} shares its weight with {', '.join(tied)}, so its features "
            "change with it, and a summary is of features that stay; untie the weight"
        )
    factors = GradientFactors.from_head(
        found.features, found.head.weight, found.head.bias, found.labels, name=found.name
    )
    theta = torch.cat([HeadWeight(p.as_linear(), p.name).read() for p, _ in found.parts], dim=1)
    means, counts = class_sums(found.features, found.labels, len(theta))
    summary = TrainingSummary(
        n=len(found.labels),
        hessian=head_hessian(factors, None if kind == "auto" else kind).to(torch.device("cpu")),
        second_moment=second_moment(factors).cpu(),
        class_means=means.cpu(),
        class_counts=counts.cpu(),
        weight_decay=lam,
        unseen_accuracy=accuracy,
        head=found.name,
        fingerprint=of_head(theta, found.head.bias is not None),
        has_bias=found.head.bias is not None,
    )
    summary.save(path)
    logger.info("%r written to %s", summary, os.fspath(path))
    return summary


def _accuracy(unseen: Any, model: nn.Module, reading: Reading) -> float | None:
    """A number as it is, or measured on data."""
    if unseen is None:
        return None
    if isinstance(unseen, bool | int | float) or (isinstance(unseen, Tensor) and not unseen.dim()):
        number = check_positive("unseen", unseen, allow_zero=True)  # type: ignore[arg-type]
        if number > 1:
            raise InputError(f"unseen={unseen!r} must lie in [0, 1]")
        return number
    with naming("(unseen)"):
        return measured(model, unseen, reading, "save_summary()").accuracy


def _check(found: HeadFeatures) -> None:
    if not found.linear:
        what = found.between or "something changes its output"
        raise InputError(
            f"a summary is of a head {found.name!r} whose output is the logits; here it is not "
            f"({what})"
        )
    class_labels(found.labels, (*found.labels.shape[:1], len(found.head.weight)))
    counts = found.offsets.diff()
    if found.sequences or not bool((counts == 1).all()):
        where = "samples have labels at positions"
        if not found.sequences:
            sample = int(torch.nonzero(counts != 1)[0])
            where = f"sample {sample} has {int(counts[sample])} valid labels"
        raise InputError(
            f"{where}: a summary is for forgetting samples of one label each; remove those without"
        )
