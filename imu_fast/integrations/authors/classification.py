"""Image classification: the authors' ``Classification/unlearn/IMU.py``.

The parameters are those with ``fc`` in their names, flattened as ``[W.flatten(), b]``. Samples run
in batches and in evaluation mode; modes and flags of the model are afterwards as they were. Their
functions need CUDA; these run where the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from imu_fast.errors import InputError
from imu_fast.influence.weights import influence_weights
from imu_fast.integrations.authors._gradients import Gradients, LazyGradients, grouped, items
from imu_fast.integrations.authors._loop import Arguments, ascend, loader_of, mode_of
from imu_fast.integrations.authors._parameters import Chosen, asking, l1_norm, named
from imu_fast.model.guard import modes
from imu_fast.model.parts import Parts

CLIP_QUANTILE = 0.93


def _wanted(name: str) -> bool:
    return "fc" in name


def get_last_params(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with ``fc`` in their names."""
    return list(named(model, _wanted, "'fc'").values())


def flatten_grad(grad_list: Any) -> Tensor:
    """Gradients as one vector [P]."""
    return torch.cat([g.reshape(-1) for g in grad_list])


def l1_regularization(model: nn.Module) -> Tensor:
    """The L1 norm of the ``fc`` parameters: a scalar with its graph."""
    return l1_norm(get_last_params(model))


class InfluenceWeightedDataset(Dataset):
    """``(data, label, weight)`` of every item of a data set of ``(data, label)``."""

    def __init__(self, base_dataset: Any, weights: Any) -> None:
        self.dataset = base_dataset
        self.weights = weights

    def __getitem__(self, index: int) -> tuple[Any, Any, Any]:
        data, label = self.dataset[index]
        return data, label, self.weights[index]

    def __len__(self) -> int:
        return len(self.dataset)


def _shape(item: Any) -> Any:
    return getattr(item[0], "shape", None)


def _batches(dataset: Any, collate_fn: Callable[[Any], Any]) -> Iterator[Parts]:
    for batch in grouped(items(dataset), _shape):
        x = collate_fn([item[0] for item in batch])
        t = collate_fn([item[1] for item in batch])
        yield Parts([x], {}, torch.as_tensor(t))


def _gradients(model: nn.Module, dataset: Any, collate_fn: Any) -> Gradients:
    return Gradients(model, Chosen.of(model, _wanted, "'fc'"), _batches(dataset, collate_fn))


def compute_fisher_matrix_from_dataset(
    model: nn.Module, dataset: Any, collate_fn: Callable[[Any], Any], gpu: int = -1
) -> Tensor:
    """``1 / (mean_i g_i^2 + 0.01)``: [P].

    Args:
        dataset: items ``(image, label)``. collate_fn: makes a batch of a list of either.
        gpu: index of the CUDA device of the result; -1, or without CUDA: the model's device.
    """
    inverse = _gradients(model, dataset, collate_fn).inverse_fisher("add")
    if gpu < 0 or not torch.cuda.is_available():
        return inverse
    return inverse.to(torch.device("cuda", gpu))


def compute_all_gradients(
    model: nn.Module,
    dataset: Any,
    collate_fn: Callable[[Any], Any],
    *,
    first_row_is_mean: bool = False,
) -> tuple[LazyGradients, Tensor]:
    """G [n, P], kept as factors until entries are asked for, and its mean gbar [P].

    Args:
        first_row_is_mean: as theirs, whose in-place sum overwrites row 0 with the mean.
    """
    found = _gradients(model, dataset, collate_fn)
    return LazyGradients(found, first_row_is_mean), found.mean


def compute_influence_weights(
    model: nn.Module,
    inv_fisher_diag: Tensor,
    dataset: Any,
    collate_fn: Callable[[Any], Any],
    *,
    first_row_is_mean: bool = False,
) -> Tensor:
    """``- g_i^T diag(inv) gbar``: [n], on the CPU.

    Args:
        inv_fisher_diag: [P], of :func:`compute_fisher_matrix_from_dataset`.
        first_row_is_mean: as theirs: the score of sample 0 is that of the mean gradient.

    Raises:
        InputError: ``inv_fisher_diag`` is not [P].
    """
    found = _gradients(model, dataset, collate_fn)
    inverse = found.chosen.check("inv_fisher_diag", inv_fisher_diag, found.mean.device)
    return found.influence(inverse, first_row_is_mean).cpu()


def select_top_influential_data(
    forget_dataset: Any, influences: Any, top_percent: float
) -> tuple[Subset[Any], np.ndarray]:
    """The samples of largest magnitude, whatever the sign: a Subset, and its indices [k].

    Args:
        influences: [n]. top_percent: the share to keep, in (0, 1]; at least one sample is.
    """
    magnitude = np.abs(np.asarray(influences))
    kept = max(int(len(magnitude) * top_percent), 1)
    indices = np.argsort(magnitude)[::-1][:kept]
    return Subset(forget_dataset, indices), indices  # type: ignore[arg-type]


def replace_loader_dataset(
    dataset: Any, args: Any, seed: int = 1, shuffle: bool = True
) -> DataLoader[Any]:
    """A DataLoader with ``args.batch_size``, after the random states were seeded."""
    import random

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return loader_of(dataset, args.batch_size, shuffle)


