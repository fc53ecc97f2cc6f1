"""What a user's own ten lines cost beside ours, on one thread: ``python bench/rivals.py``.

Each row is one job: ours and its plain rival in turn in one process, CPU time, the median of the
rounds' ratios theirs / ours (below 1: we lose) and the interval that holds the median 19 times of
20, by order statistics; below six rounds their whole range. ``head``: ``unlearn(scope="head")`` on
cached features, with every check, a measurement before and the model's own at the end, beside a
loop of autograd and torch.optim.SGD and one in closed form, which have none of these.
``ggn``: a fit and a solve by ``GGN()`` as it chooses, beside its cheapest forced preconditioner.
``kfac``: from features and labels to every sample's influence by K-FAC, beside the same in float32
throughout; each with the relative error of its scores, to float64 ones.
The others are lines of plain float32 of the same formula; ours stays exact for confident samples
and checks what comes in, and K-FAC is as exact as in float64 (``bench/rival_jobs.py``).

``python bench/rivals.py head --rounds 5 --seconds 10`` runs the rows whose name begins so; a row
ends early after so many seconds, but for its first three rounds. ``--out F`` keeps the rows of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rival_jobs import ROWS, Job

import imu_fast as imu
from imu_fast.storage import replacing

ENOUGH = 2e-3  # seconds of a measurement


def cpu_seconds(job: Job, times: int) -> float:
    """Of one call, the mean of so many."""
    start = time.process_time()
    for _ in range(times):
        job()
    return (time.process_time() - start) / times


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the median, at 95 %: order statistics of the binomial's tails; the range below six."""
    found, n = sorted(ratios), len(ratios)
    tail, k = 0.5**n, 0
    below = tail
    while k < (n - 1) // 2:
        tail *= (n - k) / (k + 1)
        if below + tail > 0.025:
            break
        below, k = below + tail, k + 1
    return found[k], found[n - 1 - k]


def compare(ours: Job, theirs: Job, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    """CPU seconds of each, in turn, the order turned every round."""
    times: dict[Job, list[float]] = {ours: [], theirs: []}
    ours(), theirs()
    often = {job: max(1, round(ENOUGH / cpu_seconds(job, 1))) for job in times}
    start = time.perf_counter()
    for round_ in range(rounds):
        if round_ >= 3 and time.perf_counter() - start > seconds:
            break
        for job in (ours, theirs) if round_ % 2 else (theirs, ours):
            times[job].append(cpu_seconds(job, often[job]))
    return times[ours], times[theirs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="rows whose name begins so")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a row, about")
    parser.add_argument("--out", type=Path, help="a .json of the rows")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kept = []
    print(f"{'':76s}{'theirs':>9s}{'ours':>9s}  theirs/ours")
    for rows in ROWS:
        for name, ours, theirs in rows():
            if not name.startswith(asked.only):
                continue
            mine, other = compare(ours, theirs, asked.rounds, asked.seconds)
            ratios = [b / a for a, b in zip(mine, other, strict=True)]
            low, high = interval(ratios)
            middle = statistics.median(ratios)
            print(
                f"{name:76s}{1e3 * statistics.median(other):7.3g}ms"
                f"{1e3 * statistics.median(mine):7.3g}ms  {middle:.2f} [{low:.2f}, {high:.2f}]"
                f"{'  loses' if high < 0.95 else ''}",
                flush=True,
            )
            row = {"name": name, "theirs": statistics.median(other)}
            row |= {"ours": statistics.median(mine), "ratio": middle, "low": low, "high": high}
            kept.append(row)
    if asked.out is not None:
        found = {
            "threads": 1,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "versions": {"imu_fast": imu.__version__, "torch": torch.__version__},
            "unit": "CPU seconds",
            "rows": kept,
        }
        with replacing(asked.out) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
