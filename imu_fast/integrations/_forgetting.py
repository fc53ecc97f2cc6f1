"""What a trainer that forgets minimises, and the mix-in that makes a transformers.Trainer do so."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, softplus

from imu_fast.curvature.base import Curvature
from imu_fast.curvature.named import CURVATURES, CurvatureName
from imu_fast.errors import InputError, check_fraction, check_installed, check_positive, one_of
from imu_fast.influence.batch import batch_weights
from imu_fast.influence.weights import QUANTILE_OVER
from imu_fast.losses.cross_entropy import IGNORE_INDEX, CrossEntropy
from imu_fast.model.batches import Parts, split_batch
from imu_fast.model.called import called
from imu_fast.model.causal import declared_causal, settled_on
from imu_fast.model.forward import forward_of, innermost
from imu_fast.model.labels import class_labels
from imu_fast.model.logits import logits_of, tensors_of
from imu_fast.model.reading import Reading
from imu_fast.model.selection import selected
from imu_fast.ops.objective import LABEL_OBJECTIVES, NPO_BETA, objective
from imu_fast.ops.tokens import sum_over_tokens
from imu_fast.options import Choice, Options, option, options

logger = logging.getLogger("imu_fast")

OBJECTIVES = (*LABEL_OBJECTIVES, "npo", "simnpo")
# Fan et al. 2024.
SIMNPO_BETA = 2.5


def _check_not_negative(name: str, value: Any) -> None:
    check_positive(name, value, allow_zero=True)


def _check_beta(name: str, value: Any) -> None:
    if value is not None:
        check_positive(name, value)


def _check_shift(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name}={value!r} must be True, False, or None (as the model does)")


@options
class Forgetting(Options):
    """``gamma F + alpha R + l1 ||theta||_1`` of a batch, R the retain samples' loss if it has any.

    ``F = - sum_i w_i f_i / sum_i w_i``, and w the influence's roots, see ``imu.batch_weights``.

    Attributes:
        gamma, alpha, l1: weights of the three terms; theta is what is trained.
        objective: f, what ascends: of each token's cross-entropy the mean (``"ce"``; ``"log1mp"``
            and ``"margin"`` likewise), or of the sequence's ``"npo"``, ``"simnpo"``.
        beta: of the last two; None: 0.1 and 2.5.
        layers: whose influence: ``"head"``, or names of linear layers and patterns such as
            ``"*.self_attn.*_proj"``.
        trained: ``"all"`` that is not frozen, or the ``"layers"`` alone.
        curvature: and its options, such as ``damping``.
        clip_quantile, quantile_over: as of ``imu.batch_weights``.
        retain_loss_type: ``"NLL"``: the model's own loss; ``"KL"``: the mean divergence of its
            predictions from those of the model as it was, at positions with a label.
        shift_labels: logits at t predict the label at t + 1; None: where the model's own loss of
            the first batch says so.
    """

    name = "forgetting"
    gamma: float = option(default=1.0, check=_check_not_negative)
    alpha: float = option(default=1.0, check=_check_not_negative)
    l1: float = option(default=0.0, check=_check_not_negative)
    objective: Literal["ce", "log1mp", "margin", "npo", "simnpo"] = option(
        default="ce", check=one_of(*OBJECTIVES)
    )
    beta: float | None = option(default=None, check=_check_beta)
    layers: Any = option(default="head")
    trained: Literal["all", "layers"] = option(default="all", check=one_of("all", "layers"))
    curvature: Choice[Curvature, CurvatureName] = Choice(CURVATURES, "fisher_diag")
    clip_quantile: float = option(default=0.93, check=check_fraction)
    quantile_over: Literal["kept", "all"] = option(default="kept", check=one_of(*QUANTILE_OVER))
    retain_loss_type: Literal["NLL", "KL"] = option(default="NLL", check=one_of("NLL", "KL"))
    shift_labels: bool | None = option(default=None, check=_check_shift)

    def check(self) -> None:
        if self.beta is not None and self.objective not in ("npo", "simnpo"):
            raise InputError(f"beta={self.beta} is of 'npo' and 'simnpo'; leave it out")
        if self.trained == "layers" and self.layers == "head":
            raise InputError(
                "trained='layers' with layers='head': name the layers, such as layers=['lm_head']"
            )

    @classmethod
    def known(cls) -> set[str]:
        """Every flat option, of every curvature."""
        inner = {name for curvature in CURVATURES for name in CURVATURES[curvature].paths()}
        return set(cls().paths()) | inner

    @property
    def needs_original(self) -> bool:
        """Whether it compares with the model as it was."""
        return self.objective == "npo" or self.retain_loss_type == "KL"

    def of(self, model: nn.Module) -> str | list[nn.Module]:
        """The layers whose influence counts.

        Raises:
            InputError: a name or pattern that no linear layer has.
        """
        if self.layers == "head":
            return "head"
        return [layer.module for layer in selected(innermost(model), self.layers)[0]]


def present(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a Trainer under the names that the transformers here has for them."""
    check_installed("a Trainer", "transformers", install="transformers")
    from transformers import Trainer

    names = inspect.signature(Trainer.__init__).parameters
    if "tokenizer" in arguments and "tokenizer" not in names:
        arguments = dict(arguments)
        arguments["processing_class"] = arguments.pop("tokenizer")
    return arguments


