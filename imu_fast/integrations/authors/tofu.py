"""Language models (TOFU): the authors' ``synthetic/IMU.py``, a trainer for open-unlearning.

The parameters are the weights of the attention projections q, k, v, o of some decoder layers: 19 to
21, as theirs, of those the ones that the model has; where it has none of them (theirs fails), the
last three. Curvature and mean gradient are those of the batch.

``compute_fisher_diag_batch`` and ``compute_influence_for_batch`` take the labels as theirs do: the
one at t belongs to the logits at t. The trainer gets a causal model's labels and shifts them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, check_fraction
from imu_fast.integrations._forgetting import check_own_loss, present
from imu_fast.integrations.authors._gradients import Gradients
from imu_fast.integrations.authors._parameters import Chosen, asking, l1_norm, named
from imu_fast.integrations.authors.classification import flatten_grad as flatten_grad
from imu_fast.integrations.authors.markov import calc_loss as calc_loss
from imu_fast.integrations.authors.markov import check_device, mean_losses
from imu_fast.losses.cross_entropy import IGNORE_INDEX
from imu_fast.model.forward import forward_of
from imu_fast.model.parts import Parts

logger = logging.getLogger("imu_fast")

AUTHORS_LAYERS = (19, 20, 21)
_PROJECTION = re.compile(r"layers\.(\d+)\..*self_attn\.[kqvo]_proj\.weight")
_RULE = "'layers.I' and 'self_attn.{q,k,v,o}_proj.weight'"


def _layer_of(name: str) -> int | None:
    found = _PROJECTION.search(name)
    return int(found[1]) if found else None


def _wanted(model: nn.Module, layers: Sequence[int] | None) -> Callable[[str], bool]:
    has = sorted({k for name, _ in model.named_parameters() if (k := _layer_of(name)) is not None})
    if layers is None:
        there = [k for k in AUTHORS_LAYERS if k in has] or has[-3:]
    else:
        there = list(layers)
        if missing := [k for k in there if k not in has]:
            raise InputError(
                f"layers={list(layers)}: the model has no layer {missing}; it has {has}"
            )
    return lambda name: _layer_of(name) in there


def get_last_params(model: nn.Module, layers: Sequence[int] | None = None) -> list[nn.Parameter]:
    """The weights of the attention projections of these layers, see the module."""
    return list(named(model, _wanted(model, layers), _RULE).values())


def l1_regularization(model: nn.Module, layers: Sequence[int] | None = None) -> Tensor:
    """Their L1 norm: a scalar with its graph (theirs has none, so it changes nothing)."""
    return l1_norm(get_last_params(model, layers))


def _gradients(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    state_size: int,
    layers: Sequence[int] | None,
    shift: bool,
    attention_mask: Tensor | None,
) -> Gradients:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and len(head.weight) != state_size:
        raise InputError(f"state_size={state_size}, and the model has {len(head.weight)} outputs")
    valid = t != IGNORE_INDEX
    if not shift and bool(valid.any()) and torch.equal(t[valid], x[valid]):
        _warn_unshifted()
    inputs = {"input_ids": x}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    chosen = Chosen.of(model, _wanted(model, layers), _RULE)
    return Gradients(model, chosen, [Parts([], inputs, t)], shift=shift)


@cache
def _warn_unshifted() -> None:
    logger.warning(
        "the labels are the inputs of the same positions, as a causal model shifts them itself; "
        "the authors' functions do not: pass shift=True to score what the model predicts"
    )


def compute_fisher_diag_batch(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    state_size: int,
    *,
    layers: Sequence[int] | None = None,
    shift: bool = False,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """``1 / (mean_i g_i^2 + 0.01)`` over the batch: [P].

    Args:
        x: ids [B, T]. t: labels [B, T], -100 where there is none. state_size: the vocabulary's.
        layers: indices of decoder layers; None: see the module.
        shift: logits at position t predict the label at t + 1.
        attention_mask: [B, T]; theirs passes none, which padding on the left needs.
    """
    found = _gradients(model, x, t, state_size, layers, shift, attention_mask)
    return found.inverse_fisher("add")


def compute_influence_for_batch(
    model: nn.Module,
    x: Tensor,
    t: Tensor,
    state_size: int,
    device: Any,
    clamp_quantile: float | None = 0.93,
    *,
    layers: Sequence[int] | None = None,
    shift: bool = False,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Weights ``|influence| ** 0.5`` of a batch: [B], zero where the influence is not negative.

    Args:
        device: of the result. clamp_quantile: they are clipped at this quantile of all B weights,
            the zeros included; None, or a batch of one: not at all.
        Others as of :func:`compute_fisher_diag_batch`.
    """
    found = _gradients(model, x, t, state_size, layers, shift, attention_mask)
    influence = found.own_influence("add")
    weights = influence.clamp(max=0).abs().float().sqrt()
    if clamp_quantile is not None and len(weights) > 1:
        check_fraction("clamp_quantile", clamp_quantile)
        weights = weights.clamp(max=torch.quantile(weights, clamp_quantile))
    return weights.to(device)


