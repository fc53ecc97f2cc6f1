"""The summary of a training set: what it is made of, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, brief, check_positive
from imu_fast.model.forward import innermost
from imu_fast.model.head import LinearLayer
from imu_fast.storage import DAMAGE, load_tensors, save_tensors, writable
from imu_fast.unlearning.identity import of_head, of_layer, of_model
from imu_fast.unlearning.summary.hessian import HESSIANS, HeadHessian, KroneckerHessian

# Of the files below; a reader refuses any other.
# 2: nothing said of which weights before the head the features were.
SUMMARY_FORMAT = 3
_KEY = "training_summary"


@dataclass(frozen=True, eq=False, repr=False)
class TrainingSummary:
    """All that is kept of a training set: sums over its samples at the head, no sample.

    :func:`imu_fast.save_summary` makes it of a trained model and its training data, in one pass;
    ``summary=`` of :func:`imu_fast.unlearn` takes it. It is of that model's weights alone: of
    another one, or of this one after it was changed, it is refused.

    Attributes:
        n: training samples, N.
        hessian: the undamped sum over them of the head's GGN, for a softmax head the Hessian of the
            summed loss: exact, as class blocks or as K-FAC (``kind``).
        second_moment: ``S = 1/N sum a~ a~^T`` of the features with a one for the bias: [D, D],
            float64.
        class_means: [C, d] float64, the mean features of each class; zero where it has no sample.
        class_counts: [C] int64.
        weight_decay: lam of the mean training loss's ``lam/2 ||theta||^2``, as SGD's.
        unseen_accuracy: the model's accuracy on data that it never saw, or None. unseen_count: on
            how many samples it was measured; None where it was given as a number.
        head: the head's name. fingerprint: of its weights. model: of all of the model's weights and
            buffers, of which its features are.
        has_bias: whether D = d + 1.
        inner: K-FAC of layers before the head, by name. inner_fingerprints: of their weights.
    """

    n: int
    hessian: HeadHessian
    second_moment: Tensor
    class_means: Tensor
    class_counts: Tensor
    weight_decay: float
    unseen_accuracy: float | None
    head: str
    fingerprint: str
    model: str
    has_bias: bool
    inner: dict[str, KroneckerHessian] = field(default_factory=dict)
    inner_fingerprints: dict[str, str] = field(default_factory=dict)
    unseen_count: int | None = None

    @property
    def kind(self) -> str:
        """Of the Hessian: "exact", "blocks" or "kfac"."""
        return self.hessian.kind

    @property
    def loses(self) -> str:
        """What is not kept of the Hessian, in words."""
        return self.hessian.loses

    @property
    def nbytes(self) -> int:
        """Of its tensors in a file."""
        own = self.hessian.nbytes + sum(getattr(self, name).nbytes for name in _TENSORS)
        return own + sum(hessian.nbytes for hessian in self.inner.values())

    def __repr__(self) -> str:
        """One line: of what, how large, and what it loses."""
        classes, width = self.hessian.shape
        unseen = "unknown" if self.unseen_accuracy is None else f"{self.unseen_accuracy:.4f}"
        return (
            f"TrainingSummary({self.n} samples at {self.head!r} [{classes}, {width}], "
            f"{self.nbytes / 1e6:.2f} MB, hessian {self.kind} (loses {self.loses}), "
            f"K-FAC of {', '.join(map(repr, self.inner)) or 'no layer before it'}, "
            f"weight_decay {self.weight_decay:g}, unseen accuracy {unseen})"
        )

    def check_head(self, model: nn.Module, theta: Tensor, has_bias: bool, forget: int) -> None:
        """Raise InputError unless it is of this model, and of more samples than are forgotten.

        Args:
            theta: [C, D] of its head, in the model's dtype. forget: samples, n.
        """
        if tuple(theta.shape) != self.hessian.shape or has_bias != self.has_bias:
            raise InputError(
                f"summary is of a head {list(self.hessian.shape)}, the model's is "
                f"{list(theta.shape)}; save one of this model, imu_fast.save_summary"
            )
        if of_head(theta, has_bias) != self.fingerprint:
            raise InputError(
                f"summary is of other weights of the head {self.head!r} than the model has: of "
                "another model, or of this one before it was changed; save one of this model, "
                "imu_fast.save_summary"
            )
        held = sum(t.numel() for t in model.state_dict().values() if isinstance(t, Tensor))
        # A head alone takes features that are there already: nothing before it can be compared.
        if held > theta.numel() and of_model(innermost(model)) != self.model:
            raise InputError(
                f"summary is of features of other weights: the head {self.head!r} is the model's, "
                "and what is before it has been changed since; save one of this model, "
                "imu_fast.save_summary"
            )
        if forget >= self.n:
            raise InputError(
                f"summary is of {self.n} training samples, and {forget} are to be forgotten: "
                "nothing would be left; pass the summary of the whole training set"
            )

    def check_inner(self, layers: Sequence[LinearLayer]) -> None:
        """Raise InputError unless it has K-FAC of these layers, as they are."""
        for layer in layers:
            if layer.name not in self.inner:
                raise InputError(
                    f"summary has no K-FAC of layer {layer.name!r}; it has "
                    f"{', '.join(map(repr, self.inner)) or 'none'}. Save one with "
                    f"imu_fast.save_summary(..., inner_layers=[{layer.name!r}]), or name others"
                )
            if of_layer(layer) != self.inner_fingerprints[layer.name]:
                raise InputError(
                    f"summary is of other weights of layer {layer.name!r} than the model has; "
                    "save one of this model, imu_fast.save_summary"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which :func:`imu_fast.load_summary` reads.

        Under a temporary name first, so that it is whole or absent, and with a checksum.

        Raises:
            InputError: the path cannot be written.
            WriteError: the file system refuses; what was there is untouched.
        """
        writable(path, size=self.nbytes)
        said = {
            "format": SUMMARY_FORMAT,
            "kind": self.kind,
            "shape": list(self.hessian.shape),
            **{name: getattr(self, name) for name in _PLAIN},
        }
        said["inner"] = [
            {"name": name, "shape": list(h.shape), "fingerprint": self.inner_fingerprints[name]}
            for name, h in self.inner.items()
        ]
        tensors = {f"hessian.{name}": x for name, x in self.hessian.tensors().items()}
        for place, hessian in enumerate(self.inner.values()):
            tensors |= {f"inner.{place}.{name}": x for name, x in hessian.tensors().items()}
        tensors |= {name: getattr(self, name) for name in _TENSORS}
        save_tensors(path, tensors, {_KEY: json.dumps(said)})


