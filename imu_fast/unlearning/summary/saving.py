"""One pass over the training data, and its summary in a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Unpack

from imu_fast.errors import InputError, NoSamplesError, check_choice, check_positive
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.probabilities import augmented
from imu_fast.model.batches import Reread, as_batches, empty_message
from imu_fast.model.called import from_sample
from imu_fast.model.capture import capture_features
from imu_fast.model.forward import innermost
from imu_fast.model.guard import door
from imu_fast.model.head import shared_with
from imu_fast.model.head_features import HeadFeatures
from imu_fast.model.labels import class_labels
from imu_fast.model.outputs import measured
from imu_fast.model.parts import Parts
from imu_fast.model.reading import Reading, ReadingOptions
from imu_fast.storage import writable
from imu_fast.unlearning.head_weight import HeadWeight
from imu_fast.unlearning.identity import of_head, of_layer, of_model
from imu_fast.unlearning.subject import check_head_layer, naming
from imu_fast.unlearning.summary.hessian import HESSIANS, HeadHessian, Kind, head_hessian
from imu_fast.unlearning.summary.inner import (
    Inner,
    capturable,
    chunks_of,
    inner_hessians,
    inner_layers,
    without_signal,
)
from imu_fast.unlearning.summary.summary import TrainingSummary, class_sums

logger = logging.getLogger("imu_fast")

# Samples whose features exist at once.
_SAMPLES = 2048
_CPU = torch.device("cpu")


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
    inner_layers: Literal["auto"] | str | nn.Module | Sequence[str | nn.Module] | None = "auto",
    progress: bool = False,
    **reading: Unpack[ReadingOptions],
) -> TrainingSummary:
    """Keep of a training set what forgetting some of it needs: sums over samples, no sample.

    One pass over the training data, in evaluation mode; give it without augmentation, as the
    forget set will be given. Memory does not grow with N: beside the sums there are 2,048 samples
    and their features, and at inner layers inputs and signals of 256; of a loader with larger
    batches those of one batch. All sums are float64. What is kept, its size and what it loses are
    logged, and in the summary's repr.

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
        inner_layers: layers before the head of which K-FAC is kept, ``8 (C^2 + D^2)`` bytes each,
            for ``method="self_distillation"``: names, modules or patterns as ``layers`` of
            :func:`imu_fast.capture`. Costs a second forward pass and a backward pass to them for
            each class (beyond 32 classes one, of drawn labels). ``"auto"``: the last three before
            the head that fit into 100 MB, less those, with a warning, that the first batch shows
            cannot be captured. None: none, and no backward pass.
        reading: ``output``, ``loss``, ``ignore_index``, as of :func:`imu_fast.capture_features`.

    Returns:
        The :class:`TrainingSummary` that was written.

    Raises:
        InputError, NoHeadFoundError: bad arguments or data, a head that is not linear up to the
            logits or tied to another layer, an inner layer that is none or cannot be stepped,
            samples without a label or with several; the path cannot be written.
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
    accuracy, count = _accuracy(unseen, model, how)
    sums = _Sums(model, layers, None if kind == "auto" else kind, inner_layers, how)
    batches = tqdm(as_batches(train_loader, model), disable=not progress, unit="batch")
    for start, chunk in chunks_of(batches, _SAMPLES):
        with from_sample(start):
            sums.add(chunk)
    if sums.head is None:
        raise NoSamplesError(empty_message(train_loader))
    summary = replace(sums.summary(lam, accuracy), unseen_count=count)
    summary.save(path)
    logger.info("%r written to %s", summary, os.fspath(path))
    return summary


