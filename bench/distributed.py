"""What processes gain, and what memory a large set takes: ``python bench/distributed.py [PART]``.

``speed``: scores under the GGN by conjugate gradient, 2 processes beside one, a thread each.
``million``: a million samples scored from a mapped file, from a loader, and by two processes.
``small``: factors in memory scored under ``kfac`` and ``fisher``, beside what the factors take.

Memory is anonymous resident memory (RssAnon), sampled while a call runs, above what the process had
after its imports and a first small call; of ``small`` also the most that torch has allocated at
once, which leaves out what the C library keeps of blocks that are free again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

CODE = """
import itertools, json, os, sys, threading, time
import numpy as np
import torch
import torch.distributed as dist
import imu_fast as imu
from torch.profiler import ProfilerActivity, profile

what, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
if world > 1:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
group = dist.group.WORLD if world > 1 else None
small = torch.nn.Linear(4, 2), (torch.randn(6, 4), torch.arange(6) % 2)
for curvature in ("fisher_diag", "kfac"):
    imu.influence_scores(*small, curvature=curvature)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 2**20

class Peak:
    def __enter__(self):
        self.before = self.top = anonymous()
        self.on = True
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self
    def look(self):
        while self.on:
            self.top = max(self.top, anonymous())
            time.sleep(0.005)
    def __exit__(self, *_):
        self.on = False
        self.thread.join()

def made(n, d, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, d, generator=generator) / d**0.5
    x = torch.randn(n, d, generator=generator)
    return x, weight, torch.randint(classes, (n,), generator=generator)

def said(**found):
    print(json.dumps(found), flush=True)

if what == "speed":
    n, d, classes = 50_000, 512, 100
    x, weight, y = made(n, d, classes)
    mine = slice(n * rank // world, n * (rank + 1) // world)
    spec = imu.GGN(solver="cg", damping=1e-3)
    if world > 1:
        dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    factors = imu.GradientFactors.from_head(x[mine], weight, torch.zeros(classes), y[mine])
    if world > 1:
        factors = imu.ShardedFactors(factors)
    scores = imu.influence_scores(factors, curvature=spec)
    seconds = time.perf_counter() - start
    said(seconds=seconds, busy=time.process_time() - busy, first=float(scores[0]))
elif what in ("mapped", "loader"):
    n, d, classes = 1_000_000, 512, 100
    with Peak() as peak:
        x = np.memmap(f"{folder}/x", np.float32, "r", shape=(n, d))
        y = torch.from_numpy(np.load(f"{folder}/y.npy"))
        weight = torch.from_numpy(np.load(f"{folder}/weight.npy"))
        first, last = n * rank // world, n * (rank + 1) // world
        start = time.perf_counter()
        if what == "mapped":
            features = x[first:last]
            factors = imu.GradientFactors.from_head(features, weight, None, y[first:last])
            if world > 1:
                factors = imu.ShardedFactors(factors)
        else:
            model = torch.nn.Linear(d, classes, bias=False)
            model.weight.data = weight
            class Batches:
                def __iter__(self):
                    for i in range(first, last, 4096):
                        rows = slice(i, min(i + 4096, last))
                        yield torch.from_numpy(np.array(x[rows])), y[rows]
            factors = imu.capture(model, Batches(), group=group, max_memory="1.5GiB")
        scores = imu.influence_scores(factors)
        seconds = time.perf_counter() - start
    total = float(scores.double().sum())
    said(seconds=seconds, gib=peak.top - peak.before, n=len(scores), sum=total)
else:
    n, d, classes = 5_000, 2_048, 1_000
    x, weight, y = made(n, d, classes)
    factors = imu.GradientFactors.from_head(x, weight, None, y)
    size = factors.nbytes / 2**30
    del x
    with Peak() as peak:
        start = time.perf_counter()
        scores = imu.influence_scores(factors, curvature=what)
        seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        imu.influence_scores(factors, curvature=what)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    times = (peak.top - peak.before) / size
    said(seconds=seconds, times=times, allocated=max(live) / 2**30 / size, inputs_gib=size)
os._exit(0)
"""


def run(what: str, world: int, folder: str) -> list[dict[str, float]]:
    """What each process says."""
    store = os.path.join(folder, "store")
    if os.path.exists(store):
        os.remove(store)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CODE, what, str(rank), str(world), folder],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    return [json.loads(one.communicate()[0].strip().splitlines()[-1]) for one in started]


def speed(folder: str, repeats: int = 3) -> None:
    """The fastest of several of each, in turn: the machine may have others on it.

    Then seconds of wall tell of these, too; those of the processor leave out who waits.
    """
    one, two = [], []
    for _ in range(repeats):
        one.append(run("speed", 1, folder)[0])
        two.append(run("speed", 2, folder))
    for what in ("seconds", "busy"):
        alone = min(found[what] for found in one)
        both = min(max(found[what] for found in pair) for pair in two)
        clock = "of wall" if what == "seconds" else "of its processor"
        print(
            f"GGN by conjugate gradient, n=50,000, d=512, C=100: {alone:.1f} s {clock} in one "
            f"process, {both:.1f} s in each of two: {alone / both:.2f} times as fast"
        )


def million(folder: str) -> None:
    """A file of 2 GB."""
    import numpy as np

    generator = np.random.default_rng(0)
    n, d, classes = 1_000_000, 512, 100
    with open(os.path.join(folder, "x"), "wb") as file:
        for _ in range(0, n, 50_000):
            generator.standard_normal((50_000, d), np.float32).tofile(file)
    np.save(os.path.join(folder, "y.npy"), generator.integers(classes, size=n))
    weight = generator.standard_normal((classes, d), np.float32) / np.float32(d**0.5)
    np.save(os.path.join(folder, "weight.npy"), weight)
    for what, world in (("mapped", 1), ("loader", 1), ("mapped", 2), ("loader", 2)):
        found = run(what, world, folder)
        each = ", ".join(f"{one['gib']:.2f} GiB in {one['seconds']:.0f} s" for one in found)
        total = sum(one["sum"] for one in found)
        print(f"n=1,000,000, d=512, C=100, {what}, {world} processes: {each} (sum {total:.6g})")


def small(folder: str) -> None:
    """Beside the inputs."""
    for what in ("kfac", "fisher"):
        (found,) = run(what, 1, folder)
        print(
            f"n=5,000, d=2,048, C=1,000, {what}: {found['allocated']:.2f} times the inputs "
            f"({found['inputs_gib']:.3f} GiB) allocated, {found['times']:.2f} resident "
            f"with what the C library keeps, in {found['seconds']:.1f} s"
        )


if __name__ == "__main__":
    parts = {"speed": speed, "million": million, "small": small}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](folder)