def check_own_loss(trainer: Any) -> None:
    """For a trainer with a loss of its own.

    Raises:
        InputError: it was given what only a Trainer's loss, which it replaces, would use.
    """
    if smoothing := getattr(trainer.args, "label_smoothing_factor", 0):
        raise InputError(
            f"label_smoothing_factor={smoothing} is of the loss that a Trainer minimises; what is "
            "forgotten and kept here are the labels themselves: leave it 0"
        )
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise InputError(
            "compute_loss_func is a loss in the place of the one that forgets, which would not be "
            "used: leave it out"
        )


def predicts_next(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether the model's own loss of a batch with labels is that of the next token.

    Where the batch does not show it: whether transformers counts the model among the causal ones.
    """
    loss = settled_on(Reading(), model, [batch]).loss
    assert isinstance(loss, CrossEntropy)
    return declared_causal(model) if loss.shift == "auto" else bool(loss.shift)


def as_inputs(value: Any) -> dict[str, Any]:
    """A batch of one set as keywords: a dict, or TOFU's ``(input_ids, labels, attention_mask)``."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple) and len(value) == 3:
        return dict(zip(("input_ids", "labels", "attention_mask"), value, strict=True))
    raise InputError(
        f"a batch is a {type(value).__name__}; pass a dict, or (input_ids, labels, attention_mask)"
    )


def sets_of(inputs: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Forget and retain batch of ``{"forget":, "retain":}``, ``(forget, retain)``, or one alone."""
    if isinstance(inputs, list | tuple) and len(inputs) == 2:
        return as_inputs(inputs[0]), None if inputs[1] is None else as_inputs(inputs[1])
    if isinstance(inputs, Mapping) and "forget" in inputs:
        retain = inputs.get("retain")
        return as_inputs(inputs["forget"]), None if retain is None else as_inputs(retain)
    return as_inputs(inputs), None


def accepted(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model's forward takes, and the labels; data sets add indices, say."""
    forward = forward_of(model)
    taken = {"labels", *forward.names}
    return {k: v for k, v in batch.items() if forward.any_keyword or k in taken}


def has_label(labels: Tensor, shift: bool) -> bool:
    """Whether any position of a batch has a label that is predicted."""
    shifted = labels[:, 1:] if shift and labels.dim() == 2 else labels
    return bool((shifted != IGNORE_INDEX).any())


def labelled(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, C] with a label in at least float32, these labels, and how many each sample has.

    Raises:
        InputError: labels that are no class indices, or are not one for each row of the logits.
    """
    labels = class_labels(labels, logits.shape)
    if shift and labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    valid = labels != IGNORE_INDEX
    rows = logits[valid].to(torch.promote_types(logits.dtype, torch.float32))
    return rows, labels[valid], valid.reshape(len(labels), -1).sum(dim=1)


def means(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of each sample's tokens: [n]; zero where there is none."""
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cpu()
    return sum_over_tokens(values, ends) / counts.clamp_min(1)


def own_loss(outputs: Any) -> Tensor:
    """The loss that a model returns beside its logits; raises InputError where it has none."""
    found = tensors_of(outputs)
    single = (
        [found[("loss",)]] if ("loss",) in found else [t for t in found.values() if not t.dim()]
    )
    if len(single) != 1:
        raise InputError(
            "retain_loss_type='NLL' is the model's own loss, and it returns none for these labels; "
            "use retain_loss_type='KL', or a model whose forward takes labels"
        )
    return single[0]


class UnlearningMixin:
    """Before ``transformers.Trainer`` among a class's bases: its training forgets.

    Batches hold a forget and maybe a retain set: ``{"forget": {...}, "retain": {...}}``, tuples of
    the two, or the forget samples alone. Options of :class:`Forgetting` are keywords of the
    constructor. The weights of a batch come from the model in evaluation mode, as it stands at that
    step. Evaluation is the Trainer's own, on ordinary batches.

    Attributes:
        forgetting: the options. weights: of the last batch, [B].
    """

    model: Any
    args: Any
    accelerator: Any
    loss_is_scaled_for_ga: bool | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = {k: kwargs.pop(k) for k in list(kwargs) if k in Forgetting.known()}
        if "layers" in own and not isinstance(own["layers"], str):
            own["layers"] = list(own["layers"])  # a list of OmegaConf's is none
        self.forgetting = Forgetting().with_options(type(self).__name__, own)
        super().__init__(*args, **present(kwargs))
        if "tokenizer" in kwargs:
            self.tokenizer = kwargs["tokenizer"]
        # The loss is a mean over the batch's samples, whatever the number of its tokens.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.weights: Tensor | None = None
        check_own_loss(self)
        if getattr(self, "model_init", None) is not None and self.forgetting.layers != "head":
            raise InputError(
                f"model_init makes another model when training begins, and layers="
                f"{self.forgetting.layers!r} are of this one; pass model="
            )
        self._layers = self.forgetting.of(self.model)
        self._shift = self.forgetting.shift_labels
        self._original = self._kept() if self.forgetting.needs_original else None

    def _kept(self) -> Any:
        """A copy of the model as it is."""
        original = copy.deepcopy(self.model).to(self.accelerator.device).eval()
        original.requires_grad_(False)
        if getattr(self, "is_deepspeed_enabled", False) and hasattr(self, "_prepare_deepspeed"):
            return self._prepare_deepspeed(original)
        return self.accelerator.prepare_model(original, evaluation_mode=True)

    def _trained(self) -> list[nn.Parameter]:
        if self.forgetting.trained == "all":
            return [p for p in self.model.parameters() if p.requires_grad]
        assert not isinstance(self._layers, str)
        found = {id(p): p for layer in self._layers for p in layer.parameters()}
        return list(found.values())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer; with ``trained="layers"`` everything else is frozen meanwhile."""
        if self.forgetting.trained == "all":
            return super().train(*args, **kwargs)  # type: ignore[misc]
        own = {id(p) for p in self._trained()}
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            for p, _ in flags:
                p.requires_grad_(id(p) in own)
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a training batch, and the model's output on the forget set.

        Raises:
            InputError: a batch without labels, or of another form.
        """
        plain = isinstance(inputs, Mapping) and "forget" not in inputs
        if plain and not model.training:
            # Trainers of before it take no number of items, and give none.
            more = () if num_items_in_batch is None else (num_items_in_batch,)
            return super().compute_loss(model, inputs, return_outputs, *more)  # type: ignore[misc]
        how = self.forgetting
        forget, retain = sets_of(inputs)
        loss, outputs = self._forget_loss(model, accepted(model, forget))
        loss = how.gamma * loss
        if retain is not None and how.alpha:
            loss = loss + how.alpha * self._retain_loss(model, accepted(model, retain))
        if how.l1:
            norms = [p.abs().sum() for p in self._trained()]
            loss = loss + how.l1 * torch.stack(norms).sum().to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def _rows(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return labelled(logits, labels, bool(self._shift))

    def _any_label(self, model: nn.Module, labels: Tensor, batch: dict[str, Any]) -> bool:
        """Whether the batch has a label that is predicted; asks once which position predicts it."""
        if not has_label(labels, shift=False):
            return False  # nor anything to ask by
        if self._shift is None:
            self._shift = predicts_next(model, batch)
        return has_label(labels, self._shift)

    def _weigh(self, model: nn.Module, batch: dict[str, Any], parts: Parts) -> Tensor:
        """The weights [B] of a batch; zero where no sample of it has a label."""
        how, labels = self.forgetting, batch["labels"]
        if not self._any_label(model, labels, batch):
            logger.warning("no sample of a forget batch has a label: nothing of it is forgotten")
            return torch.zeros(len(labels), device=labels.device)
        return batch_weights(
            model,
            parts,
            layers=self._layers,
            curvature=how.curvature,
            clip_quantile=how.clip_quantile,
            quantile_over=how.quantile_over,
            shift=bool(self._shift),
        )

    def _forget_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        how = self.forgetting
        if "labels" not in batch:
            raise InputError(f"the forget batch has {list(batch)} and no labels")
        # Labels are among the inputs where logits are made of them; else no loss is needed.
        parts = split_batch(batch, model)
        self.weights = self._weigh(model, batch, parts)
        outputs = called(model, *parts, run=model)  # a wrapper too, whose backward needs it
        z, y, counts = self._rows(logits_of(outputs, batch["labels"]), batch["labels"])
        token = how.objective if how.objective in LABEL_OBJECTIVES else "ce"
        f = means(objective(z, y, token), counts)
        if how.objective == "simnpo":
            beta = how.beta or SIMNPO_BETA
            f = -2 / beta * softplus(-beta * f)
        elif how.objective == "npo":
            beta, assumed = how.beta or NPO_BETA, self._original
            assert assumed is not None
            with torch.no_grad():
                was = logits_of(called(assumed, *parts), batch["labels"])
                zo, yo, _ = self._rows(was, batch["labels"])
                before = means(objective(zo, yo, "ce"), counts) * counts
            f = -2 / beta * softplus(beta * (before - f * counts))
        weights = self.weights.to(f)
        smallest = torch.finfo(f.dtype).tiny
        return -(weights * f).sum() / weights.sum().clamp_min(smallest), outputs

    def _retain_loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The mean over what has a label; zero, with a graph, where nothing has one."""
        labels = batch.get("labels")
        if labels is None:
            raise InputError(f"the retain batch has {list(batch)} and no labels")
        known, parts = self._any_label(model, labels, batch), split_batch(batch, model)
        if known and self.forgetting.retain_loss_type == "NLL":
            name = forward_of(model).labels
            given = parts.kwargs if name is None else parts.kwargs | {name: labels}
            return own_loss(called(model, parts.args, given, labels, model))
        logits = logits_of(called(model, *parts, run=model), labels)
        if not known:
            logger.warning("no sample of a retain batch has a label: nothing of it is kept")
            return self._rows(logits, labels)[0].sum()
        assert self._original is not None
        with torch.no_grad():
            was, _, _ = self._rows(logits_of(called(self._original, *parts), labels), labels)
        z, _, counts = self._rows(logits, labels)
        apart = kl_div(z.log_softmax(1), was.log_softmax(1), reduction="none", log_target=True)
        return means(apart.sum(dim=1), counts).sum() / (counts > 0).sum()