class _Sums:
    """All that a summary is made of, over the chunks that were added.

    Attributes:
        head: what the head saw of the first chunk; its features are not kept.
    """

    def __init__(
        self, model: nn.Module, layers: Any, kind: Kind | None, inner: Any, reading: Reading
    ) -> None:
        self._model, self._layers, self._kind, self._reading = model, layers, kind, reading
        self._wanted, self._inner = inner, Inner()
        self.head: HeadFeatures | None = None
        self._hessian: HeadHessian
        self._moment: Tensor
        self._class_sums: Tensor
        self._counts: Tensor

    def add(self, chunk: Reread) -> None:
        """Of some samples more."""
        found = capture_features(self._model, chunk, self._layers, **self._reading.given())
        _check(found)
        first = self.head is None
        if first:
            self._begin(found, next(iter(chunk)))
        factors = GradientFactors.from_head(
            found.features, found.head.weight, found.head.bias, found.labels, name=found.name
        )
        hessian = head_hessian(factors, self._kind).to(_CPU)
        a = augmented(found.features, found.head.bias is not None)
        moment = (a.T @ a).cpu()
        sums, counts = (x.cpu() for x in class_sums(found.features, found.labels, len(self.theta)))
        self._hessian = hessian if first else self._hessian + hessian
        self._moment = moment if first else self._moment + moment
        self._class_sums = sums if first else self._class_sums + sums
        self._counts = counts if first else self._counts + counts
        names = [layer.name for layer in self._chosen]
        of_chunk = inner_hessians(self._model, chunk, names, self._reading, len(self.theta))
        for name, on_device in of_chunk.items():
            part = on_device.to(_CPU)
            self._inner[name] = self._inner[name] + part if name in self._inner else part

    def _begin(self, found: HeadFeatures, first: Parts) -> None:
        parts = [part for part, _ in found.parts]
        if tied := [name for part in parts for name in shared_with(self._model, part)]:
            raise InputError(
                f"the head {found.name!r} shares its weight with {', '.join(tied)}, so its "
                "features change with it, and a summary is of features that stay; untie the weight"
            )
        self.theta = torch.cat([HeadWeight(p.as_linear(), p.name).read() for p in parts], dim=1)
        self.head = replace(found, features=found.features[:0], labels=found.labels[:0])
        wanted = inner_layers(self._model, self._wanted, [part.name for part in parts])
        if self._wanted not in (None, "auto") and not wanted:
            raise InputError(
                f"inner_layers={self._wanted!r} is the head {found.name!r}, which is kept in any "
                "case; name layers before it, or pass inner_layers=None"
            )
        if self._wanted == "auto":
            wanted = capturable(self._model, wanted, first, self._reading, len(self.theta))
        self._chosen = wanted

    def summary(self, weight_decay: float, unseen: float | None) -> TrainingSummary:
        """Of all that was added."""
        head = self.head
        assert head is not None
        silent = without_signal(self._inner)
        if silent and self._wanted != "auto":
            raise InputError(
                f"inner_layers names {', '.join(map(repr, silent))}, on which no sample's loss "
                "depends; leave them out"
            )
        kept = [layer for layer in self._chosen if layer.name not in silent]
        has_bias, n = head.head.bias is not None, int(self._counts.sum())
        return TrainingSummary(
            n=n,
            hessian=self._hessian,
            second_moment=self._moment / n,
            class_means=self._class_sums / self._counts.clamp_min(1)[:, None],
            class_counts=self._counts,
            weight_decay=weight_decay,
            unseen_accuracy=unseen,
            head=head.name,
            fingerprint=of_head(self.theta, has_bias),
            model=of_model(innermost(self._model)),
            has_bias=has_bias,
            inner={layer.name: self._inner[layer.name] for layer in kept},
            inner_fingerprints={layer.name: of_layer(layer) for layer in kept},
        )


def _accuracy(unseen: Any, model: nn.Module, reading: Reading) -> tuple[float | None, int | None]:
    """A number as it is, or measured on data, and on how many samples."""
    if unseen is None:
        return None, None
    if isinstance(unseen, str | bool | int | float | np.generic) or (
        isinstance(unseen, Tensor) and not unseen.dim()
    ):
        number = check_positive("unseen", unseen, allow_zero=True)  # type: ignore[arg-type]
        if number > 1:
            raise InputError(f"unseen={unseen!r} must lie in [0, 1]")
        return number, None
    with naming("(unseen)"):
        found = measured(model, unseen, reading, "save_summary()")
    return found.accuracy, len(found.loss)


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