_TENSORS = ("second_moment", "class_means", "class_counts")
_ABOUT = ("head", "fingerprint", "model", "has_bias")
_PLAIN = ("n", "weight_decay", "unseen_accuracy", "unseen_count", *_ABOUT)


def load_summary(path: str | os.PathLike[str]) -> TrainingSummary:
    """The :class:`TrainingSummary` that :func:`imu_fast.save_summary` wrote, on the CPU.

    Raises:
        InputError: the file is missing, damaged, no summary, or of another format.
    """
    tensors, metadata = load_tensors(path)
    shown = f"path={os.fspath(path)!r}"
    if _KEY not in metadata:
        raise InputError(
            f"{shown} holds no summary of a training set; imu_fast.save_summary writes one"
        )
    try:
        said = json.loads(metadata[_KEY])
        if said["format"] != SUMMARY_FORMAT:
            raise InputError(
                f"{shown} has the summary format {said['format']}, this version reads "
                f"{SUMMARY_FORMAT}; save it anew, or use the version of imu_fast that wrote it"
            )
        classes, width = said["shape"]
        hessian = HESSIANS[said["kind"]].restored(
            said["n"],
            (classes, width),
            {k.removeprefix("hessian."): x for k, x in tensors.items() if k.startswith("hessian.")},
        )
        others: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
        inner = {
            x["name"]: KroneckerHessian(
                said["n"],
                (x["shape"][0], x["shape"][1]),
                tensors[f"inner.{place}.outputs"],
                tensors[f"inner.{place}.inputs"],
            )
            for place, x in enumerate(said["inner"])
        }
        summary = TrainingSummary(
            hessian=hessian,
            **others,
            **{name: said[name] for name in _PLAIN},
            inner=inner,
            inner_fingerprints={x["name"]: x["fingerprint"] for x in said["inner"]},
        )
        _check(summary)
    except DAMAGE as error:
        if isinstance(error, InputError) and str(error).startswith(shown):
            raise
        raise InputError(f"{shown} is damaged or was changed: {brief(error)}") from error
    return summary


def _check(summary: TrainingSummary) -> None:
    """Raise ValueError where tensors are not what the text says."""
    classes, width = summary.hessian.shape
    d = width - summary.has_bias
    shapes: list[tuple[Tensor, tuple[int, ...]]] = [
        (summary.second_moment, (width, width)),
        (summary.class_means, (classes, d)),
        (summary.class_counts, (classes,)),
    ]
    for hessian in summary.inner.values():
        c, d = hessian.shape
        shapes += [(hessian.outputs, (c, c)), (hessian.inputs, (d, d))]
    found = [tuple(tensor.shape) for tensor, _ in shapes]
    if found != [shape for _, shape in shapes]:
        raise ValueError(f"it says [{classes}, {width}] and holds tensors {found}")
    if int(summary.class_counts.sum()) != summary.n or not math.isfinite(summary.hessian.trace()):
        raise ValueError(f"its counts are not those of {summary.n} samples")
    check_positive("weight_decay", summary.weight_decay, allow_zero=True)


def check_summary(name: str, value: Any) -> None:
    """Raise InputError unless it is a summary, or None."""
    if value is not None and not isinstance(value, TrainingSummary):
        raise InputError(
            f"{name} is a {type(value).__name__}; pass what imu_fast.save_summary or "
            "imu_fast.load_summary returns"
        )


def class_sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sums [C, d] float64 of features [N, d] by class, and how many there are [C]."""
    counts = torch.bincount(labels, minlength=classes)
    sums = features.new_zeros(classes, features.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(labels), device=labels.device).split(1 << 13):
        sums.index_add_(0, labels[rows], features[rows].double())
    return sums, counts
