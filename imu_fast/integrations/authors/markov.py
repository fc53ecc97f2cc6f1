"""Sequences of Markov chains: the authors' ``synthetic/unlearn_IMU.py``.

Items are dicts with ``input_ids`` [T] and ``labels`` [T], which are shifted already: position t
holds what follows it, -100 where there is nothing to predict. The parameters are those with
``output_layer`` or ``decoder`` in their names. A sequence's loss is the mean over its valid
positions; one without any has gradient, and score, zero (theirs is NaN).

Their script scores a model that has just been initialised and loads the checkpoint afterwards: load
it first, or pass that model to get their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from imu_fast.errors import InputError
from imu_fast.integrations.authors._gradients import Gradients, LazyGradients, grouped, items
from imu_fast.integrations.authors._loop import mode_of
from imu_fast.integrations.authors._parameters import Chosen, asking, l1_norm, named
from imu_fast.integrations.authors.classification import (
    check_criterion,
    flatten_grad,
    selected,
    weighted_ascent,
)
from imu_fast.losses.cross_entropy import IGNORE_INDEX
from imu_fast.model.batches import device_of
from imu_fast.model.guard import modes
from imu_fast.model.parts import Parts

__all__ = [
    "InfluenceWeightedDataset",
    "calc_loss",
    "compute_all_gradients",
    "compute_combined_loss",
    "compute_fisher_matrix",
    "compute_influence_weights",
    "flatten_grad",
    "get_last_params",
    "l1_regularization",
    "select_top_negative_influence",
]
_RULE = "'output_layer' or 'decoder'"


def _wanted(name: str) -> bool:
    return "output_layer" in name or "decoder" in name


def get_last_params(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with ``output_layer`` or ``decoder`` in their names."""
    return list(named(model, _wanted, _RULE).values())


def l1_regularization(model: nn.Module) -> Tensor:
    """The L1 norm of these parameters: a scalar with its graph."""
    return l1_norm(get_last_params(model))


class InfluenceWeightedDataset(Dataset):
    """Items with ``input_ids``, ``labels`` and ``weight``."""

    def __init__(self, base_dataset: Any, weights: Any) -> None:
        self.dataset = base_dataset
        self.weights = weights

    def __getitem__(self, index: int) -> dict[str, Any]:
        data = self.dataset[index]
        return {
            "input_ids": data["input_ids"],
            "labels": data["labels"],
            "weight": self.weights[index],
        }

    def __len__(self) -> int:
        return len(self.dataset)


def calc_loss(y: Tensor, t: Tensor, state_size: int) -> Tensor:
    """The mean cross-entropy over all valid positions."""
    return nn.functional.cross_entropy(
        y.view(-1, state_size), t.view(-1), ignore_index=IGNORE_INDEX
    )


def _batches(dataset: Any) -> Iterator[Parts]:
    for batch in grouped(items(dataset), lambda item: item["input_ids"].shape):
        x = torch.stack([item["input_ids"] for item in batch])
        yield Parts([x], {}, torch.stack([item["labels"] for item in batch]))


def _gradients(model: nn.Module, dataset: Any, device: Any, state_size: int) -> Gradients:
    chosen = Chosen.of(model, _wanted, _RULE)
    widths = [len(layer.weight) for layer in chosen.layers]
    if state_size not in widths:
        raise InputError(
            f"state_size={state_size}, and the layers {[x.name for x in chosen.layers]} have "
            f"{widths} outputs; pass the number of states of the model"
        )
    check_device(model, device)
    return Gradients(model, chosen, _batches(dataset))


def check_device(model: nn.Module, device: Any) -> None:
    """Raise InputError unless the model is there."""
    wanted, there = torch.device(device), device_of(model)
    if wanted.type != there.type or wanted.index not in (None, there.index or 0):
        raise InputError(f"device={str(device)!r}, and the model is on {there}; move one of them")


