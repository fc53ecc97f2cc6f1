"""Random numbers by place: a draw is a function of the seed and of whose draw it is, of nothing
that was drawn before, so that it is the same in whatever batches and processes.

A counter takes the place of a generator's state (Salmon et al. 2011); what makes a random number of
it is the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The int64 of these 64 bits."""
    return word - (1 << 64) if word >> 63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _right(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` of x as an unsigned integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _right(x, 30)) * _FACTORS[0]
    x = (x ^ _right(x, 27)) * _FACTORS[1]
    return x ^ _right(x, 31)


def uniform(seed: int, *places: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, of 53 random bits each.

    Args:
        seed: in [0, 2^32). places: int64 on the CPU, not negative, such as a sample's and a row's
            in it; they broadcast, and the result has the shape that this makes.
    """
    key = torch.tensor(seed)
    for place in (torch.zeros((), dtype=torch.int64), *places):
        key = _mixed(key + (place + 1) * _STEP)
    return _right(key, 11).double() * 2.0**-53
