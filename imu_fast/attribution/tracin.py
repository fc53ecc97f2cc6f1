"""TracIn: what each training sample did to a query's loss, along the checkpoints of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.attribution.similarity import products, squared_norms
from imu_fast.errors import InputError, check_positive
from imu_fast.factors.source import Factors
from imu_fast.influence.scores import as_layers
from imu_fast.model.batches import rereadable
from imu_fast.model.capture import capture
from imu_fast.model.guard import door
from imu_fast.model.order import shuffling
from imu_fast.model.reading import Reading, ReadingOptions
from imu_fast.model.weights import Checkpoint, visiting


@door
def tracin(
    model: nn.Module,
    data: Any,
    queries: Any,
    *,
    checkpoints: Sequence[Checkpoint],
    learning_rates: float | Sequence[float],
    layers: Any = "head",
    progress: bool = False,
    **reading: Unpack[ReadingOptions],
) -> Tensor:
    """``sum_k lr_k <g_i, h_j>``, gradients at checkpoint k (TracInCP, Pruthi et al. 2020): [n, m].

    Positive: training on sample i lowered query j's loss (a proponent); negative: an opponent.
    That is minus the sum of ``lr_k`` :func:`imu_fast.pairwise_influence` under
    ``curvature="identity"``, whose sign is that of unlearning.

    Args:
        model: of the checkpoints' architecture; it comes back with the weights that it has.
        data: n training samples; queries: m samples. Any form that :func:`imu_fast.capture` reads;
            each is read once per checkpoint, in one order.
        checkpoints: state dicts, or paths of them: safetensors, or torch files of tensors alone.
        learning_rates: of each checkpoint, or one for all.
        layers: whose gradients are taken, as in :func:`imu_fast.capture`.
        reading: how the model is read: ``output``, ``loss``, ``ignore_index``, ``shift``, as of
            :func:`imu_fast.capture_features`.

    Returns:
        [n, m], in the factors' dtype.

    Raises:
        InputError: before any work, checkpoints that do not fit the model, are not finite or
            cannot be read, rates that do not fit them, or loaders that shuffle; and as
            :func:`imu_fast.capture`.
    """
    sets = {"data": data, "queries": queries}

    def pairs(found: list[list[Factors]]) -> Tensor:
        return products(*found)

    return _along_training(
        model, sets, pairs, checkpoints, learning_rates, layers, progress, reading
    )


@door
def tracin_self_influence(
    model: nn.Module,
    data: Any,
    *,
    checkpoints: Sequence[Checkpoint],
    learning_rates: float | Sequence[float],
    layers: Any = "head",
    progress: bool = False,
    **reading: Unpack[ReadingOptions],
) -> Tensor:
    """``sum_k lr_k ||g_i||^2``: [n]; large for mislabelled and rare samples (Pruthi et al. 2020).

    Arguments and errors as in :func:`tracin`.
    """

    def norms(found: list[list[Factors]]) -> Tensor:
        return squared_norms(*found)

    return _along_training(
        model, {"data": data}, norms, checkpoints, learning_rates, layers, progress, reading
    )


def _along_training(
    model: nn.Module,
    sets: dict[str, Any],
    statistic: Callable[[list[list[Factors]]], Tensor],
    checkpoints: Sequence[Checkpoint],
    learning_rates: float | Sequence[float],
    layers: Any,
    progress: bool,
    reading: ReadingOptions,
) -> Tensor:
    """``sum_k lr_k`` statistic of the sets' factors at checkpoint k."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    Reading.of("tracin", reading)
    total: Tensor | None = None
    with visiting(model, checkpoints) as enter:
        rates = _rates(learning_rates, len(checkpoints))
        for name, data in sets.items():
            sampler = shuffling(data) if len(rates) > 1 else None
            if sampler is not None:
                raise InputError(
                    f"{name} shuffles ({sampler}), so that samples have other places at each "
                    "checkpoint; pass a loader with shuffle=False"
                )
        readers = {name: rereadable(data, model) for name, data in sets.items()}
        seen: dict[str, list[Tensor | None]] = {}
        for k, rate in enumerate(rates):
            enter(k)
            found = []
            for name, reader in readers.items():
                factors = as_layers(
                    capture(model, reader, layers=layers, progress=progress, **reading), name
                )
                _check_same(name, seen.setdefault(name, _identity(factors)), _identity(factors))
                found.append(factors)
            part = statistic(found)
            total = part.mul_(rate) if total is None else total.add_(part, alpha=rate)
    assert total is not None
    return total


def _rates(given: float | Sequence[float], count: int) -> list[float]:
    if isinstance(given, Tensor):
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [check_positive("learning_rates", given, allow_zero=True)] * count
    if len(given) != count:
        raise InputError(
            f"learning_rates has {len(given)} of them for {count} checkpoints; pass one for each"
        )
    return [
        check_positive(f"learning_rates[{k}]", rate, allow_zero=True)
        for k, rate in enumerate(given)
    ]


def _identity(layers: list[Factors]) -> list[Tensor | None]:
    """What must be the same at every pass: how many samples; with labels, these and tokens.

    Of other layers, rows without a gradient are left out, and which they are changes in training.
    """
    first = layers[0]
    labels = getattr(first, "labels", None)
    offsets = None if labels is None else getattr(first, "offsets", None)
    return [torch.tensor(first.n), offsets, labels]


def _check_same(name: str, before: list[Tensor | None], now: list[Tensor | None]) -> None:
    for one, other in zip(before, now, strict=True):
        if (one is None) != (other is None):
            continue
        if one is not None and other is not None and not torch.equal(one, other):
            raise InputError(
                f"{name} gives other samples, or another order, at each pass; read it once and "
                f"pass the list of its batches"
            )