def compute_fisher_matrix(model: nn.Module, dataset: Any, device: Any, state_size: int) -> Tensor:
    """``1 / (mean_i g_i^2 + 0.01)``: [P].

    Args:
        dataset: see the module. device: of the model. state_size: number of states.
    """
    return _gradients(model, dataset, device, state_size).inverse_fisher("add")


def compute_all_gradients(
    model: nn.Module,
    dataset: Any,
    device: Any,
    state_size: int,
    *,
    first_row_is_mean: bool = False,
) -> tuple[LazyGradients, Tensor]:
    """G [n, P], kept as factors until entries are asked for, and its mean gbar [P].

    Args:
        first_row_is_mean: as theirs, whose in-place sum overwrites row 0 with the mean.
    """
    found = _gradients(model, dataset, device, state_size)
    return LazyGradients(found, first_row_is_mean), found.mean


def compute_influence_weights(
    model: nn.Module,
    inv_fisher_diag: Tensor,
    dataset: Any,
    device: Any,
    state_size: int,
    *,
    first_row_is_mean: bool = False,
) -> Tensor:
    """``- g_i^T diag(inv) gbar``: [n], on the CPU.

    Args:
        inv_fisher_diag: [P], of :func:`compute_fisher_matrix`.
        first_row_is_mean: as theirs: the score of sequence 0 is that of the mean gradient.
    """
    found = _gradients(model, dataset, device, state_size)
    inverse = found.chosen.check("inv_fisher_diag", inv_fisher_diag, found.mean.device)
    return found.influence(inverse, first_row_is_mean).cpu()


def select_top_negative_influence(
    dataset: Any, influences: Any, top_percent: float
) -> tuple[Subset[Any], Tensor]:
    """The negative ones of largest magnitude: a Subset in descending order, float32 weights [k].

    ``w = |influence| ** 0.5``, clipped at the 0.93 quantile of those kept.

    Args:
        influences: [n]. top_percent: the share of the negative ones to keep, at least one.

    Raises:
        EmptySelectionError: none is negative.
    """
    scores = torch.as_tensor(np.asarray(influences))
    indices, weights = selected(scores, top_percent)
    return Subset(dataset, indices.numpy()), weights.to(torch.float32)  # type: ignore[arg-type]


def compute_combined_loss(
    model: nn.Module,
    batch: Any,
    criterion: Any,
    args: Any,
    device: Any,
    *,
    gradient_twice: bool = False,
    batchnorm: Literal["train", "eval"] = "train",
) -> Tensor:
    """``- sum_i w_i l_i / sum_i w_i + alpha ||theta||_1``; its graph ends in the chosen parameters.

    ``l_i`` is the mean over the valid positions of sequence i. Gradients that the model holds are
    cleared; its mode and flags are as before.

    Args:
        batch: ``input_ids`` [B, T], ``labels`` [B, T], ``weight`` [B].
        criterion: theirs is replaced by the cross-entropy, so it must be that or None.
        args: has ``alpha``. device: where the batch is moved.
        gradient_twice: as theirs: the first term's gradient is added to the parameters here, and
            again when the loss that is returned is differentiated, so that it counts twice.
        batchnorm: mode of the model, dropout included; ``"train"`` is theirs.
    """
    check_criterion(criterion)
    parameters = get_last_params(model)
    kind = mode_of("batchnorm", batchnorm)
    ids, labels, weight = (batch[key].to(device) for key in ("input_ids", "labels", "weight"))
    with asking(model, parameters):
        with modes(model, batchnorm=kind, dropout=kind):
            logits = model(ids)
        first = weighted_ascent(mean_losses(logits, labels), weight)
        model.zero_grad()
        if gradient_twice:
            first.backward(retain_graph=True)
        return first + args.alpha * l1_norm(parameters)


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each sequence's mean cross-entropy over its valid positions: [B], of [B, T, C] and [B, T]."""
    tokens = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return tokens.sum(dim=1) / (labels != IGNORE_INDEX).sum(dim=1).clamp(min=1)
