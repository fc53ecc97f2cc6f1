"""Factors of any linear layers: one forward and one backward pass, every row with its sample."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, NoSamplesError, check_finite_rows
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.operands import input_dtype
from imu_fast.factors.unfolded import UnfoldedFactors
from imu_fast.model.called import from_sample
from imu_fast.model.calls import Call, Seen, watched
from imu_fast.model.causal import settled
from imu_fast.model.convolution import Convolution
from imu_fast.model.expectation import Expectation, Expected, divided
from imu_fast.model.head import LinearLayer, say_of_weight, uses_of
from imu_fast.model.independence import SampleChecks, check_independent
from imu_fast.model.logits import chosen
from imu_fast.model.loss import Targets, check_labelled, on_logits, sample_losses, targets_of
from imu_fast.model.own_use import OfWhole, Whole, check_whole, whole_parameters
from imu_fast.model.packing import BatchPacker, Input, Part
from imu_fast.model.proofs import Proof, moves_samples, proof_of
from imu_fast.model.reading import Reading
from imu_fast.model.rows import (
    Backward,
    LayoutChanged,
    Mixed,
    Ownership,
    check_owned,
    one_sample_at_a_time,
)
from imu_fast.model.run import Batch, Runner, evaluated, full_precision, read
from imu_fast.model.search import locate
from imu_fast.model.stacks import LayerRows, Stack
from imu_fast.model.verify import LinearChecks, is_known

logger = logging.getLogger("imu_fast")

Rows = tuple[Tensor, Tensor, Tensor]
Widen = Callable[..., list[Tensor]]
LayerFactors = GradientFactors | UnfoldedFactors


def check_readable(seen: Seen) -> None:
    """Raise InputError where a call of a watched layer could not be read."""
    for name, why in seen.odd.items():
        raise InputError(f"layers={name!r}: {why}; it has no factors")


class LayersCapture:
    """Rows of the layers, batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        reading: Reading,
        always: bool,
        fisher: Expectation | None = None,
    ) -> None:
        self.model, self.layers = model, list(layers)
        self.reading, self.output = reading, reading.output
        self.batches = 1  # as many as come, as far as is known; 0: not at all
        self.kept: dict[str, LayerRows] = {}
        self.images: dict[str, list[Tensor]] = {}  # of convolutions, call by call
        self.samples: list[Tensor] = []  # how many labels each sample of each batch has
        self._ownership, self._checks = Ownership(always), LinearChecks()
        self._places = SampleChecks(model)
        self._kind = None if fisher is None else fisher.kind
        self._expected = None if fisher is None else Expected(fisher)
        self._copied = False
        self.ran, self._reached = set[str](), set[str]()  # names of layers

    def add(self, run: Runner, batch: Batch) -> None:
        seen, output = self._run(run, batch)
        check_readable(seen)
        self.output = locate(self.model, run, batch, output, self.output)
        logits = chosen(output, self.output)
        self._places.look(run, batch, logits, self.output)
        self.reading = settled(self.reading, self.model, run, batch, logits, self.output)
        targets = targets_of(batch[2], logits, self.reading.loss)

        def independent(name: str) -> None:
            check_independent(self.model, run, batch, logits, name, self.output)

        self.take(seen, logits, targets, independent)

    def _run(self, run: Runner, batch: Batch) -> tuple[Seen, Any]:
        """Without copies of what the layers read and return, until a model writes to these."""
        stops = run.stops
        how: dict[str, Any] = {"trained": True, "copied": self._copied, "stops": stops}
        with watched(self.layers, leaves=True, **how) as seen:
            output = run(batch)
        if stops is None and seen.quiet:
            run.settle(batch)
            return self._run(run, batch)
        if any(call.is_overwritten for call in seen.calls):
            del seen, output
            self._copied = True
            return self._run(run, batch)
        return seen, output

    def take(
        self, seen: Seen, logits: Tensor, targets: Targets, independent: Callable[[str], None]
    ) -> None:
        """One batch, whose forward pass is done and whose graph is alive.

        Args:
            seen: the calls of the layers. logits: [*targets.shape, C].
            independent: raises InputError unless its samples are; called where they share a row.
        """
        found = sample_losses(logits, targets)
        signal = on_logits(found.delta, logits.detach(), targets)
        self.ran |= {call.layer.name for call in seen.calls} | seen.stopped
        labelled = targets.counts > 0
        self.samples.append(labelled)
        calls = seen.calls if logits.requires_grad else []
        proof = None if self._ownership.always else proof_of(self.model, logits, calls, len(signal))
        proved = proof is not None and proof.holds()
        for call in seen.calls:
            if proved and is_known(call.layer):
                continue
            act, out = call.act, call.rows(call.out.detach())
            if isinstance(call.layer, Convolution):
                act, out = next(call.layer.pieces(act[:1], out[:1] if act.shape[0] > 1 else out))
            self._checks.add(call.layer, act, out)

        def backward(weights: Tensor, signal: Tensor = signal) -> list[Tensor]:
            weighted = signal * weights.to(signal).view(-1, *[1] * (signal.dim() - 1))
            return self._gradients(calls, logits, weighted)[0]

        more: list[Tensor] = []
        if self._expected is not None and calls:
            first = sum(map(len, self.samples)) - len(labelled)
            more = list(self._expected.signals(found, logits, targets, first))

        def whole(base: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor]:
            """Beside the gradients at each call those of further signals: [..., C (1 + K)]."""
            ones = torch.ones(len(targets)) if weights is None else weights
            columns = [base, *(backward(ones, s) for s in more)]
            return [torch.cat(of_call, dim=-1) for of_call in zip(*columns, strict=True)]

        widened = whole if more else None
        rows: list[Rows] = []
        if calls and proof is not None and proved:
            assert proof.owners is not None
            base = self._gradients(calls, logits, signal)[0]
            rows = self._as_rows(calls, base, proof.owners, widened)
        elif calls:
            rows = self._rows(calls, logits, signal, (backward, widened), independent, proof)
        of_layers: dict[str, list[Rows]] = {layer.name: [] for layer in self.layers}
        for call, found_there in zip(calls, rows, strict=True):
            of_layers[call.layer.name].append(found_there)
        pack, batch = BatchPacker(labelled), dict[Stack, Input]()
        for layer in self.layers:
            if layer.name not in self.kept:
                self.kept[layer.name] = LayerRows(self.batches, self._kind is not None)
            part = _joined(of_layers.pop(layer.name), layer, pack)
            self.kept[layer.name].add(part, batch)

    def _gradients(
        self,
        calls: Sequence[Call],
        logits: Tensor,
        signal: Tensor,
        whole: Whole | None = None,
    ) -> tuple[list[Tensor], OfWhole]:
        """At each call [..., C], and of the ``whole`` parameters."""
        own = whole or {}
        targets = [*(call.target for call in calls), *own.values()]
        found = torch.autograd.grad(logits, targets, signal, retain_graph=True, allow_unused=True)
        at_calls = found[: len(calls)]
        self._reached |= {
            c.layer.name for c, g in zip(calls, at_calls, strict=True) if g is not None
        }
        of_own: OfWhole = dict(zip(own, found[len(calls) :], strict=True))
        return [call.rows(g) for call, g in zip(calls, at_calls, strict=True)], of_own

    def _rows(
        self,
        calls: Sequence[Call],
        logits: Tensor,
        signal: Tensor,
        passes: tuple[Backward, Widen | None],
        independent: Callable[[str], None],
        proof: Proof | None,
    ) -> list[Rows]:
        """``(delta [R, C], act [R, d], owner [R])`` of each call."""
        n = len(signal)
        backward, widened = passes
        first = len(self.samples) == 1
        own = whole_parameters(self.model, self.layers, calls) if first else None
        base, whole = self._gradients(calls, logits, signal, own)
        if first:
            with full_precision(logits.device):
                check_whole(self.layers, calls, base, whole)
        del whole
        names = [call.layer.name for call in calls]
        try:
            due = moves_samples(logits, calls)
            owners = self._ownership.owners(names, base, backward, n, due)
        except Mixed as mixed:
            name = names[mixed.call]
            independent(name)
            logger.info("layer %r: samples share its rows; one backward pass each", name)
            acts = [self._act(call, g.shape[:-1]) for call, g in zip(calls, base, strict=True)]
            if widened is not None:
                return one_sample_at_a_time(lambda w: widened(backward(w), w), acts, n)
            return one_sample_at_a_time(backward, acts, n)
        if proof is not None:
            proof.whole |= first
            if self._ownership.last is not None:
                proof.passed(owners, *self._ownership.last)
        return self._as_rows(calls, base, owners, widened)

    def _as_rows(
        self,
        calls: Sequence[Call],
        base: Sequence[Tensor],
        owners: Sequence[Tensor],
        widened: Widen | None,
    ) -> list[Rows]:
        if widened is not None:
            base = widened(base)
            check_owned([call.layer.name for call in calls], base, owners)
        acts = [self._act(call, g.shape[:-1]) for call, g in zip(calls, base, strict=True)]
        return [
            (g.reshape(-1, g.shape[-1]), act.reshape(-1, act.shape[-1]), owner.flatten())
            for g, act, owner in zip(base, acts, owners, strict=True)
        ]

    def _act(self, call: Call, rows: torch.Size) -> Tensor:
        """What is kept of each row [*rows]: the input, or where in the kept images it is."""
        if not isinstance(call.layer, Convolution):
            return call.act
        kept = self.images.setdefault(call.layer.name, [])
        kept.append(call.act.clone() if call.out is call.given else call.act)
        return call.layer.places(rows, len(kept) - 1, call.act).to(call.act.device)

    def factors(self) -> list[LayerFactors]:
        if not self.samples:
            raise NoSamplesError("loader is empty; pass at least one batch of forget samples")
        labelled = torch.cat(self.samples)
        check_labelled(int(labelled.sum()), len(labelled), self.reading.loss)
        self._checks.finish()
        for layer in self.layers:
            if layer.name not in self.ran:
                raise InputError(
                    f"layers={layer.name!r} never ran as a module: the model does not use it on "
                    "these samples, or reads its weight directly (as nn.MultiheadAttention does "
                    "with out_proj); leave it out"
                )
            if layer.name not in self._reached:
                logger.warning(
                    "layer %r does not reach the loss of any sample: zero gradient", layer.name
                )
        return [self._factors(layer) for layer in self.layers]

    def _factors(self, layer: LinearLayer) -> LayerFactors:
        kept = self.kept.pop(layer.name)
        assert kept.inputs is not None and kept.read is not None
        counts, dtype = torch.cat(kept.counts), kept.dtype
        if kept.deltas is None:
            delta, signals = kept.delta(), None
        else:
            delta, signals = divided(kept.deltas, self._kind, layer)
        if not kept.finite:
            check_finite_rows(f"gradient of {layer.name}", delta, "position")
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        if isinstance(layer, Convolution):
            images = self.images.get(layer.name, [])
            for image in images:
                check_finite_rows(f"input of {layer.name}", image, "image")
            unfolded = UnfoldedFactors(
                delta=delta.to(dtype),
                places=kept.inputs.tensor(torch.int64),
                inputs=images,
                offsets=offsets,
                unfolding=layer.unfolding,
                feature_dim=layer.weight.shape[1],
                has_bias=layer.bias is not None,
                name=layer.name,
                curvature=signals,
            )
            return unfolded.by_columns() if unfolded.columns_are_smaller else unfolded
        act = kept.inputs.finite(input_dtype(kept.read, dtype), layer.name)
        return GradientFactors(
            delta=delta.to(dtype),
            act=act,
            offsets=offsets,
            has_bias=layer.bias is not None,
            name=layer.name,
            curvature=signals,
        )


