"""Two kills; ``python tests/fuzz/kills.py 20`` makes more, of every job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_runs_end_as_one_in_peace():
    jobs = ["score", "unlearn, head"]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "kills.py", "1", *jobs],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [f"| {job} | 1 |" in done.stdout for job in jobs] == [True] * 2
