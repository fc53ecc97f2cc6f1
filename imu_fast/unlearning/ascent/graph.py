"""The steps of an epoch in one go: a CUDA graph where there is a GPU, a plain loop elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("imu_fast")

Step = Callable[[Tensor, Tensor], Tensor]


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what ``run`` launches, without running it; returns what replays that.

    This function has not run yet: no GPU was at hand when it was written. All around it is tested
    on a CPU, with ``run`` itself in the place of the replay.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()

    def replay() -> Tensor:
        graph.replay()
        return recorded.clone()  # the next replay writes the same memory

    return replay


class StepSequence:
    """Calls ``step`` on several batches of one size.

    The first call of a shape is the plain loop, which compiles and warms up whatever the steps
    launch; from the second on a graph of that loop is replayed on operands copied into place.

    Args:
        step: ``(rows [B], weights [B]) -> loss``, a scalar tensor; it changes its state in place.
        graph: whether steps only launch: no look at the device, no random number, no state on the
            host.
    """

    def __init__(self, step: Step, graph: bool) -> None:
        self._step, self._graph = step, graph
        self._operands: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], Tensor] | None = None

    def _loop(self, rows: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([self._step(r, w) for r, w in zip(rows, weights, strict=True)])

    def __call__(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Losses [k] of k steps in order; rows [k, B] int64, weights [k, B]."""
        rows = rows.to(weights.device)
        if not self._graph:
            return self._loop(rows, weights)
        if self._operands is None or self._operands[0].shape != rows.shape:
            self._operands, self._replay = (rows.clone(), weights.clone()), None
            return self._loop(rows, weights)
        self._operands[0].copy_(rows)
        self._operands[1].copy_(weights)
        if self._replay is None:
            operands = self._operands
            try:
                self._replay = capture(lambda: self._loop(*operands))
            except RuntimeError as error:
                logger.warning("steps run one by one, no CUDA graph: %s", error)
                self._graph = False
                return self._loop(rows, weights)
        return self._replay()
