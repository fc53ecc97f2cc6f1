"""Every shipped kernel configuration, compiled ahead of time in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_configuration_compiles_without_spills():
    """kernels_compiled.py without TRITON_INTERPRET, which would replace the compiler."""
    pytest.importorskip("triton", minversion="3.6")
    file = Path(__file__).with_name("kernels_compiled.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
