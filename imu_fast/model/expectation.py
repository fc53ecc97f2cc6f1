"""Signals at the logits over the model's own predictions, which backward passes take on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_choice, check_count, check_finite_rows, check_seed
from imu_fast.losses.base import Signal, mean_scale
from imu_fast.losses.output_curvature import OutputCurvature, Softmax, complement
from imu_fast.losses.signals import KINDS, Signals
from imu_fast.model.draws import uniform
from imu_fast.model.head import LinearLayer
from imu_fast.model.loss import Targets, on_logits

# Backward passes of a batch that an exact expectation may take.
MAX_PASSES = 1024
_KINDS = ("exact", "sampled")


@dataclass(frozen=True)
class Expectation:
    """Over which labels: all of them, or some that are drawn.

    Attributes:
        kind: "exact": one backward pass for each output and position of a batch; "sampled": one for
            each of ``draws``. seed: of the draws. first: the place of the first sample among those
            of all processes, by which a sample's draws are told from another's.
    """

    kind: Literal["exact", "sampled"]
    draws: int
    seed: int
    first: int = 0

    @classmethod
    def of(cls, fisher: Any, draws: Any, seed: Any) -> Expectation | None:
        """What ``capture`` was given; None: no signals.

        Raises:
            InputError: an unknown kind, or draws and a seed of none that are drawn.
        """
        if fisher is not None:
            check_choice("fisher", fisher, _KINDS)
        if fisher != "sampled":
            for name, value in (("draws", draws), ("seed", seed)):
                if value is not None:
                    raise InputError(
                        f"{name}={value!r} is of fisher='sampled', and fisher is {fisher!r}; leave "
                        f"{name} out"
                    )
        draws = 1 if draws is None else check_count("draws", draws)
        seed = 0 if seed is None else check_seed("seed", seed)
        return None if fisher is None else cls(fisher, draws, seed)

    def options(self) -> dict[str, Any]:
        """``draws`` and ``seed`` as they were understood, of labels that are drawn."""
        return {"draws": self.draws, "seed": self.seed} if self.kind == "sampled" else {}


def check_one_group(layers: Sequence[LinearLayer], fisher: Expectation | None) -> None:
    """Raise InputError where signals are asked for of a layer of several groups."""
    for layer in layers:
        if fisher is not None and layer.groups > 1:
            raise InputError(
                f"layers={layer.name!r} has {layer.groups} groups, of which fisher={fisher.kind!r} "
                "brings no signals; capture it without, for 'fisher_diag' or 'fisher'"
            )


class Expected:
    """The signals of one capture, batch by batch."""

    def __init__(self, spec: Expectation) -> None:
        self._spec = spec

    def signals(
        self, found: Signal, logits: Tensor, targets: Targets, first: int
    ) -> Iterator[Tensor]:
        """Signals at the logits, in their shape and dtype.

        Args:
            found: what the loss says of the rows that have one. first: the place of the batch's
                first sample in the capture, by which samples have draws of their own.

        Raises:
            InputError: an exact expectation takes more than MAX_PASSES backward passes.
        """
        scale = mean_scale(targets.counts).to(logits.device)
        b = found.curvature.resolved(found.delta, targets.labels, scale)
        classes, position = logits.shape[-1], _positions(targets)
        if self._spec.kind == "exact":
            made = self._exact(b, position, classes)
        else:
            here = torch.arange(len(targets)).repeat_interleave(targets.counts)
            made = self._sampled(b, (here + self._spec.first + first, position), classes)
        for s in made:
            yield on_logits(s, logits.detach(), targets)

    def _sampled(
        self, b: OutputCurvature, places: tuple[Tensor, Tensor], classes: int
    ) -> Iterator[Tensor]:
        """places: of each row, its sample's and its own in that."""
        outputs: tuple[Tensor, ...] = ()
        if not isinstance(b, Softmax):
            places, outputs = (places[0][:, None], places[1][:, None]), (torch.arange(classes),)
        for k in range(self._spec.draws):
            noise = uniform(self._spec.seed, *places, torch.tensor(k), *outputs)
            yield _drawn(b, noise.to(b.operand.device)) / self._spec.draws**0.5

    def _exact(self, b: OutputCurvature, position: Tensor, classes: int) -> Iterator[Tensor]:
        count = int(position.max()) + 1 if len(position) else 0
        if count * classes > MAX_PASSES:
            raise InputError(
                f"fisher='exact' takes a backward pass for each of {count} positions times "
                f"{classes} outputs of a batch, more than {MAX_PASSES}; use fisher='sampled'"
            )
        root = b.root()
        root = torch.diag_embed(root) if root.dim() == 2 else root
        for t in range(count):
            here = (position == t).to(root.device, root.dtype)[:, None]
            for c in range(classes):
                yield root[:, :, c] * here


def _positions(targets: Targets) -> Tensor:
    """Which of its sample's rows with a loss each is: [N]."""
    counts = targets.counts
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) - torch.repeat_interleave(starts, counts)


def _drawn(b: OutputCurvature, noise: Tensor) -> Tensor:
    """A random s with ``E s s^T = B_t``: [N, C], float64.

    Of a softmax ``sqrt(w) (p - onehot(y))`` with y drawn from p; of other losses the root of B_t
    times random signs, which have the variance of one that a drawn label's signal has.

    Args:
        noise: uniform in [0, 1): [N] of a softmax, else [N, C].
    """
    if isinstance(b, Softmax):
        y = torch.searchsorted(b.p.cumsum(1), noise[:, None], right=True)
        y = y.clamp_max(b.p.shape[1] - 1)
        s = b.p.scatter(1, y, -complement(b.p).gather(1, y))
        return s * b.weight.sqrt()[:, None]
    signs = torch.where(noise < 0.5, -1.0, 1.0).double()
    root = b.root()
    return root * signs if root.dim() == 2 else (root @ signs[:, :, None])[:, :, 0]


def divided(
    wide: list[Tensor], kind: str | None, layer: LinearLayer
) -> tuple[Tensor, Signals | None]:
    """Delta [N, C] and the signals of rows that were kept side by side, batch by batch.

    Args:
        kind: of signals; None: there are none.
        wide: each [N, C (1 + K)]; K may differ, as sequences' lengths do: what is missing is zero.

    Raises:
        InputError: signals are not finite.
    """
    if kind is None:
        return torch.cat(wide), None
    classes = layer.weight.shape[0]
    most = max(part.shape[1] // classes for part in wide) - 1
    delta = torch.cat([part[:, :classes] for part in wide])
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    s = torch.zeros(len(delta), most, classes, dtype=dtype, device=delta.device)
    start = 0
    for part in wide:
        own = part[:, classes:].unflatten(1, (-1, classes)) if part.shape[1] > classes else None
        if own is not None:
            s[start : start + len(part), : own.shape[1]] = own
        start += len(part)
    check_finite_rows(f"signals of {layer.name}", s, "position")
    return delta, KINDS[kind](s)
