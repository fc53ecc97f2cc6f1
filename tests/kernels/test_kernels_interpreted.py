"""Every Triton kernel against reference.py, under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_agree_with_the_reference_under_the_interpreter():
    """kernels_interpreted.py with TRITON_INTERPRET=1, which is read when kernels import."""
    pytest.importorskip("triton")
    file = Path(__file__).with_name("kernels_interpreted.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
