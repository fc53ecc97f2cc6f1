"""Weights of a batch at layers, from the forward pass of the training step itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from imu_fast.ambient import checkpoints_not_reentrant, not_compiled
from imu_fast.curvature.base import Curvature
from imu_fast.curvature.named import CURVATURES, CurvatureName
from imu_fast.errors import InputError, check_choice, check_fraction, check_tensor
from imu_fast.influence.batch import WHERE_EMPTY, OnEmpty, weights_of
from imu_fast.influence.scores import ScoreOptions, influence_scores
from imu_fast.influence.weights import QUANTILE_OVER
from imu_fast.model.calls import Seen
from imu_fast.model.guard import door
from imu_fast.model.head import LinearLayer
from imu_fast.model.live import listening, live_factors
from imu_fast.model.loss import targets_of
from imu_fast.model.reading import Reading, taken
from imu_fast.model.selection import selected


class LiveWeights:
    """What :func:`live_weights` yields: called with logits and labels, it gives the weights."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        seen: Seen,
        reading: Reading,
        curvature: Curvature,
        empty: tuple[float, str, OnEmpty],
    ) -> None:
        self._model, self._layers, self._seen = model, layers, seen
        self._reading, self._curvature, self._empty = reading, curvature, empty

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weights [B], without a graph; the one behind the logits stays alive.

        Args:
            logits: of the one forward pass inside the ``with``: [B, C], or [B, T, C].
            labels: [B], or [B, T]; as the loss takes them.

        Raises:
            InputError: no forward pass, or several; shapes or labels that do not fit; sequences
                without ``shift=True`` or ``shift=False``; rows of a layer that samples share.
        """
        if not self._seen.calls and not self._seen.stopped:
            raise InputError("no layer has run: call the model inside of the with statement")
        check_tensor("logits", logits, "floating", "[B, C] or [B, T, C]")
        check_tensor("labels", labels, "real", "[B] or [B, T]")
        if not logits.requires_grad:
            raise InputError("logits have no graph; run the model with gradients enabled")
        loss = self._reading.loss
        if logits.dim() == 3 and getattr(loss, "shift", None) == "auto":
            raise InputError(
                "shift='auto': of logits alone it cannot be seen whether label t is that of "
                "position t; pass shift=True (causal language models) or shift=False"
            )
        targets = targets_of(labels, logits, loss)
        calls, self._seen.calls = self._seen.calls, []
        seen = Seen(calls, odd=self._seen.odd, stopped=self._seen.stopped)
        factors = self._factors(seen, logits, targets)
        scores = influence_scores(factors, curvature=self._curvature)
        return weights_of(scores, *self._empty)

    def _factors(self, seen: Seen, logits: Tensor, targets: Any) -> Any:
        return _factors(self._model, self._layers, (seen, logits, targets), self._reading)


@door
def _factors(model: nn.Module, layers: Sequence[LinearLayer], one: Any, reading: Reading) -> Any:
    return live_factors(model, layers, [one], reading)


@contextmanager
def live_weights(
    model: nn.Module,
    layers: Any,
    *,
    curvature: CurvatureName | Curvature = "fisher_diag",
    damping: float | None = None,
    clip_quantile: float = 0.93,
    quantile_over: str = "kept",
    on_empty: OnEmpty = "zeros",
    **options: Unpack[ScoreOptions],
) -> Iterator[LiveWeights]:
    """:func:`imu_fast.batch_weights` at layers without a forward pass of its own::

        with imu.live_weights(model, ["layers.3.self_attn.o_proj"], shift=True) as weigh:
            logits = model(**batch).logits
        weights = weigh(logits, batch["labels"])
        loss = ...  # of the same logits
        loss.backward()

    The layers are watched while the model runs, in the mode that it is in (dropout included), and
    as it was before it was compiled: compiled code calls no hooks that came after it. Then one
    backward pass goes through activations from the logits to the lowest of the layers, and the
    caller's own follows on the same graph. While a graph is new, the first few steps and every 16th
    make that pass twice, to test whose each row of a layer is.

    Args:
        layers: linear layers, by name or as modules; the head by its name costs no backward pass.
        Others as of :func:`imu_fast.batch_weights`.

    Raises:
        InputError: options or layers that there are not; see :class:`LiveWeights`.
    """
    check_choice("on_empty", on_empty, WHERE_EMPTY)
    check_fraction("clip_quantile", clip_quantile)
    check_choice("quantile_over", quantile_over, QUANTILE_OVER)
    given, own = taken(options)
    reading = Reading.of("live_weights()", given).following(model)
    if reading.output is not None:
        raise InputError("output says where a model's logits are; pass the logits themselves")
    spec = CURVATURES.choose(curvature, damping=damping, **own)
    chosen, _ = selected(model, layers)
    with checkpoints_not_reentrant(), not_compiled(), listening(chosen) as seen:
        yield LiveWeights(
            model, chosen, seen, reading, spec, (clip_quantile, quantile_over, on_empty)
        )