def calc_loss(y: Tensor, t: Tensor) -> Tensor:
    """The mean cross-entropy of logits [B, C]."""
    return nn.functional.cross_entropy(y, t)


def compute_combined_loss(
    model: nn.Module,
    image: Tensor,
    target: Tensor,
    weight: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    args: Any,
    *,
    batchnorm: Literal["train", "eval"] = "train",
) -> Tensor:
    """``- sum_i w_i l_i / sum_i w_i + alpha ||theta||_1``, its graph ends in the ``fc`` parameters.

    Gradients that the model holds are cleared, as theirs does; its mode and flags are as before.

    Args:
        weight: [B]. criterion: gives the losses [B] of logits and target. args: has ``alpha``.
        batchnorm: mode of the model. ``"train"`` is theirs: statistics of BatchNorm drift on the
            forget set, and dropout drops; ``"eval"``: neither.

    Raises:
        InputError: ``criterion`` gives another shape, or the weights do not sum to more than zero.
    """
    parameters = get_last_params(model)
    kind = mode_of("batchnorm", batchnorm)
    with asking(model, parameters), modes(model, batchnorm=kind, dropout=kind):
        losses = criterion(model(image), target)
        loss = weighted_ascent(losses, weight) + args.alpha * l1_norm(parameters)
    model.zero_grad()
    return loss


def weighted_ascent(losses: Tensor, weight: Tensor) -> Tensor:
    """``- sum_i w_i l_i / sum_i w_i`` of losses [B]: a scalar."""
    weight = weight.to(losses)
    if losses.shape != weight.shape or losses.dim() != 1:
        raise InputError(
            f"criterion gives losses of shape {tuple(losses.shape)} for weights of shape "
            f"{tuple(weight.shape)}; pass one that gives a loss per sample, such as "
            "nn.CrossEntropyLoss(reduction='none')"
        )
    if not float(weight.sum()) > 0:
        raise InputError(f"weight sums to {float(weight.sum())}; leave this batch out")
    return -torch.dot(weight, losses) / weight.sum()


def IMU(
    data_loaders: Any,
    model: nn.Module,
    criterion: Any,
    args: Any,
    mask: Any = None,
    *,
    first_row_is_mean: bool = False,
    batchnorm: Literal["train", "eval"] = "train",
) -> None:
    """Unlearn ``data_loaders["forget"]``: the model's ``fc`` parameters change in place.

    The weights are made once; every epoch is a pass in a new order, drawn as theirs from torch's
    own random state. The same seed gives their weights to rounding (where no score is wrong, see
    ``first_row_is_mean``).

    Args:
        criterion: theirs is replaced by the cross-entropy, so it must be that or None.
        args: ``unlearn_lr``, ``unlearn_epochs``, ``momentum``, ``weight_decay``, ``batch_size``,
            ``alpha``, ``top_data``, ``decreasing_lr``, ``warmup`` (with ``lr``);
            what is missing has the default of their command line.
        mask: parameter name -> what its gradient is multiplied by (theirs takes and ignores it).
        first_row_is_mean: see :func:`compute_influence_weights`.
        batchnorm: see :func:`compute_combined_loss`. In ``"train"`` the running statistics drift
            on the forget set, which changes every prediction.

    Raises:
        EmptySelectionError: no sample supports forgetting.
        InputError: a criterion of another kind, or arguments that it does not have.
    """
    given = Arguments(args)
    check_criterion(criterion)
    kind = mode_of("batchnorm", batchnorm)
    loader = data_loaders["forget"]
    found = _gradients(model, loader.dataset, loader.collate_fn)
    scores = found.influence(found.inverse_fisher("add"), first_row_is_mean).cpu()
    indices, weights = selected(scores, given.top_data)
    weighted = InfluenceWeightedDataset(Subset(loader.dataset, indices.tolist()), weights)
    batches = loader_of(weighted, given.batch_size, shuffle=True)
    losses_of = nn.CrossEntropyLoss(reduction="none")

    def loss_of(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        image, target, weight = batch
        loss = compute_combined_loss(model, image, target, weight, losses_of, given, batchnorm=kind)
        return loss, image, target

    ascend(model, get_last_params(model), batches, loss_of, given, mask, kind, seen_twice=True)


def selected(scores: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Negative scores, the ``max(1, int(top * count))`` largest: indices and clipped roots."""
    count = int((scores < 0).sum())
    kept = max(1, int(count * top))
    return influence_weights(scores, kept / count if count else 1.0, CLIP_QUANTILE)


def check_criterion(criterion: Any) -> None:
    """Raise InputError unless it is the plain cross-entropy, or None."""
    if criterion is None:
        return
    plain = (
        isinstance(criterion, nn.CrossEntropyLoss)
        and criterion.weight is None
        and criterion.label_smoothing == 0
        and criterion.ignore_index == -100
    )
    if not plain:
        raise InputError(
            f"criterion={criterion!r}: the authors' loop replaces it by the plain cross-entropy; "
            "pass nn.CrossEntropyLoss() or None"
        )
