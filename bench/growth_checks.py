"""One job of bench/growth.py, run and measured in processes of its own, one thread each.

``measured(job)`` starts them. Each measures this machine's rates first, then the job: seconds of
its thread, which other work on the machine stretches little and which wait for no disk, and
anonymous resident memory above what the process had after its imports and a first small call,
inputs included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from growth_model import BATCH, EPOCHS, NARROW, Job
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.check.counts import Ceilings
from imu_fast.ops.softmax_residual import linear_logits

_FILE = 1 << 28  # bytes read to measure the disk
_ROWS = 1 << 16  # of features made at once
_REPEATED = 1.0  # seconds: what takes less is run again, and the fastest counts
DAMPING = 1e-2


def anonymous() -> int:
    """Bytes of this process's memory that belong to no file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) << 10


class Peak:
    """The most anonymous memory while it is entered, above what there was before."""

    def __enter__(self) -> Peak:
        self.before = self._top = anonymous()
        self._on = True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while self._on:
            self._top = max(self._top, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()
        self.bytes = max(self._top, anonymous()) - self.before


def best(work: Callable[[], object], times: int) -> float:
    """Seconds of this thread."""
    found = []
    for _ in range(times):
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return min(found)


def dropped(path: str | Path) -> None:
    """Have the system forget what it holds of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: str) -> float:
    """Bytes a second of a sum over a mapped file that is in no cache, of wall."""
    path = Path(folder) / "disk"
    np.zeros(_FILE // 4, np.float32).tofile(path)
    dropped(path)
    start = time.perf_counter()
    float(torch.from_numpy(np.memmap(path, np.float32, "r+")).sum())
    seconds = time.perf_counter() - start
    path.unlink()
    return _FILE / seconds


def work_rates() -> Ceilings:
    """Of a copy, of products, of exponentials and of eigenvectors."""
    source = torch.zeros(1 << 24)
    copy, x = torch.empty_like(source), torch.rand(1 << 18)
    out = torch.empty_like(x)
    narrow, wide = (torch.rand(512, 512, dtype=k) for k in (torch.float32, torch.float64))
    squares = wide[:384, :384] @ wide[:384, :384].T
    flops = {
        "fp32": 2 * 512**3 / best(lambda: narrow @ narrow, 9),
        "fp64": 2 * 512**3 / best(lambda: wide @ wide, 9),
        "exp": x.numel() / best(lambda: torch.exp(x, out=out), 20),
        "eigh": 10 * len(squares) ** 3 / best(lambda: torch.linalg.eigh(squares), 3),
    }
    return Ceilings(2 * source.nbytes / best(lambda: copy.copy_(source), 9), flops)


def narrow_share() -> float:
    """The rate of products with NARROW columns over that of squares."""
    square, rows, columns = (torch.rand(k, 512) for k in (512, 8192, NARROW))
    full = 512 / best(lambda: square @ square, 15)
    return 8192 * NARROW / 512 / best(lambda: linear_logits(rows, columns, None), 15) / full


def data(n: int, classes: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, weight, bias and labels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, d, generator=generator).div_(d**0.5)
    x = torch.randn(n, d, generator=generator)
    return x, weight, torch.zeros(classes), torch.randint(classes, (n,), generator=generator)


def spec(method: str) -> Any:
    """The curvature: of a GGN by conjugate gradient alone."""
    if method == "ggn":
        return imu.GGN(damping=DAMPING, solver="cg", preconditioner="none")
    return {"fisher_diag": imu.FisherDiag, "kfac": imu.KFAC}[method](damping=DAMPING)


def ascended(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, **options: Any) -> None:
    """A run of plain ascent at this head."""
    model = nn.Linear(*weight.shape[::-1], device="meta")
    model.weight, model.bias = nn.Parameter(weight), nn.Parameter(bias)
    options = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 1e-6} | options
    imu.unlearn(model, (x, y), "uniform", **options)


def iterations_of(factors: Any) -> int:
    fitted = imu.fit(spec("ggn"), factors)
    fitted.solve(factors.mean_gradient())
    return fitted.iterations


def fixed_costs() -> dict[str, float]:
    """Seconds of each method with next to nothing to do, and of an iteration and a step."""
    x, weight, bias, y = data(64, 4, 8)

    def score(method: str) -> Callable[[], object]:
        def run() -> None:
            factors = imu.GradientFactors.from_head(x, weight, bias, y)
            imu.influence_scores(factors, curvature=spec(method))

        return run

    found = {method: best(score(method), 9) for method in ("fisher_diag", "kfac")}
    iterations = iterations_of(imu.GradientFactors.from_head(x, weight, bias, y))
    found["ggn"] = found["fisher_diag"]
    found["iteration"] = max(0.0, best(score("ggn"), 9) - found["ggn"]) / iterations
    few, many = (best(lambda k=k: ascended(x, weight, bias, y, batch_size=k), 5) for k in (64, 4))
    found["step"] = max(0.0, many - few) / (EPOCHS * 15)
    found["ascent"] = max(0.0, few - EPOCHS * found["step"])
    return found


def _written(job: Job, folder: str) -> None:
    """A file of features, which the system may hold in memory."""
    path, generator = Path(folder) / "features", torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        for start in range(0, job.n, _ROWS):
            rows = min(_ROWS, job.n - start)
            torch.randn(rows, job.d, generator=generator).numpy().tofile(file)


def _inputs(job: Job, folder: str, rank: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """This process's share."""
    first, last = (job.n * k // job.devices for k in (rank, rank + 1))
    if not job.mapped:
        return data(last - first, job.classes, job.d, rank)
    x = np.memmap(Path(folder) / "features", np.float32, "r", shape=(job.n, job.d))[first:last]
    _, weight, bias, _ = data(1, job.classes, job.d)
    return x, weight, bias, torch.arange(len(x)) % job.classes


def _run(job: Job, folder: str, rank: int) -> dict[str, Any]:
    group = dist.group.WORLD if job.devices > 1 else None
    exchanged = 0
    if group is not None:
        real = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            nonlocal exchanged
            exchanged += tensor.nbytes if tensor.numel() > 3 else 0  # those 3 say what comes
            return real(tensor, *args, **options)

        dist.all_reduce = counted

    def run(x: Any, weight: Tensor, bias: Tensor, y: Tensor) -> Any:
        if job.method == "ascent":
            return ascended(x, weight, bias, y)
        factors: Any = imu.GradientFactors.from_head(x, weight, bias, y)
        factors = factors if group is None else imu.ShardedFactors(factors)
        scores = imu.influence_scores(factors, curvature=spec(job.method))
        assert bool(torch.isfinite(scores).all())
        return factors

    with Peak() as peak:
        inputs = _inputs(job, folder, rank)
        seconds = best(lambda: run(*inputs), 1)
    found: dict[str, Any] = {"seconds": seconds, "memory": peak.bytes, "exchanged": exchanged}
    if seconds < _REPEATED and group is None:
        found["seconds"] = min(seconds, best(lambda: run(*inputs), 5))
    if job.method == "ggn":
        found["iterations"] = iterations_of(run(*inputs))
    return found


def _link_rate() -> float:
    """Bytes a second into and out of a process that sums with another."""
    x = torch.zeros(1 << 24)
    dist.all_reduce(x)
    start = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(x)
    return 3 * x.nbytes / (time.perf_counter() - start)


def child(job: Job, folder: str, rank: int) -> dict[str, Any]:
    """Rates, then the job."""
    torch.set_num_threads(1)
    if job.devices > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.devices)
    work = work_rates()
    rates: dict[str, Any] = {"bytes": work.bytes_per_second, "flops": work.flops_per_second}
    rates["fixed"] = fixed_costs()
    rates["disk"] = disk_rate(folder) if job.mapped and rank == 0 else None
    rates["link"] = _link_rate() if job.devices > 1 else None
    return {"rates": rates, **_run(job, folder, rank)}


def measured(job: Job) -> dict[str, Any]:
    """What the first process of the job found; memory is the largest of all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        if job.mapped:
            _written(job, folder)
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, json.dumps(asdict(job)), folder, rank],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in map(str, range(job.devices))
        ]
        said = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit(f"{job} failed")
    found: list[dict[str, Any]] = [json.loads(text.strip().splitlines()[-1]) for text in said]
    return found[0] | {"memory": max(one["memory"] for one in found)}


if __name__ == "__main__":
    asked, where, place = sys.argv[1:]
    print(json.dumps(child(Job(**json.loads(asked)), where, int(place))), flush=True)
    os._exit(0)  # threads of gloo may wait for another process
