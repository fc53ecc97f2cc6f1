"""Times: ours and plain PyTorch's in turn, and what this machine's own rates allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import NamedTuple

import torch

from imu_fast.check.calls import copied, operands
from imu_fast.check.counts import Ceilings
from imu_fast.check.entries import Entry
from imu_fast.precision import torch_multiplies_in

KINDS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
# Of float32 in another precision; three products of TF32 take three times the floor.
_KIND = {"tf32x3": "tf32", "tf32": "tf32", "bf16": "bf16"}
# Seconds for the turns of one row, and how many there are at least and at most.
_BUDGET, _TURNS = 0.1, (3, 50)
# Bytes that a copy moves, more than caches hold; side of a product of squares.
_COPY, _SIDE = 1 << 28, {"cpu": 512, "cuda": 4096}


class Times(NamedTuple):
    """Medians in seconds; floor: the least that the bytes or the FLOPs take, whichever is more."""

    seconds: float
    plain: float
    floor: float
    limited_by: str


def ceilings(device: torch.device) -> Ceilings:
    """This machine's: a copy, and products of square matrices in each arithmetic.

    On a CPU half precision and TF32 stand for float32, in which their products are.
    """
    copy = _copy(_COPY, device)
    seconds = min(_seconds(copy, device) for _ in range(5))
    rates: dict[str, float] = {}
    for kind in (*KINDS.values(), "tf32"):
        if device.type == "cpu" and kind not in ("fp64", "fp32"):
            rates[kind] = rates["fp32"]
            continue
        product = _product(kind, device)
        rates[kind] = _flops(device) / min(_seconds(product, device) for _ in range(6))
    return Ceilings(_COPY / seconds, rates)


def _flops(device: torch.device) -> float:
    return 2.0 * _SIDE[device.type] ** 3


def _product(kind: str, device: torch.device) -> Callable[[], object]:
    """Of two square matrices, into a third, in this arithmetic."""
    side = _SIDE[device.type]
    dtype = next((d for d, name in KINDS.items() if name == kind), torch.float32)
    dtype = dtype if device.type == "cuda" or dtype.itemsize >= 4 else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def product() -> object:
        with torch_multiplies_in("tf32") if kind == "tf32" else nullcontext():
            return torch.mm(left, right, out=out)

    return product


def _copy(moved: float, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes so many bytes together."""
    source = torch.zeros(max(1, int(moved / 8)), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    before = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - before


def times(
    entry: Entry, device: torch.device, dtype: torch.dtype, precision: str, known: Ceilings
) -> Times:
    """Of the timed shape, in turns, so that all see the same machine."""
    shape = entry.timed[device.type == "cuda"]
    kind = _KIND.get(precision, KINDS[dtype]) if dtype == torch.float32 else KINDS[dtype]
    cost = entry.cost(kind, shape)
    given = operands(entry, shape, dtype, entry.names[0], device)
    # What limits it, as bare work: a copy of as many bytes, or a product for the FLOPs.
    limit, share = cost.bound_on(known), 1.0
    if limit == "bytes":
        bare = _copy(cost.bytes, device)
    else:
        most = max(cost.work, key=lambda k: cost.work[k])
        bare = _product(most, device)
        share = cost.seconds_on(known) * known.flops_per_second[most] / _flops(device)

    def call(function: Callable[..., object]) -> float:
        args = copied(given) if entry.in_place else given
        return _seconds(lambda: function(*args, **entry.options), device)

    def turn() -> tuple[float, float, float]:
        return call(entry.run), call(entry.plain), _seconds(bare, device)

    turn()  # compiles, fills caches
    least, most_turns = _TURNS
    count = int(min(most_turns, max(least, _BUDGET / sum(turn()))))
    turns = [turn() for _ in range(count)]
    ours, plain, floor = (median(column) for column in zip(*turns, strict=True))
    return Times(ours, plain, share * floor, limit)
