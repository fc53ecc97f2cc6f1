"""Every Triton kernel against reference.py, under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_agree_with_the_reference_under_the_interpreter():
    """With TRITON_INTERPRET=1, which is read when kernels import: kernels_interpreted.py, and the
    contract of every operation."""
    pytest.importorskip("triton", minversion="3.6")
    here = Path(__file__).parent
    contract = here.parent / "ops" / "test_contract.py::test_kernels_agree_with_the_definition"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(here / "kernels_interpreted.py"), str(contract)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
