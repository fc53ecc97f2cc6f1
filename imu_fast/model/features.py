"""What a head saw of every batch, and the factors and features made of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, NoHeadFoundError, check_finite_rows
from imu_fast.factors.gradient_factors import GradientFactors, HeadFactors
from imu_fast.factors.operands import input_dtype
from imu_fast.losses.cross_entropy import CrossEntropy
from imu_fast.losses.forms import joined_curvature
from imu_fast.losses.output_curvature import StoredCurvature
from imu_fast.model import head as heads
from imu_fast.model.between import Between, Piece, bias_columns, plain_piece, side_by_side
from imu_fast.model.calls import Seen
from imu_fast.model.causal import settled
from imu_fast.model.head import LinearLayer, no_head, say_of_weight, shared_with
from imu_fast.model.head_features import HeadFeatures as HeadFeatures
from imu_fast.model.independence import SampleChecks, some_samples
from imu_fast.model.kept import Rows
from imu_fast.model.logits import chosen
from imu_fast.model.loss import Targets, joined_labels, targets_of
from imu_fast.model.makers import Makers
from imu_fast.model.reading import Reading
from imu_fast.model.run import Batch
from imu_fast.model.search import Head, Run, directly, find, observe
from imu_fast.model.unstored import fitting, is_large, may_be_unstored, unstored
from imu_fast.model.verify import LinearChecks

logger = logging.getLogger("imu_fast")


class HeadCapture:
    """What the batches say of the head, one after another."""

    def __init__(
        self,
        model: nn.Module,
        explicit: Sequence[LinearLayer],
        reading: Reading,
        max_memory: int | None = None,
    ) -> None:
        self.model, self.explicit, self.reading = model, explicit, reading
        self.max_memory = max_memory
        self._acts = Rows(None if max_memory is None else max_memory // 2)
        self.pieces: list[Piece] = []
        self.samples = 0
        self._checks = LinearChecks()
        self._between: Between
        # Whether the logits have been the output itself so far: then nothing is differentiated.
        self._untouched = True
        # Whether the model was seen to work with its logits, so that they have to be computed.
        self._computes = False
        self._head: Head | None = None
        self._sequences = False
        self.loss = reading.loss  # that of the first batch, once there is one
        self.classes = 0  # of the logits
        self._computed = torch.float64  # the coarsest dtype of a head's output
        self._samples = SampleChecks(model)
        self._makers = Makers(model)

    @property
    def head(self) -> Head:
        if self._head is None:
            raise InputError("loader is empty; pass at least one batch of forget samples")
        return self._head

    def add(self, run: Run, batch: Batch) -> None:
        """Run one batch.

        Raises:
            InputError: says from which sample on, after the first batch.
        """
        try:
            if self._head is None:
                self._probe(run, batch)
            piece = self._without_logits(run, batch) or self._piece(run, batch)
        except InputError as error:
            if not self.samples:
                raise
            raise type(error)(f"samples from {self.samples} on: {error}") from None
        self.pieces.append(piece if self.max_memory is None else self._moved(piece))
        self.samples += len(piece.counts)

    def _moved(self, piece: Piece) -> Piece:
        """The piece without its features, which :class:`Rows` keep.

        Raises:
            InputError: it has more than features.
        """
        if piece.kind != "plain":
            raise InputError(
                f"max_memory: between the head {self.head.name!r} and the logits: "
                f"{piece.steps or 'rows that move'}, so that more than its features is kept of "
                "each sample; leave max_memory out"
            )
        self._acts.add(piece.act)
        return replace(piece, act=piece.act[:0].clone())

    def _probe(self, run: Run, batch: Batch) -> None:
        """Look at some samples of a first batch whose logits are large.

        Kept is only that these are the head's output; everything else is found out on all of it.
        """
        likely = self.explicit or heads.guess(self.model, heads.linear_layers(self.model))
        labels = batch[2]
        if len(likely) != 1 or not is_large(likely[0], labels.numel()):
            return
        # A small output is copied, and the linear check takes as much again.
        few = max(1, fitting(likely[0]) // 4 * len(labels) // labels.numel())
        fresh = HeadCapture(self.model, self.explicit, self.reading)
        try:
            some = some_samples(batch, range(min(few, len(labels))))
            fresh._piece(run, some)
            fresh._checks.finish()
        except (InputError, NoHeadFoundError):
            return
        self._untouched = fresh._untouched
        if fresh._untouched:
            self._head, self._between, self._checks = fresh.head, fresh._between, fresh._checks
            self._samples = fresh._samples
            self.reading = fresh.reading

    def _without_logits(self, run: Run, batch: Batch) -> Piece | None:
        """The batch's piece where its logits are large, and are the head's output, untouched."""
        if self._head is None or not self._untouched or self._computes:
            return None
        layer, shift = self._head.parts[0], getattr(self.reading.loss, "shift", False)
        if batch[2].dim() > 1 and shift == "auto":
            return None  # which the logits will show
        if not may_be_unstored(layer) or not is_large(layer, batch[2].numel()):
            return None
        logits = None
        try:
            with unstored(layer) as outputs:
                seen = observe(run, batch, [layer], False)
            logits = chosen(seen.output, self._head.choice)
        except Exception:  # a model that works with its logits may do anything with these
            logger.debug("head %r: the model works with its logits", layer.name, exc_info=True)
        if logits is None or len(seen.calls) != 1 or not outputs.is_returned_as(logits):
            self._computes = True
            return None
        self._computed = _coarser(self._computed, logits.dtype)
        targets, act = self._targets(batch, logits), seen.calls[0].act
        self._samples.look_at(
            run, lambda run, some: _unstored_inputs(run, some, layer), batch, act, self._computed
        )
        return plain_piece(act.reshape(*targets.shape, -1), targets)

    def _piece(self, run: Run, batch: Batch) -> Piece:
        searched = self._head is None
        if self._head is None:
            leaves = None if self._untouched else True
            asked = self.explicit, self.reading.output
            self._head, seen = find(self.model, run, batch, *asked, leaves)
            self._between = Between(self._head.parts)
        else:
            seen = observe(run, batch, self._head.parts, not self._untouched)
        logits = chosen(seen.output, self._head.choice)
        call = directly(seen, logits)
        if call is None or not call.is_returned_as(logits) or not self._checked(seen):
            self._untouched, call = False, None
            if any(watched.leaf is None for watched in seen.calls):
                seen = observe(run, batch, self._head.parts, True)
                logits = chosen(seen.output, self._head.choice)
            self._check(seen)
        for made in seen.calls:
            self._computed = _coarser(self._computed, made.out.dtype)
        self._samples.look(run, batch, logits, self._head.choice, self._computed)
        self.reading = settled(self.reading, self.model, run, batch, logits, self._head.choice)
        targets = self._targets(batch, logits)
        if call is not None:
            return plain_piece(call.act.reshape(*targets.shape, -1), targets)
        if not logits.requires_grad:
            raise no_head(
                self.model, f"{self._head.name}: not the producer of the logits of this batch"
            )
        piece = self._between.piece(seen.calls, logits, targets)
        known = searched or bool(self.explicit)
        self._makers.check(run, batch, self._head, logits, piece, known)
        return piece

    def _targets(self, batch: Batch, logits: Tensor) -> Targets:
        targets = targets_of(batch[2], logits, self.reading.loss)
        if self.pieces and targets.loss != self.loss:
            raise InputError(
                f"labels are those of {targets.loss!r}, and before those of {self.loss!r}; pass "
                "loss="
            )
        self.loss, self.classes = targets.loss, logits.shape[-1]
        self._sequences |= targets.valid.dim() > 1
        return targets

    def _check(self, seen: Seen) -> None:
        for call in seen.calls:
            self._checks.add(call.layer, call.act, call.rows(call.out.detach()))

    def _checked(self, seen: Seen) -> bool:
        """False where an output that was only kept is not what its layer computes: something may
        have written to it unseen (by ``.data``), which a copy will show."""
        try:
            self._check(seen)
        except NoHeadFoundError:
            if any(call.leaf is None for call in seen.calls):
                return False
            raise
        return True

    @property
    def offsets(self) -> Tensor:
        """[n+1]."""
        counts = torch.cat([piece.counts for piece in self.pieces])
        return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])

    @property
    def only(self) -> LinearLayer | None:
        """The one layer of the head, if it acts on features and a one as it does in the model."""
        parts = self.head.parts
        ones = [
            piece.act[:, column]
            for piece in self.pieces
            if piece.kind != "plain"
            for column in bias_columns(parts)
        ]
        unit = all(bool((column == 1).all()) for column in ones)
        return parts[0] if len(parts) == 1 and unit else None

    def columns(self, piece: Piece) -> Tensor:
        """A piece's features: [a] of the only layer, or ``[a, 1]`` of each part side by side."""
        if self.only is not None:
            return piece.act[:, : self.only.weight.shape[1]]
        if piece.kind != "plain":
            return piece.act
        return side_by_side([(piece.act, piece.act.new_ones(len(piece.act)))], self.head.parts)

    def features(self) -> HeadFeatures:
        head, only = self.head, self.only
        blocks = [part.matrix for part in head.parts]
        ends = torch.tensor([block.shape[1] for block in blocks]).cumsum(0).tolist()
        parts = tuple(
            (part, slice(end - block.shape[1], end))
            for part, block, end in zip(head.parts, blocks, ends, strict=True)
        )
        write_back = self._write_back()
        if only is not None:
            linear = only.held() if only.derived else only.as_linear()
        else:
            linear = nn.Linear(ends[-1], len(blocks[0]), bias=False, device="meta")
            linear.weight = nn.Parameter(torch.cat(blocks, dim=1), requires_grad=False)
            write_back = write_back or (
                f"head {head.name!r} stands for {len(parts)} scaled layer(s): its weight is "
                "[W, b] of each, to be copied into them"
            )
        acts = [self.columns(piece) for piece in self.pieces]
        wide = torch.promote_types(acts[0].dtype, acts[-1].dtype)
        for act in acts:
            wide = torch.promote_types(wide, act.dtype)
        return HeadFeatures(
            head.name,
            linear,
            torch.cat([act.to(wide) for act in acts]),
            joined_labels([piece.labels for piece in self.pieces]),
            self.offsets,
            all(piece.exact for piece in self.pieces),
            ", ".join(dict.fromkeys(piece.steps for piece in self.pieces if piece.steps)),
            write_back,
            parts,
            head.choice,
            self._computed,
            self._sequences,
            self.loss,
        )

    def _write_back(self) -> str:
        for part in self.head.parts:
            if part.derived:
                return f"head {part.name!r} computes its weight from other parameters"
            if others := shared_with(self.model, part):
                return f"head {part.name!r} shares its weight with {', '.join(others)}"
        return ""

    def factors(self) -> HeadFactors:
        head, only, offsets = self.head, self.only, self.offsets
        labels = joined_labels([piece.labels for piece in self.pieces])
        if only is not None and all(piece.kind == "plain" for piece in self.pieces):
            stored = self.max_memory is not None
            act = self._acts.tensor() if stored else torch.cat([p.act for p in self.pieces])
            self._acts, self.pieces = Rows(None), []
            implicit = self._implicit(len(act) * len(only.weight) * act.itemsize, labels)
            return GradientFactors.from_head(
                act,
                only.weight,
                only.bias,
                labels,
                offsets,
                loss=self.loss,
                name=head.name,
                implicit=implicit,
            )
        done = [self._with_signal(piece) for piece in self.pieces]
        delta = torch.cat([piece.delta for piece in done])
        act = torch.cat([self.columns(piece) for piece in self.pieces])
        act = act.to(input_dtype(act.dtype, delta.dtype))
        check_finite_rows("features", act)
        tokens = any(piece.kind == "tokens" for piece in self.pieces)
        return GradientFactors(
            delta=delta,
            act=act,
            offsets=offsets,
            has_bias=only is not None and only.bias is not None,
            labels=None if tokens else labels,
            losses=torch.cat([piece.losses for piece in done]),
            name=head.name,
            loss=None if tokens else self.loss,
            curvature=None if tokens else self._curvature(done),
        )

    def _implicit(self, size: int, labels: Tensor) -> bool | None:
        """Whether a signal of so many bytes has to be made where it is needed; None: as usual."""
        if self.max_memory is None or 4 * size <= self.max_memory:
            return None
        plain = isinstance(self.loss, CrossEntropy) and self.loss.plain and labels.dim() == 1
        if not plain:
            raise InputError(
                f"max_memory: the signal of {self.loss!r} is stored, {size / 1e9:.1f} GB; it is "
                "made anew where it is needed of a plain loss='cross_entropy' alone. Raise "
                f"max_memory to {4 * size}, or take fewer samples"
            )
        return True

    def _with_signal(self, piece: Piece) -> _Signal:
        """delta and losses, also of a piece that left them to be computed from the features."""
        if piece.delta is not None and piece.losses is not None:
            return _Signal(piece.delta, piece.losses, piece.curvature)
        part = self.head.parts[0]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), piece.counts.cumsum(0)])
        made = GradientFactors.from_head(
            piece.act,
            part.weight,
            part.bias,
            piece.labels,
            offsets,
            loss=self.loss,
            name=part.name,
            implicit=False,
        )
        assert made.losses is not None and not isinstance(made.curvature, Tensor)
        return _Signal(made.delta, made.losses, made.curvature)

    def _curvature(self, done: Sequence[_Signal]) -> StoredCurvature | None:
        return joined_curvature(
            [signal.curvature for signal in done],
            [signal.delta for signal in done],
            [piece.labels for piece in self.pieces],
            [piece.counts for piece in self.pieces],
        )

    def finish(self) -> None:
        """The last checks."""
        self._checks.finish()

    def say(self) -> None:
        """Log what a reader of the scores must know."""
        name = self.head.name
        steps = ", ".join(dict.fromkeys(piece.steps for piece in self.pieces if piece.steps))
        for part in self.head.parts:
            say_of_weight(self.model, part)
        if any(piece.kind == "tokens" for piece in self.pieces):
            logger.warning(
                "head %r: between its output and the loss are %s; gradients are exact, curvatures "
                "that need the outputs' Hessian (ggn, ggn_block, kfac, ekfac) are not offered",
                name,
                steps,
            )
        elif steps:
            logger.info("head %r: between its output and the loss are %s", name, steps)


def _unstored_inputs(run: Run, batch: Batch, layer: LinearLayer) -> Tensor:
    with unstored(layer):
        return observe(run, batch, [layer], False).calls[0].act


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


class _Signal(NamedTuple):
    delta: Tensor
    losses: Tensor
    curvature: StoredCurvature | None
