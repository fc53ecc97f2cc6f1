"""Factors whose samples are shared among the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from imu_fast import distributed
from imu_fast.errors import InputError
from imu_fast.factors.gradient_factors import GradientFactors
from imu_fast.factors.mapped import Change, changed
from imu_fast.factors.none_here import NoneHere, one_sample
from imu_fast.factors.outputs import at_outputs, is_wide
from imu_fast.factors.samples import Means
from imu_fast.factors.source import MAX_GATHERED, Factors, bytes_of, in_memory, is_factors
from imu_fast.factors.sums import S
from imu_fast.losses.signals import Signals


class ShardedFactors(Means):
    """One process's share of the samples; sums are over those of all processes.

    What is fitted on them is the same in every process; scores are of the samples that are here,
    in their order. Each process has to make the same calls in the same order; a call that fails in
    one of them fails in all. What is no sum over samples (``curvature="fisher"``, the GGN's dual)
    gathers all of them in every process, up to 4 GB.

    Args:
        local: the share of this process, captured from its part of the data, or
            ``factors.shard(rank, world)``; None where it has no samples.
        group: the processes; None: all.

    Raises:
        InputError: no process group, shares of different layers, no samples at all, or processes
            that compute with different numbers of threads, whose rounding differs.
    """

    def __init__(self, local: Factors | None, group: distributed.Group = None) -> None:
        distributed.check_group(group)
        self.group = group
        with distributed.together("ShardedFactors()", group):
            if local is not None and (not is_factors(local) or isinstance(local, ShardedFactors)):
                raise InputError(
                    f"local is a {type(local).__name__}; pass the factors of this process's "
                    "samples, of one layer, or None where it has none"
                )
            self.local = self._like_others(local)
            self._agree()

    def _like_others(self, local: Factors | None) -> Factors:
        """This process's share; where it is empty, one of the kind that the others have."""
        here = distributed.gather(local is not None and local.n > 0, self.group)
        if not any(here):
            raise InputError("local=None: no process has a sample; pass at least one in all")
        if all(here):
            assert local is not None
            return local
        first = here.index(True) == distributed.rank_of(self.group)
        kinds = distributed.gather(one_sample(local) if first and local else None, self.group)
        if local is not None and local.n > 0:
            return local
        like = next(kind for kind in kinds if kind is not None)
        return NoneHere(like.to(distributed.home_of(self.group) if local is None else local.device))

    def _agree(self) -> None:
        local = self.local
        first = next(iter(local.chunks(1)))
        signals = first.curvature if isinstance(first.curvature, Signals) else None
        kind = None if signals is None else signals.kind
        sizes = (local.num_classes, local.feature_dim, local.has_bias)
        dtypes = " beside ".join(dict.fromkeys(map(str, (local.dtype, first.act.dtype))))
        layer = (*sizes, dtypes, local.name, distributed.text_of(first.loss), kind)
        # Where processes add up in different orders, they may stop iterating at different places.
        threads = torch.get_num_threads() if local.device.type == "cpu" else 0
        at_once = local.outputs_at_once if is_wide(local) else local.num_classes
        count = 0 if signals is None else signals.s.shape[1]
        mine = (local.n, local.num_tokens, layer, threads, at_once, count)
        found = distributed.gather(mine, self.group)
        for rank, (_, _, other, others_threads, *_) in enumerate(found):
            if other != found[0][2]:
                raise InputError(
                    f"local: process {rank} has (C, d, bias, dtype, name, loss, fisher) {other}, "
                    f"process 0 has {found[0][2]}; capture all from the same model and layer"
                )
            if others_threads != found[0][3]:
                raise InputError(
                    f"local: process {rank} computes with {others_threads} threads, process 0 with "
                    f"{found[0][3]}; call torch.set_num_threads with the same number in all"
                )
        self.counts = [n for n, *_ in found]
        self._num_tokens = sum(tokens for _, tokens, *_ in found)
        self._at_once = min(at_once for *_, at_once, _ in found)
        most = max(count for *_, count in found)
        if count < most:  # what is made of them has one rank in all
            self.local = changed(local, lambda chunk: _padded(chunk, most))

    @property
    def n(self) -> int:
        """Samples of all processes."""
        return sum(self.counts)

    @property
    def here(self) -> slice:
        """The places of this process's samples among those of all, in the order of the ranks."""
        rank = distributed.rank_of(self.group)
        first = sum(self.counts[:rank])
        return slice(first, first + self.counts[rank])

    @property
    def n_here(self) -> int:
        """Samples of this one."""
        return self.local.n

    @property
    def num_tokens(self) -> int:
        """Tokens of all processes."""
        return self._num_tokens

    @property
    def num_classes(self) -> int:
        """C."""
        return self.local.num_classes

    @property
    def feature_dim(self) -> int:
        """d."""
        return self.local.feature_dim

    @property
    def width(self) -> int:
        """D."""
        return self.local.width

    @property
    def has_bias(self) -> bool:
        """Whether D = d + 1."""
        return self.local.has_bias

    @property
    def name(self) -> str:
        """The layer's."""
        return self.local.name

    @property
    def device(self) -> torch.device:
        """Of this process's share."""
        return self.local.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the share."""
        return self.local.dtype

    @property
    def outputs_at_once(self) -> int:
        """The fewest that any process can deal with: all have to cut in the same places."""
        return self._at_once

    def outputs(self, classes: slice) -> ShardedFactors:
        """The same samples at some outputs alone."""
        return self._of(at_outputs(self.local, classes))

    def changed(self, change: Change) -> ShardedFactors:
        """With ``change`` of every chunk."""
        return self._of(changed(self.local, change))

    def _of(self, local: Factors) -> ShardedFactors:
        some = copy(self)
        some.local = local
        return some

    def chunks(self, max_tokens: int | None = None) -> Iterator[GradientFactors]:
        """Of this process."""
        return self.local.chunks(max_tokens)

    def sums(self, statistic: Callable[[GradientFactors], S]) -> S:
        """Over all processes; all of them get the same bits."""
        found: S = distributed.summed_over(lambda: self.local.sums(statistic), self.group)
        return found

    def each(self, statistic: Callable[[GradientFactors], Tensor]) -> Tensor:
        """Of the samples of this process."""
        return self.local.each(statistic)

    def mean_gradient(self) -> Tensor:
        """``gbar = 1/n sum_i g_i`` over all processes: [C, D], in the factors' dtype."""
        with distributed.together("mean_gradient()", self.group):
            return super().mean_gradient()

    def fisher_diagonal(self) -> Tensor:
        """``1/n sum_i g_i * g_i`` over all processes: [C, D]."""
        with distributed.together("fisher_diagonal()", self.group):
            return super().fisher_diagonal()

    def gathered(self) -> GradientFactors:
        """The samples of all processes in each of them, in the order of the ranks.

        Raises:
            InputError: their signals and inputs are beyond 4 GB.
        """
        with distributed.together("gathered()", self.group):
            kept = next(iter(self.local.chunks(1))).curvature
            signals = kept.s.shape[1] if isinstance(kept, Signals) else 0
            size = bytes_of(self, signals)
            if size > MAX_GATHERED:
                raise InputError(
                    f"factors of {size / 1e9:.1f} GB cannot be gathered in every process, which "
                    f"is done up to {MAX_GATHERED / 1e9:.1f} GB; share fewer samples"
                )
            return self._gathered()

    def _gathered(self) -> GradientFactors:
        mine = in_memory(self.local, "gathered()")
        tokens, samples = self.local.num_tokens, self.local.n  # of NoneHere mine is of no sample's

        def rows(x: Tensor, count: int = tokens) -> Tensor:
            return distributed.rows_of_all(x[:count], self.group)

        # In every process the same optional ones are there: the loss's own.
        counts = rows(mine.offsets.diff(), samples)
        changed = mine._changed(rows)
        losses = None if mine.losses is None else rows(mine.losses, samples)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return replace(mine, **changed, offsets=offsets, losses=losses)


def _padded(chunk: GradientFactors, most: int) -> GradientFactors:
    """Of so many signals."""
    assert isinstance(chunk.curvature, Signals)
    return replace(chunk, curvature=chunk.curvature.padded(most))
