"""The CUDA kernels' algorithm (csrc/cholesky_block.h) on the CPU, and what nvcc makes of it.

Without a GPU: the text of the kernels, compiled by g++ with a thread for each lane, under
ThreadSanitizer, which reports any two lanes that touch the same memory with no barrier between.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
KIND = {torch.float32: "f32", torch.float64: "f64"}
# Of setup.py's.
ARCHS = ("sm_80", "sm_90")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """cholesky_block_lanes.cpp, compiled."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("lanes") / "lanes"
    source = Path(__file__).with_name("cholesky_block_lanes.cpp")
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread", "-pthread"]
    command = ["g++", *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find" in done.stderr:
        pytest.skip("no ThreadSanitizer for g++")
    assert done.returncode == 0, done.stderr
    return out


def run(program, a, b, damping, lanes=64):
    """U, X and status of one matrix a [P, P] and right-hand sides b [m, P]."""
    order, many = a.shape[-1], b.shape[0]
    # Only the upper triangle may be read.
    upper = torch.where(torch.ones_like(a).triu().bool(), a, torch.nan)
    given = upper.numpy().tobytes() + b.numpy().tobytes()
    command = [str(program), KIND[a.dtype], str(order), str(many), str(lanes), repr(damping)]
    done = subprocess.run(command, input=given, capture_output=True, timeout=300)
    if b"unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr.decode()[:4000]
    size = a.element_size()
    found = torch.frombuffer(bytearray(done.stdout[: (order + many) * order * size]), dtype=a.dtype)
    status = int.from_bytes(done.stdout[-4:], "little")
    return found[: order**2].view(order, order).triu(), found[order**2 :].view(many, order), status


def spd(order, dtype, rank=None):
    x = torch.randn(order, rank or order, dtype=torch.float64)
    return (x @ x.mT / order).to(dtype)


# One; beside and at a block of 16; a warp's columns and one more; what ggn_block has.
@pytest.mark.parametrize("order", [1, 15, 16, 17, 33, 50, 129])
@pytest.mark.parametrize("dtype", KIND, ids=str)
@pytest.mark.parametrize("many", [1, 3])
def test_lanes_factor_and_solve(program, order, dtype, many):
    a, b, damping = spd(order, dtype, rank=max(1, order // 2)), torch.randn(many, order), 1e-2
    u, x, status = run(program, a, b.to(dtype), damping)
    damped = a.double() + damping * torch.eye(order, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert status == 0
    # Backward errors of the factor and of both substitutions: P eps each (Higham 2002, chapter 10).
    wide = u.double()
    assert float((wide.mT @ wide - damped).abs().max()) <= 2 * order * eps * float(damped.max())
    residual = x.double() @ damped - b.to(dtype).double()
    scale = float(damped.norm()) * x.double().norm(dim=1)
    assert bool((residual.norm(dim=1) <= 4 * order * eps * scale).all())


def test_more_right_hand_sides_than_a_tile_and_more_lanes_than_columns(program):
    a, b = spd(20, torch.float64), torch.randn(19, 20, dtype=torch.float64)
    _, x, _ = run(program, a, b, 0.1, lanes=128)
    damped = a + 0.1 * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(x @ damped, b)


@pytest.mark.parametrize("value", [-2.0, 0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 7, 15, 16, 39])
def test_a_bad_pivot_is_reported_and_makes_every_solution_nan(program, at, value):
    a = torch.eye(40)
    a[at, at] = value - 0.5
    _, x, status = run(program, a, torch.randn(1, 40), 0.5)
    assert status == at + 1 and bool(x.isnan().all())


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills_or_local_memory(arch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch={arch}", "-Xptxas=-v"]
    strict = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    source = ROOT / "csrc" / "cholesky_cuda.cu"
    command = [nvcc, *flags, *strict, "-cubin", str(source), "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    used = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    # Four kernels, in two precisions.
    assert len(used) == done.stderr.count("Compiling entry function") == 8
    assert set(used) == {("0", "0", "0")}, done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    # A block of 256 threads has 65,536 registers: twice as many blocks below 128.
    assert max(registers) <= 128
