"""Samples shared among processes: sums are over all of them, scores of the samples that are here.

torchrun --nproc-per-node 2 examples/torchrun_scores.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import imu_fast as imu


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # "nccl" where each process has a GPU
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same model everywhere, and here the same data
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    x, y = torch.randn(101, 8).double(), torch.arange(101) % 4
    mine = slice(101 * rank // world, 101 * (rank + 1) // world)

    shared = imu.capture(model, (x[mine], y[mine]), group=dist.group.WORLD)
    for curvature in ("fisher_diag", "kfac", "ggn"):
        scores = imu.influence_scores(shared, curvature=curvature)
        alone = imu.influence_scores(model, (x, y), curvature=curvature)[mine]
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-6)
        print(f"process {rank}: {curvature}, {len(scores)} scores of {shared.n}: as in one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