def _joined(rows: Sequence[Rows], layer: LinearLayer, pack: BatchPacker) -> Part:
    """One layer's rows of one batch in the order of their samples, and how many each has."""
    if not rows:
        weight = layer.weight
        delta, act = (weight.new_zeros(0, size) for size in weight.shape)
        if isinstance(layer, Convolution):
            act = torch.zeros(0, 3, dtype=torch.int64, device=delta.device)
        return pack(delta, act, torch.zeros(0, dtype=torch.int64))
    delta, act, owner = rows[0]
    if len(rows) > 1:
        delta, act, owner = (torch.cat([r[i] for r in rows]) for i in range(3))
    return pack(delta.detach(), act.detach(), owner)


def capture_layers(
    model: nn.Module,
    loader: Any,
    layers: Sequence[LinearLayer],
    reading: Reading,
    progress: bool,
    fisher: Expectation | None = None,
) -> list[LayerFactors]:
    """Factors of the layers in their order, see :func:`imu_fast.model.capture.capture`."""

    def captured(always: bool) -> list[LayerFactors]:
        seen = LayersCapture(model, layers, reading, always, fisher)
        with evaluated(model) as run:
            for layer in layers:
                for parameter in layer.module._parameters.values():
                    # Keeps torch's fused encoder layers off, which hide theirs.
                    if parameter is not None and parameter.is_floating_point():
                        parameter.requires_grad_()
            batches = read(model, loader, progress)
            seen.batches = length_hint(batches)
            for batch in batches:
                with from_sample(sum(map(len, seen.samples))):
                    seen.add(run, batch)
        return seen.factors()

    try:
        out = captured(always=False)
    except LayoutChanged as changed:
        if isinstance(loader, Iterator):
            raise InputError(
                f"layers={changed.layer!r}: its rows belong to the samples in one way in some "
                "batches and in another way in others, which takes a second pass to tell; pass a "
                "list of batches or a DataLoader instead of an iterator"
            ) from None
        logger.info("layer %r lays out its rows by the data: every batch is tested", changed.layer)
        out = captured(always=True)
    uses = uses_of(model)
    for layer in layers:
        say_of_weight(model, layer, uses)
    return out
