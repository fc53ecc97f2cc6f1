"""Whether a position's label is its own or the next one's, asked of the model itself.

A causal language model shifts labels inside of its loss: position t is to predict label t + 1.
The model's own loss says so: given a single label, of a class that tells two neighbouring positions
apart, it is the loss of one of them. A model without a loss of its own is causal where an input
changes nothing before it; where its labels are its inputs, they are those of the next position.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import brief
from imu_fast.losses.auto import AutoLoss
from imu_fast.losses.cross_entropy import IGNORE_INDEX, CrossEntropy
from imu_fast.model.forward import Forward, forward_of, innermost
from imu_fast.model.labels import class_labels
from imu_fast.model.logits import chosen, tensors_of
from imu_fast.model.loss import sample_losses, targets_of
from imu_fast.model.nested import leaves
from imu_fast.model.parts import Parts
from imu_fast.model.reading import Reading
from imu_fast.model.run import evaluated, read
from imu_fast.model.search import locate

logger = logging.getLogger("imu_fast")

# Samples that the model's own loss is compared on; logits, and rows of them, that it may take.
_COMPARED, _ELEMENTS, _FEWEST = 4, 1 << 22, 8
# How much nearer than the distance of the two possible losses the model's own must be to one.
_NEAR = 0.25
_WAY_OUT = "shift=True or shift=False says it"

Run = Callable[[Any], Any]

_decisions: ContextVar[set[bool] | None] = ContextVar("decisions", default=None)


def settled(
    reading: Reading, model: nn.Module, run: Run, batch: Any, logits: Tensor, choice: Any
) -> Reading:
    """The reading with ``shift="auto"`` decided, once a batch shows it; and said through the log.

    Args:
        run: runs a batch in evaluation mode. batch: with its labels, on the model's device.
        logits: of the batch. choice: where they are in what the model returns.

    Raises:
        InputError: the labels' shape does not fit.
    """
    loss = reading.loss
    if not isinstance(loss, CrossEntropy | AutoLoss) or loss.shift != "auto":
        return reading
    whole = Parts(*batch)
    classes = not whole.labels.is_floating_point()  # else not of classes, or soft
    if classes:
        whole = whole._replace(labels=class_labels(whole.labels, logits.shape))
    own = _Own(whole, model, run, choice, loss, logits.shape[-1])
    shift = own.shift() if classes else own.unshifted()
    if shift is None:
        return reading
    if (seen := _decisions.get()) is not None:
        seen.add(shift)
    return replace(reading, loss=replace(loss, shift=shift))


@contextmanager
def decisions() -> Iterator[set[bool]]:
    """What :func:`settled` decides on inside, to be compared with other processes'."""
    found: set[bool] = set()
    token = _decisions.set(found)
    try:
        yield found
    finally:
        _decisions.reset(token)


def settled_on(reading: Reading, model: nn.Module, loader: Any) -> Reading:
    """:func:`settled` by the first batches of a loader that show it."""
    with evaluated(model) as run:
        for batch in read(model, loader, progress=False):
            if batch[2].dim() < 2 and forward_of(model).labels is None:
                return reading  # nothing to be asked
            output = run(batch)
            choice = locate(model, run, batch, output, reading.output)
            reading = settled(reading, model, run, batch, chosen(output, choice), choice)
            if getattr(reading.loss, "shift", None) != "auto":
                break
    return reading


