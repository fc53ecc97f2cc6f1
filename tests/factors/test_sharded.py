"""Samples shared among processes: every call gives what one process gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, head_factors

import imu_fast as imu
from imu_fast.errors import InputError

PROCESSES = Path(__file__).resolve().parents[1] / "processes.py"


@pytest.mark.parametrize("world", [2, 4])
def test_processes_equal_one(tmp_path, world):
    """Walked through in processes.py: every call, what is refused, and what fails in one."""
    command = [sys.executable, "-W", "ignore", str(PROCESSES), str(world), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_without_processes_it_says_how_to_get_them():
    with pytest.raises(InputError, match="no process group.*torchrun.*init_process_group"):
        imu.ShardedFactors(head_factors(CASES[1]))


def test_sums_over_a_single_process_and_of_strided_tensors(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        f = head_factors(CASES[1])
        shared = imu.ShardedFactors(f)
        total = shared.sums(lambda chunk: (chunk.delta.t() @ chunk.act).t())
        torch.testing.assert_close(total, (f.delta.t() @ f.act).t())
        assert torch.equal(imu.influence_scores(shared), imu.influence_scores(f))
    finally:
        torch.distributed.destroy_process_group()
