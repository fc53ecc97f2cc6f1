"""Runs that are killed, wherever they are, and go on: ``python tests/fuzz/kills.py 20 [JOB ...]``.

Each job is run once in peace. Then it is started over and over again in one folder and killed
(SIGKILL, its whole process group) after a random part of the time that it took, until it ends by
itself; that anew in other folders, until so many kills were made. Every end is compared with the
first one, bit by bit; what was measured of time is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import imu_fast as imu
from imu_fast.cli import chunks
from imu_fast.cli.app import app
from imu_fast.study import comparison
from imu_fast.study.configuration import Configuration

Job = Callable[[Path], Any]
SAMPLES = 600


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(12, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).eval()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 3, 2, 2, generator=generator)
    return x, torch.arange(SAMPLES) % 3


def score(folder: Path) -> Any:
    """``imu-fast score --checkpoint``."""
    sys.path.insert(0, str(folder))
    (folder / "killed_arch.py").write_text("from kills import network as make\n")
    torch.save(network().state_dict(), folder / "weights.pt")
    x, y = data()
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
    chunks.SAMPLES = 32
    files = ["--weights", folder / "weights.pt", "--data", folder / "data.npz"]
    out = ["--checkpoint", folder / "parts", "--out", folder / "scores.npz", "--force"]
    how = ["--batch-size", 4, "--curvature", "kfac", "--self-influence"]
    command = ["score", "--arch", "killed_arch:make", *files, *how, *out]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        app([str(part) for part in command], standalone_mode=False)
    with np.load(folder / "scores.npz") as found:
        return {
            name: found[name].tolist() for name in found.files if found[name].dtype.kind in "fiU"
        }


def unlearning(**how: Any) -> Job:
    """``imu.unlearn``; with a checkpoint where there are epochs to go on from."""

    def job(folder: Path) -> Any:
        model = network()
        more = {} if how["method"] == "margin_edit" else {"checkpoint": folder / "run.safetensors"}
        result = imu.unlearn(model, data(), seed=1, progress=False, **more, **how)
        state = {name: value.tolist() for name, value in result.model.state_dict().items()}
        steps = {"steps": result.steps, "trajectory": result.trajectory}
        return {"state": state, "losses": result.batch_losses, **steps}

    return job


def compare(folder: Path) -> Any:
    """``imu-fast compare`` of digits, as small as can be."""
    given = {"archs": "resnet", "seeds": 1, "epochs": 2, "train": 200, "max_steps": 20}
    given |= {"tasks": "random-10", "methods": ["auto", "imu/head/eval"], "workers": 1}
    results = comparison.run(Configuration.of(given), folder, progress=False)
    return without_times(json.loads(json.dumps(results)))


def without_times(value: Any) -> Any:
    """Of json."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "seconds" not in k}
    return [without_times(v) for v in value] if isinstance(value, list) else value


ASCENT = {"method": "imu", "lr": 0.01, "optimizer": torch.optim.Adam, "batch_size": 16}
JOBS: dict[str, Job] = {
    "score": score,
    "unlearn, head": unlearning(**ASCENT, epochs=30),
    "unlearn, a layer": unlearning(**ASCENT, epochs=8, scope="layers", layers=["1"]),
    "unlearn, all": unlearning(**ASCENT, epochs=8, scope="all", batchnorm="train"),
    "unlearn, margin edit": unlearning(method="margin_edit"),
    "compare": compare,
}


def started(job: Job, folder: Path) -> int:
    """The process that does a job, and writes what came of it."""
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        (folder / "end.part").write_text(json.dumps(job(folder)))
        (folder / "end.part").rename(folder / "end")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, within: float | None = None) -> bool:
    """Whether it ends by itself within so many seconds; otherwise it is killed."""
    until = None if within is None else time.monotonic() + within
    while True:
        found, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if found:
            if code := os.waitstatus_to_exitcode(status):
                raise SystemExit(f"a job ended with {code}")
            return True
        if until is not None and time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def killed(job: Job, kills: int, rng: random.Random) -> tuple[int, int]:
    """Kills made, and runs that ended after some, each with what the run in peace ended with."""
    with tempfile.TemporaryDirectory() as peace:
        start = time.monotonic()
        ended(started(job, Path(peace)))
        took = time.monotonic() - start
        truth = (Path(peace) / "end").read_text()
    made = runs = 0
    while made < kills:
        with tempfile.TemporaryDirectory() as folder:
            while made < kills and not ended(started(job, Path(folder)), rng.random() * took):
                made += 1
            if not (Path(folder) / "end").exists():
                ended(started(job, Path(folder)))
            found = (Path(folder) / "end").read_text()
            if found != truth:
                raise SystemExit("another result after a kill")
            runs += 1
    return made, runs


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    print("| job | kills | runs that ended after them, all as the one in peace |")
    print("| --- | --- | --- |")
    for name in sys.argv[2:] or JOBS:
        made, runs = killed(JOBS[name], kills, random.Random(0))
        print(f"| {name} | {made} | {runs} |", flush=True)


if __name__ == "__main__":
    main()