def imu_trainer(base: type) -> type:
    """The authors' trainer over an ``UnlearnTrainer``: a class with the name ``IMU``.

    Its constructor takes, besides those of ``base``: ``state_size`` (None: the model's vocabulary),
    ``device`` (None: the model's), ``alpha`` (0.02) of the L1 norm, ``layers``, and what brings
    theirs back: ``shift_labels=False``, which predicts each token from itself, and
    ``l1_gradient=False``, whose L1 norm changes the loss and no parameter.

    Only the chosen parameters get gradients, as their hook means to do (it raises NameError).
    """

    class IMU(base):
        """Influence-weighted ascent on ``inputs["forget"]``."""

        def __init__(
            self,
            *args: Any,
            state_size: int | None = None,
            device: Any = None,
            alpha: float = 0.02,
            layers: Sequence[int] | None = None,
            shift_labels: bool = True,
            l1_gradient: bool = True,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **present(kwargs))
            if "tokenizer" in kwargs:
                self.tokenizer = kwargs["tokenizer"]
            check_own_loss(self)
            # The loss is a mean over the batch's samples, whatever the number of its tokens.
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False
            if state_size is None and hasattr(self.model, "config"):
                state_size = self.model.config.vocab_size
            self.state_size, self.device = state_size, device
            self.alpha, self.layers = alpha, layers
            self.shift_labels, self.l1_gradient = shift_labels, l1_gradient

        def train(self, *args: Any, **kwargs: Any) -> Any:
            """As of the base; the parameters that are not chosen are frozen meanwhile."""
            with asking(self.model, get_last_params(self.model, self.layers)):
                return super().train(*args, **kwargs)

        def compute_loss(
            self,
            model: nn.Module,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            """``- sum_i w_i l_i / sum_i w_i + alpha ||theta||_1``, and the model's output."""
            batch = inputs["forget"]
            taken = set(batch) & set(forward_of(model).names) - set(_INPUTS)
            if unread := [name for name in sorted(taken) if batch[name] is not None]:
                raise InputError(
                    f"the forget batch has {unread[0]!r}, which the model takes and this trainer "
                    f"does not pass on: it reads {', '.join(_INPUTS)}; leave it out, or use the "
                    "trainer of imu_fast.integrations.open_unlearning"
                )
            given = {k: batch[k] for k in _INPUTS if k in batch}
            if self.device is not None:
                check_device(model, self.device)
            device = next(model.parameters()).device
            given = {key: value.to(device) for key, value in given.items()}
            labels = given.pop("labels")
            chosen = get_last_params(model, self.layers)
            weights = compute_influence_for_batch(
                model,
                given["input_ids"],
                labels,
                self.state_size,  # type: ignore[arg-type]
                device,
                layers=self.layers,
                shift=self.shift_labels,
                attention_mask=given.get("attention_mask"),
            )
            with asking(model, chosen):
                outputs = model(**given)
                logits = outputs.logits
                if self.shift_labels:
                    logits, labels = logits[:, :-1], labels[:, 1:]
                wide = torch.promote_types(logits.dtype, torch.float32)
                losses = mean_losses(logits.to(wide), labels)
                weights = weights.to(losses)
                loss = -torch.dot(weights, losses) / (weights.sum() + 1e-8)
                penalty = self.alpha * l1_norm(chosen)
                loss = loss + (penalty if self.l1_gradient else penalty.detach())
            return (loss, outputs) if return_outputs else loss

    IMU.__qualname__ = "IMU"
    return IMU


_INPUTS = ("input_ids", "attention_mask", "labels")


@cache
def _trainer() -> type:
    try:
        from trainer.unlearn.base import UnlearnTrainer
    except ImportError as error:
        raise ImportError(
            "imu_fast.integrations.authors.tofu.IMU is a trainer of open-unlearning, whose 'src' "
            "folder has to be on the path; for another base class: imu_trainer(base)"
        ) from error
    return imu_trainer(UnlearnTrainer)


def __getattr__(name: str) -> Any:
    if name != "IMU":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _trainer()
