"""Inner products of samples' gradients: of pairs of tokens, or of gradients that are formed.

A gradient of T tokens at a layer of C outputs and D inputs is a sum of T outer products. The inner
product of two is a sum over the T^2 pairs of their tokens, each of C + D multiplications; forming
one takes T C D of them, and each inner product C D. So tokens are paired where samples are short
beside the layer, and gradients formed where they are long. Which is less work is written down here
as a cost, in floating-point operations, from the sizes alone: the same sizes take the same route,
and have the same bits, whatever else the machine does.
"""

from __future__ import annotations

# What one number read from or written to memory costs, in operations of a matrix product: on one
# core of a CPU about 80 of them a nanosecond beside 1 number, on an H100 in float32 66 beside 0.75.
ACCESS = 90
# Of a pair of tokens: two products written, then both read and one written, and read to be summed.
_PAIR_ACCESSES = 6
# Of an entry of a gradient: written, read by the product that consumes it, and packed there.
_ENTRY_ACCESSES = 3


def pairs_cost(tokens: int, others: int, classes: int, width: int) -> int:
    """Of all pairs of ``tokens`` and ``others``, with their sums over samples."""
    return tokens * others * (2 * (classes + width) + _PAIR_ACCESSES * ACCESS)


def formed_cost(tokens: int, samples: int, classes: int, width: int) -> int:
    """Of the gradients [samples, C, D] of so many tokens in all, formed and read once."""
    return classes * width * (2 * tokens + _ENTRY_ACCESSES * ACCESS * samples)


def forms_for_products(
    tokens: tuple[int, int],
    samples: tuple[int, int],
    classes: int,
    width: int,
    passes: int = 1,
) -> bool:
    """Whether the inner products of two sets are better taken of gradients that are formed.

    Args:
        tokens: N and M, of each set in all. samples: n and m. width: D, the bias included.
        passes: how often the first set's are formed, for some of the second's at a time.
    """
    formed = passes * formed_cost(tokens[0], samples[0], classes, width)
    formed += formed_cost(tokens[1], samples[1], classes, width)
    formed += 2 * samples[0] * samples[1] * classes * width
    return formed < pairs_cost(*tokens, classes, width)


def forms_for_norms(length: int, classes: int, width: int) -> bool:
    """Whether the squared norm of a gradient of so many tokens is better taken of it, formed."""
    return formed_cost(length, 1, classes, width) < pairs_cost(length, length, classes, width)
