"""The mean squared gradient of every parameter: the diagonal of the empirical Fisher."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from typing_extensions import Unpack

from imu_fast.errors import InputError, brief, check_finite_rows
from imu_fast.importance.batch import Layouts, Ledger, made_dtype
from imu_fast.importance.recorder import Recorder
from imu_fast.importance.rules import RULES
from imu_fast.model.batches import empty_message
from imu_fast.model.called import from_sample
from imu_fast.model.causal import settled
from imu_fast.model.guard import copies_of, door, put_back
from imu_fast.model.independence import SampleChecks, apart, coarsest_of
from imu_fast.model.logits import chosen
from imu_fast.model.loss import Targets, check_labelled, on_logits, sample_losses, targets_of
from imu_fast.model.parts import Parts
from imu_fast.model.reading import Reading, ReadingOptions
from imu_fast.model.rows import LayoutChanged
from imu_fast.model.run import Batch, evaluated, read
from imu_fast.model.search import Run, locate

logger = logging.getLogger("imu_fast")


class _Importance:
    """Sums of squares, batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        reading: Reading,
        always: bool,
    ) -> None:
        self.model, self.output, self.reading = model, reading.output, reading
        self.parameters = {id(p): p for p in parameters.values()}
        self.names = {id(p): name for name, p in parameters.items()}
        self.totals: dict[int, Tensor] = {
            key: torch.zeros_like(p, dtype=made_dtype(p), requires_grad=False).contiguous()
            for key, p in self.parameters.items()
        }
        self.layouts, self.samples, self.labelled = Layouts(always), 0, 0
        self._places = SampleChecks(model)
        self.reached: set[int] = set()
        self._said: set[int] = set()

    def _targets(self, logits: Tensor, labels: Tensor) -> Targets:
        return targets_of(labels, logits, self.reading.loss)

    @staticmethod
    def _signal(logits: Tensor, targets: Targets) -> Tensor:
        return on_logits(sample_losses(logits, targets).delta, logits.detach(), targets)

    def add(self, run: Run, batch: Batch) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        recorder = Recorder(self.model, RULES)
        with recorder:
            output = run(batch)
        self.output = locate(self.model, run, batch, output, self.output)
        logits = chosen(output, self.output)
        self._places.look(run, batch, logits, self.output)
        self.reading = settled(self.reading, self.model, run, batch, logits, self.output)
        targets = self._targets(logits, batch[2])
        signal = self._signal(logits, targets)
        self.labelled += int((targets.counts > 0).sum())
        check_finite_rows("the loss's signal at the logits", signal.flatten(1))
        ledger = Ledger(recorder, self.parameters, self.totals, self.layouts, self.names)
        ledger.run(logits, signal)
        self.reached |= ledger.reached
        self.samples += len(signal)
        if ledger.alone:
            self._alone(run, Parts(*batch), ledger.alone, logits.detach())

    def _alone(self, run: Run, batch: Parts, keys: set[int], logits: Tensor) -> None:
        """Squares of some parameters' gradients by running every sample by itself."""
        chosen_names = sorted(self.names[key] for key in keys)
        if keys - self._said:
            logger.info("%s: one sample at a time", ", ".join(chosen_names))
            self._said |= keys
        wanted = [self.parameters[key] for key in keys]
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(key in keys)
        for sample in range(batch.n):
            try:
                one = batch.taken([sample])
                found = chosen(run(one), self.output)
            except Exception as error:
                why = f"a sample cannot be run alone ({error})"
                raise _mixed(chosen_names[0], why) from error
            here, there = logits[sample], found[0]
            same = here.shape == there.shape
            if not same or apart(here, there, coarsest_of(self.model, here.dtype)) is not None:
                raise _mixed(chosen_names[0], "a sample's logits change with the rest of its batch")
            if not found.requires_grad:
                continue
            signal = self._signal(found, self._targets(found, one.labels))
            try:
                gradients = torch.autograd.grad(found, wanted, signal, allow_unused=True)
            except RuntimeError as error:
                raise InputError(
                    f"autograd has no gradient in {', '.join(chosen_names)}, as training would "
                    f"find too: {error}"
                ) from error
            for key, gradient in zip(keys, gradients, strict=True):
                if gradient is not None:
                    self.reached.add(key)
                    wide = gradient.to(self.totals[key])
                    self.totals[key].addcmul_(wide, wide)

    def means(self) -> dict[str, Tensor]:
        """By the parameters' names."""
        unreached = [name for key, name in self.names.items() if key not in self.reached]
        if unreached:
            logger.warning(
                "no sample's loss has a gradient in %s: their importance is zero",
                ", ".join(unreached),
            )
        out = {}
        for key, name in self.names.items():
            out[name] = self.totals[key].div_(self.samples)
            if not bool(torch.isfinite(out[name].sum())):  # of squares, which cannot cancel
                raise InputError(
                    f"the gradient in {name} is not finite for some sample; find it by a smaller "
                    "loader, and remove it or repair the model"
                )
        return out


