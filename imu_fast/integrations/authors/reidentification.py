"""Person re-identification: the authors' ``Classification/unlearn/IMU_REID.py``.

The parameters are those with ``classifier`` in their names. In evaluation mode the model returns
features, and ``model.classifier`` makes the logits of them (as torchreid's models do); in training
mode it returns the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imu_fast.errors import EmptySelectionError, InputError
from imu_fast.influence.weights import influence_weights
from imu_fast.integrations.authors._gradients import Gradients, grouped, items
from imu_fast.integrations.authors._loop import Arguments, ascend, mode_of
from imu_fast.integrations.authors._parameters import Chosen, asking, l1_norm, named
from imu_fast.integrations.authors.classification import check_criterion, weighted_ascent
from imu_fast.model.guard import modes
from imu_fast.model.parts import Parts

logger = logging.getLogger("imu_fast")

CLIP_QUANTILE = 0.95


def _wanted(name: str) -> bool:
    return "classifier" in name


class _Classified(nn.Module):
    """The model with its classifier behind it, as it is in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(getattr(model, "classifier", None), nn.Module):
            raise InputError(
                "model has no module 'classifier'; the authors' code makes logits by "
                "model.classifier(model(image))"
            )
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.classifier(self.model(image))  # type: ignore[operator]


def _gradients(model: nn.Module, batches: Any) -> Gradients:
    whole = _Classified(model)
    return Gradients(whole, Chosen.of(whole, _wanted, "'classifier'"), batches)


def _named(model: nn.Module) -> list[nn.Parameter]:
    return list(named(model, _wanted, "'classifier'").values())


def l1_regularization(model: nn.Module) -> Tensor:
    """The L1 norm of the ``classifier`` parameters: a scalar with its graph."""
    return l1_norm(_named(model))


def _samples(dataset: Any) -> Iterator[Parts]:
    for batch in grouped(items(dataset), lambda item: item["img"].shape):
        images = torch.stack([item["img"] for item in batch])
        yield Parts([images], {}, torch.tensor([int(item["pid"]) for item in batch]))


def compute_fisher_inv_for_last_layer_datapoint(
    model: nn.Module, data_loader: Any, args: Any = None
) -> Tensor:
    """``1 / max(mean_i g_i^2, 0.01)`` over ``data_loader.dataset``: [P].

    Args:
        data_loader: its data set has items with ``img`` and ``pid``. args: unused, as in theirs.
    """
    return _gradients(model, _samples(data_loader.dataset)).inverse_fisher("clamp")


def compute_batch_influence(
    model: nn.Module,
    fisher_inv_diag: Tensor,
    image: Tensor,
    target: Tensor,
    criterion: Any,
) -> Tensor:
    """``- g_i^T diag(inv) gbar`` with the mean gradient of this batch: [B].

    Args:
        fisher_inv_diag: [P]. criterion: the plain cross-entropy.

    Raises:
        InputError: another criterion, or ``fisher_inv_diag`` is not [P].
    """
    check_criterion(criterion)
    found = _gradients(model, [Parts([image], {}, target)])
    inverse = found.chosen.check("fisher_inv_diag", fisher_inv_diag, found.mean.device)
    return found.influence(inverse, first_row_is_mean=False)


def _weights(influence: Tensor, signed_root: bool) -> Tensor:
    if signed_root:
        roots = influence.sqrt()
        return roots.clamp(max=torch.quantile(roots, CLIP_QUANTILE))
    indices, kept = influence_weights(influence, 1.0, CLIP_QUANTILE)
    return torch.zeros_like(influence).index_copy_(0, indices, kept)


def compute_combined_loss(
    model: nn.Module,
    image: Tensor,
    target: Tensor,
    fisher_inv: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    args: Any,
    *,
    signed_root: bool = False,
    gradient_twice: bool = False,
    batchnorm: Literal["train", "eval"] = "train",
) -> Tensor:
    """``- sum_i w_i l_i / sum_i w_i + alpha ||theta||_1``, its graph ends in ``classifier``.

    ``w = |influence| ** 0.5`` where the influence is negative and zero elsewhere, clipped at the
    0.95 quantile of those. Gradients that the model holds are cleared.

    Args:
        criterion: gives the losses [B]: ``nn.CrossEntropyLoss(reduction="none")``.
        args: has ``alpha``.
        signed_root: as theirs: the root of the influence as it is, which is NaN where it is
            negative, and weighs those samples that support keeping.
        gradient_twice: as theirs: the first term's gradient is added to the parameters here, and
            again when the loss that is returned is differentiated.
        batchnorm: mode of the model for the losses; ``"train"`` is theirs.

    Raises:
        EmptySelectionError: no sample of the batch supports forgetting.
        InputError: another criterion.
    """
    parameters = _named(model)
    kind = mode_of("batchnorm", batchnorm)
    influence = compute_batch_influence(model, fisher_inv, image, target, criterion)
    weight = _weights(influence, signed_root)
    with asking(model, parameters):
        with modes(model, batchnorm=kind, dropout=kind):
            logits = model(image) if kind == "train" else _Classified(model)(image)
        losses = criterion(logits, target)
        first = -torch.dot(weight, losses) / weight.sum()
        if not signed_root:
            first = weighted_ascent(losses, weight)
        model.zero_grad()
        if gradient_twice:
            first.backward(retain_graph=True)
        return first + args.alpha * l1_norm(parameters)


def IMU_REID(
    data_loaders: Any,
    model: nn.Module,
    criterion: Any,
    args: Any,
    mask: Any = None,
    *,
    batchnorm: Literal["train", "eval"] = "train",
) -> None:
    """Unlearn ``data_loaders["forget"]``: the ``classifier`` parameters change in place.

    The Fisher diagonal is made anew each epoch, the weights for each batch; a batch in which no
    sample supports forgetting is left out.

    Args:
        criterion: the cross-entropy or None. args: as of ``classification.IMU``.
        mask: parameter name -> what its gradient is multiplied by, or None.
        batchnorm: see :func:`compute_combined_loss`.
    """
    given = Arguments(args)
    check_criterion(criterion)
    kind = mode_of("batchnorm", batchnorm)
    losses_of = nn.CrossEntropyLoss(reduction="none")
    loader = data_loaders["forget"]
    inverse: list[Tensor] = []

    def begin() -> None:
        inverse[:] = [compute_fisher_inv_for_last_layer_datapoint(model, loader, given)]

    def loss_of(batch: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        image, target = batch["img"], batch["pid"]
        try:
            loss = compute_combined_loss(
                model, image, target, inverse[0], losses_of, given, batchnorm=kind
            )
        except EmptySelectionError:
            logger.info("no sample of this batch supports forgetting; it is left out")
            return None
        return loss, image, target

    ascend(model, _named(model), loader, loss_of, given, mask, kind, begin=begin)