class _Own:
    """What a model's own loss, on a part of a batch, says."""

    def __init__(
        self,
        batch: Parts,
        model: nn.Module,
        run: Run,
        choice: Any,
        loss: CrossEntropy | AutoLoss,
        classes: int,
    ) -> None:
        self.model, self.run, self.choice, self.loss = model, run, choice, loss
        self.batch, self.forward = batch, forward_of(model)
        self.rows = max(_FEWEST, _ELEMENTS // classes)

    def shift(self) -> bool | None:
        """True, False, or None: this batch does not show it."""
        labels = self.batch.labels
        if labels.dim() != 2 or labels.shape[1] < 2:
            return self._of_one_token() if labels.dim() == 2 else self.unshifted()
        with torch.no_grad():
            part = self._part(1)
            logits = chosen(self.run(part), self.choice)
            own = self._by_its_loss(part, logits)
            known = declared_causal(self.model) or None if own is None else own
            shift = self._by_its_inputs(part, logits, known)
            # Labels that are shifted already are still those that its own loss would shift.
            compared = shift if own is None else own
            if compared is not None:
                self._compare(compared)
        return shift

    def _of_one_token(self) -> bool | None:
        """A loss that shifts is of none of these labels, which would be those of their positions.

        None: not shown, by a batch without any label; what comes next may have more tokens.
        """
        if not declared_causal(self.model):
            return self.unshifted()
        labels = self.batch.labels
        if not bool((labels != self.loss.ignore_index).any()):
            return None
        with torch.no_grad():
            part = self._part(1)
            output = self._with_labels(part, part.labels)
            own = _loss_in(output)
            if own is None:  # NaN, the mean of none
                return True
            logits = chosen(output, self.choice)
            targets = targets_of(part.labels, logits, replace(self.loss, shift=False))
            here = float(sample_losses(logits, targets).losses.sum())
        return abs(own - here) > _NEAR * here

    def unshifted(self) -> bool:
        """Of labels that no position before them predicts."""
        self._compare(False)
        return False

    def _part(self, most: int) -> Parts:
        """A few samples of the batch, those with labels first."""
        labels = self.batch.labels
        has = (labels != self.loss.ignore_index).reshape(len(labels), -1).any(dim=1).cpu()
        rows = torch.argsort(~has, stable=True)[:most].tolist()
        try:
            part = self.batch.taken(rows)
        except Exception as error:  # inputs of other libraries
            logger.info("a batch cannot be cut (%s)", brief(error, 100))
            return self.batch
        if labels.dim() != 2 or labels.shape[1] * most <= self.rows:
            return part
        # As many positions as logits may be kept of, from just before the first label.
        positions = max(2, self.rows // most)
        valid = torch.nonzero((part.labels != self.loss.ignore_index).any(dim=0)).flatten()
        start = max(0, int(valid[0]) - 1) if len(valid) else 0
        small = part.window(min(start, labels.shape[1] - positions), positions)
        try:
            with torch.no_grad():
                chosen(self.run(small), self.choice)
        except Exception as error:  # a model of one length
            logger.info("a batch's sequences cannot be cut (%s)", brief(error, 100))
            return part
        return small

    def _with_labels(self, part: Parts, labels: Tensor) -> Any:
        """What the model returns with these labels; None: it takes none, or refuses them."""
        labels = labels.masked_fill(labels == self.loss.ignore_index, IGNORE_INDEX)
        args, kwargs = list(part.args), dict(part.kwargs)
        if self.forward.labels is None:
            return None
        if (place := self.forward.place_of_labels) < len(args):
            args[place] = labels
        else:
            kwargs[self.forward.labels] = labels
        with _config_kept(self.model):
            try:
                return self.run((args, kwargs, labels))
            except Exception as error:  # whatever the user's model raises
                logger.info("the model takes no labels (%s)", brief(error, 100))
                return None

    def _by_its_loss(self, part: Parts, logits: Tensor) -> bool | None:
        """By a single label at a position t: is it the loss of t, or of t - 1?"""
        log_p = torch.log_softmax(logits[0].float(), dim=1)
        if not bool(torch.isfinite(log_p).any(dim=1).all()):
            return None
        gap = (log_p[:-1] - log_p[1:]).nan_to_num(0.0, 0.0, 0.0).abs()
        # Not where padding is: its logits may be anything.
        seen = part.labels[0] != self.loss.ignore_index
        inside = seen[1:] & seen[:-1] if bool((seen[1:] & seen[:-1]).any()) else seen[1:] | True
        place = int(gap.amax(dim=1).masked_fill(~inside.to(gap.device), -1.0).argmax())
        label = int(gap[place].argmax())
        only = torch.full_like(part.labels, IGNORE_INDEX)
        only[0, place + 1] = label
        output = self._with_labels(part, only)
        own = _loss_in(output)
        if own is None:
            return None
        found = chosen(output, self.choice)
        if found.shape != logits.shape:
            return None
        log_p = torch.log_softmax(found[0].float(), dim=1)[place : place + 2, label].double()
        value = own - sum(value for _, value in _auxiliary(output, self.model))
        before, here = (abs(value + float(x)) for x in log_p)
        near, distance = min(before, here), abs(float(log_p[0] - log_p[1]))
        return before < here if near < _NEAR * distance else None

    def _by_its_inputs(self, part: Parts, logits: Tensor, shift: bool | None) -> bool | None:
        """The last word have the labels: they may be shifted already, or be the inputs."""
        tokens, labels = _tokens(self.batch, self.forward), self.batch.labels
        if tokens is None:
            return bool(shift)
        valid = labels != self.loss.ignore_index
        if not bool(valid.any()):
            return shift
        own = bool((labels == tokens)[valid].all())
        ahead = valid[:, :-1]
        following = bool(ahead.any()) and bool((labels[:, :-1] == tokens[:, 1:])[ahead].all())
        if shift and following and not own:
            logger.warning(
                "labels are those of the next position already (label t is input t + 1): not "
                "shifted, although the model's own loss would shift them again; %s",
                _WAY_OUT,
            )
            return False
        if shift:
            logger.info("the model predicts the next token: label t + 1 at position t (shift=True)")
        elif shift is None and own and self._is_causal(part, logits):
            logger.warning(
                "the model sees no input after a position, and labels are its inputs: taken for "
                "a causal language model, label t + 1 at position t; %s",
                _WAY_OUT,
            )
            return True
        elif shift is None:
            logger.info("labels are taken for those of their own positions; %s", _WAY_OUT)
        return bool(shift)

    def _is_causal(self, part: Parts, logits: Tensor) -> bool:
        """Whether another last input leaves the logits before it as they were."""
        tokens = _tokens(part, self.forward)
        if tokens is None:
            return False
        changed = tokens.clone()
        last = changed[:, -1]
        changed[:, -1] = torch.where(last > 0, last - 1, last + 1)

        def swap(value: Any) -> Any:
            return changed if value is tokens else value

        moved = Parts([*part.args], dict(part.kwargs), part.labels).mapped(swap)
        try:
            found = chosen(self.run(moved._replace(labels=part.labels)), self.choice)
        except Exception:  # a token that the model does not take
            return False
        size = logits.float().abs().amax()
        off = (found - logits).float().abs()
        return bool((off[:, :-1] <= 1e-4 * size).all())

    @torch.no_grad()
    def _compare(self, shift: bool) -> None:
        """Say where the model's own loss is not ours."""
        if self.forward.labels is None or not len(self.batch.labels):
            return
        part = self._part(min(_COMPARED, self.rows))
        output = self._with_labels(part, part.labels)
        own = _loss_in(output)
        if own is None:
            return
        logits = chosen(output, self.choice)
        targets = targets_of(part.labels, logits, replace(self.loss, shift=shift))
        counts = targets.counts.double()
        if not float(counts.sum()):
            return
        losses = sample_losses(logits, targets).losses.double().cpu()
        ours = float((counts * losses).sum() / counts.sum())
        others = _auxiliary(output, self.model)
        less = own - sum(value for _, value in others)
        allowed = 16 * max(torch.finfo(logits.dtype).eps, 2.0**-23) * (1 + abs(ours))
        if abs(less - ours) > allowed:
            logger.warning(
                "the model's own loss on the first samples is %.6g, theirs by %r %.6g: it has "
                "terms or weights that are not in this loss%s",
                own,
                replace(self.loss, shift=shift),
                ours,
                self._way_out(part),
            )
        elif others:
            logger.warning(
                "the model's own loss has terms that belong to no sample, which are left out: %s",
                ", ".join(f"{name} ({value:.4g})" for name, value in others),
            )

    def _way_out(self, part: Parts) -> str:
        """Of labels that are no class numbers, a transformers model chooses its loss by them."""
        config = getattr(innermost(self.model), "config", None)
        numbers = part.labels is not None and part.labels.is_floating_point()
        followed = numbers and hasattr(config, "problem_type")
        return "; loss='auto' takes the model's own kind of loss" if followed else ""


@contextmanager
def _config_kept(model: nn.Module) -> Iterator[None]:
    """A transformers model that is given labels writes its ``problem_type`` down."""
    config = getattr(innermost(model), "config", None)
    there = hasattr(config, "problem_type")
    before = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        if there and config is not None and config.problem_type != before:
            config.problem_type = before


def _loss_in(output: Any) -> float | None:
    """The model's own loss: what is called so, or the only number in its output."""
    found = tensors_of(output)
    named = [t for path, t in found.items() if path == ("loss",)]
    single = named or [t for t in found.values() if t.dim() == 0]
    if len(single) != 1 or single[0].numel() != 1:
        return None
    value = float(single[0])
    return value if value == value else None


def _auxiliary(output: Any, model: nn.Module) -> list[tuple[str, float]]:
    """Terms of a model's loss that it names, such as that which balances experts, as they count."""
    config = getattr(innermost(model), "config", None)
    weight = getattr(config, "router_aux_loss_coef", None)
    found = getattr(output, "aux_loss", None)
    if isinstance(weight, float) and isinstance(found, Tensor) and found.numel() == 1:
        return [("aux_loss", weight * float(found))]
    return []


def _tokens(part: Parts, forward: Forward) -> Tensor | None:
    """The integer input that the labels are beside, if there is one."""
    named = part.kwargs.get("decoder_input_ids", part.kwargs.get("input_ids"))
    args = [a for place, a in enumerate(part.args) if place != forward.place_of_labels]
    for value in [named] if named is not None else leaves(args):
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        if whole and value.shape == part.labels.shape:
            return value
    return None


def declared_causal(model: nn.Module) -> bool:
    """Whether transformers has this class, or one it inherits from, among its causal models."""
    models = sys.modules.get("transformers.models.auto.modeling_auto")
    names = set(getattr(models, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {}).values())
    inner = innermost(model)
    unwrapped = getattr(inner, "get_base_model", None)
    base = unwrapped() if callable(unwrapped) else inner
    return any(kind.__name__ in names for kind in type(base).__mro__)