def _mixed(name: str, why: str) -> InputError:
    return InputError(
        f"parameter {name!r} has no gradient of one sample: the samples of a batch are not "
        f"independent, or cannot be told apart there, and {why}; use batches of one sample"
    )


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    found = dict(model.named_parameters())
    if not found:
        raise InputError("model has no parameters")
    odd = [name for name, p in found.items() if not p.is_floating_point()]
    if odd:
        raise InputError(
            f"model: {odd[0]} is {found[odd[0]].dtype}, which has no squared gradient; pass the "
            "model in a floating dtype, not quantised"
        )
    return found


@door
def parameter_importance(
    model: nn.Module,
    loader: Any,
    *,
    progress: bool = False,
    **reading: Unpack[ReadingOptions],
) -> dict[str, Tensor]:
    """``1/n sum_i (d loss_i / d p)^2`` of every parameter p, elementwise, in one batched pass.

    What Selective Synaptic Dampening and elastic weight consolidation call importance, exact for
    each sample: the square is of a sample's gradient, never of a batch's mean. The gradients of a
    batch [n, P] are never held. The model runs in evaluation mode and comes back as it was.

    Every parameter is covered, frozen ones included, whatever code uses it: weights of linear
    layers, convolutions, normalisations and embeddings, in any number of calls and under any number
    of names; parameters that are added, multiplied or concatenated; weights that are made of other
    parameters. Where none of that covers a use, every sample runs by itself for its parameters.

    Args:
        loader: any form of data that :func:`imu_fast.capture` takes.
        reading: ``output``, ``loss`` and its options, as in
            :func:`imu_fast.capture_features`. A sequence's loss is the mean over its tokens that
            have a label; a sample without one has gradient zero, and counts.

    Returns:
        By the names of ``named_parameters``, each in its parameter's shape: float64 for float64
        parameters, otherwise float32.

    Raises:
        InputError: empty loader, labels out of range, several outputs that may be the logits,
            samples that are not independent, parameters that have no gradient, gradients that
            are not finite, a model that checkpoints activations.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    how = Reading.of("parameter_importance()", reading)
    parameters = _parameters(model)

    def summed(always: bool) -> dict[str, Tensor]:
        seen = _Importance(model, parameters, how, always)
        renormed = copies_of(
            m.weight
            for m in model.modules()
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None
        )
        try:
            with evaluated(model) as run:
                for batch in read(model, loader, progress):
                    with from_sample(seen.samples):
                        seen.add(run, batch)
        except CheckpointError as error:  # what is recorded of a parameter's uses is not run again
            raise InputError(
                "the model runs parts of itself again in the backward pass "
                "(torch.utils.checkpoint), where uses of parameters cannot be followed; switch "
                "that off for this call, as model.gradient_checkpointing_disable() of transformers "
                f"and model.set_grad_checkpointing(False) of timm do ({brief(error)})"
            ) from error
        finally:
            put_back(renormed)
        if not seen.samples:
            raise InputError(empty_message(loader))
        check_labelled(seen.labelled, seen.samples, seen.reading.loss)
        return seen.means()

    try:
        return summed(always=False)
    except LayoutChanged as changed:
        if isinstance(loader, Iterator):
            raise InputError(
                f"parameter {changed.layer!r}: rows belong to the samples in one way in some "
                "batches and in another way in others, which takes a second pass to tell; pass a "
                "list of batches or a DataLoader instead of an iterator"
            ) from None
        logger.info("%r: rows lie as the data says; every batch is tested", changed.layer)
        return summed(always=True)
