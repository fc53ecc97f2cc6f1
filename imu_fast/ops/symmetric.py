"""Sums of symmetric products ``L^T R``, of which little more than one half is computed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor

# The narrowest strips whose products are at full speed; of one only what is left of its end is
# computed. On a CUDA device a launch costs as much as that would save.
_STRIP = 160
# Numbers of a piece that a cache holds, and the fewest rows that are multiplied at full speed.
_PIECE_ELEMENTS, _PIECE_ROWS = 1 << 17, 128


def rows_at_once(width: int) -> int:
    """Of matrices of this width: how many to convert and multiply at a time."""
    return max(_PIECE_ROWS, _PIECE_ELEMENTS // max(1, width))


def add_symmetric(
    out: Tensor, pieces: Iterable[tuple[Tensor, Tensor]], alpha: float = 1.0
) -> Tensor:
    """``out += alpha sum L^T R``, in place: [D, D].

    Args:
        out: symmetric. pieces: L and R, [k, D] each, in out's dtype; each product is symmetric.
    """
    order = len(out)
    strips = max(1, order // _STRIP) if out.device.type == "cpu" else 1
    ends = [order * i // strips for i in range(strips + 1)]
    cuts = list(pairwise(ends))
    for left, right in pieces:
        for start, stop in cuts:
            # Into views, so that nothing of out's size exists beside it.
            out[start:stop, :stop].addmm_(left[:, start:stop].T, right[:, :stop], alpha=alpha)
    for start, stop in cuts[1:]:
        out[:start, start:stop] = out[start:stop, :start].T
    return out
