"""Samples shared among two processes: everything that is a sum equals that of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, head_factors

import imu_fast as imu
from imu_fast.errors import InputError

PROCESS = """
import sys
import torch
import torch.distributed as dist
from cases import CASES, head_factors
import imu_fast as imu
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import InputError
from imu_fast.factors import implicit_head
from imu_fast.factors.statistics import mean_gradient

torch.set_num_threads(1)
rank, world, store = int(sys.argv[1]), 2, sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

def same(a, b, what):
    bound = 1e-7 * float(b.abs().max())
    torch.testing.assert_close(a, b, rtol=1e-7, atol=bound, msg=lambda m: f"{what}: {m}")

def refused(call, message):
    try:
        call()
    except InputError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")

# A group that is there is not used by factors that say nothing of it: the other does not answer.
whole = head_factors(CASES[8])
if rank == 0:
    imu.influence_scores(whole)
    mean_gradient(whole)

for case in (CASES[1], CASES[2], CASES[7], CASES[8]):
    whole = head_factors(case)
    local = whole.shard(rank, world)
    shared = imu.ShardedFactors(local)
    first, last = whole.n * rank // world, whole.n * (rank + 1) // world
    assert (shared.n, shared.n_here, shared.num_tokens) == (whole.n, local.n, whole.num_tokens)
    same(mean_gradient(shared), mean_gradient(whole), "mean gradient")
    same(shared.mean_gradient(), whole.mean_gradient(), "mean gradient")
    same(shared.fisher_diagonal(), whole.fisher_diagonal(), "Fisher diagonal")
    v = torch.linspace(-1, 1, whole.num_classes * whole.width, dtype=torch.float64)
    v = v.view(whole.num_classes, whole.width)
    # Signals that are made where they are needed, of as few outputs as the processes agree on.
    implicit_head._FEWEST_CLASSES, implicit_head._TILE_BYTES = 2 + rank, 1
    p = case.make(torch.float64)
    operands = p.act, p.weight, p.bias, p.labels, p.offsets
    made = imu.GradientFactors.from_head(*operands, implicit=True).shard(rank, world)
    made = imu.ShardedFactors(made)
    assert made.outputs_at_once == 2
    same(mean_gradient(made), mean_gradient(whole), "implicit mean gradient")
    same(made.fisher_diagonal(), whole.fisher_diagonal(), "implicit Fisher diagonal")
    for name in ("fisher_diag", "identity", "kfac"):
        truth = imu.influence_scores(whole, curvature=name)[first:last]
        same(imu.influence_scores(made, curvature=name), truth, f"implicit {name}")
        truth = imu.self_influence(whole, curvature=name)[first:last]
        same(imu.self_influence(made, curvature=name), truth, f"implicit {name}")
    for name in CURVATURES:
        for solver in ("auto", "primal", "cg") if name == "ggn" else (None,):
            has = CURVATURES[name].paths()
            tolerance = 1e-9 if "tolerance" in has else None
            spec = CURVATURES.choose(name, solver=solver, tolerance=tolerance)
            if name == "fisher":
                refused(lambda: imu.fit(spec, shared), "needs all samples in one process")
                continue
            one, all_ = imu.fit(spec, shared), imu.fit(spec, whole)
            same(one @ v, all_ @ v, name)
            same(one.solve(v), all_.solve(v), name)
            scores = imu.influence_scores(shared, curvature=spec)
            same(scores, imu.influence_scores(whole, curvature=spec)[first:last], name)
            found = one.pairwise(shared, whole)
            same(found, all_.pairwise(whole, whole)[first:last], name)
            refused(lambda: one.pairwise(shared, shared), "queries are shared among processes")
            if solver in ("cg", "auto"):  # one solve per sample
                continue
            same(one.self_influence(shared), all_.self_influence(whole)[first:last], name)
    refused(lambda: imu.fit(imu.GGN(solver="dual"), shared), "shared among processes")
    by_solves = imu.fit(imu.GGN(solver="cg"), shared)
    refused(lambda: by_solves.self_influence(shared), "processes that share samples")
    refused(lambda: imu.influence_scores(shared, first_row_is_mean=True), "shared")
other = head_factors(CASES[1 + rank])
refused(lambda: imu.ShardedFactors(other), "capture all from the same model")
dist.destroy_process_group()
print("both agree")
"""


def test_two_processes_equal_one(tmp_path):
    tests = Path(__file__).resolve().parents[1]
    path = f"import sys; sys.path.insert(0, {str(tests)!r})\n"
    command = [sys.executable, "-c", path + PROCESS]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0 and "both agree" in out, errors[-3000:]
    finally:
        for process in running:
            process.kill()


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
