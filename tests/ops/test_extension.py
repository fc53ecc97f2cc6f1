"""The compiled module: which one is taken, and on whose threads it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

import imu_fast
from imu_fast.ops import extension
from imu_fast.ops.squared_products import add_squared_products
from imu_fast.solvers.cholesky import lapack

needed = pytest.mark.skipif(extension.load() is None, reason="no compiled module")


@needed
def test_a_module_of_another_version_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(imu_fast, "_C", types.ModuleType("_C"))
    monkeypatch.setitem(sys.modules, "imu_fast._C", imu_fast._C)
    caches = (extension.load, lapack.extension)
    for cache in caches:
        cache.cache_clear()
    try:
        with caplog.at_level("INFO", "imu_fast"):
            assert extension.load() is None and lapack.extension() is None
        assert "another version" in caplog.text
    finally:
        for cache in caches:
            cache.cache_clear()


@needed
@pytest.mark.parametrize("whose", ["torch's", "its own"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(whose, threads):
    """Torch's own come and go between, in teams of other sizes."""
    module, run = extension.load(), extension.openmp()
    if whose == "torch's" and not run:
        pytest.skip("torch has no OpenMP that exports GOMP_parallel")
    x, y = torch.randn(3, 40, 65, dtype=torch.float64), torch.randn(3, 40, 300, dtype=torch.float64)
    want = torch.einsum("ntr,ntk->nrk", x, y).square().sum(dim=0)
    a = torch.randn(7, 30, 30, dtype=torch.float64)
    a = a @ a.mT
    b = torch.randn(7, 30, dtype=torch.float64)
    solved = torch.linalg.solve(a + 0.5 * torch.eye(30, dtype=torch.float64), b)
    before = torch.get_num_threads()
    module.use_openmp(run if whose == "torch's" else 0)
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            total = torch.zeros_like(want)
            add_squared_products(total, x, y)
            torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)
            found = imu_fast.damped_cholesky_solve(a, b, 0.5)
            torch.testing.assert_close(found, solved, rtol=1e-9, atol=1e-9)
            torch.randn(1 << 18).exp_()
    finally:
        torch.set_num_threads(before)
        module.use_openmp(run)


FORKED = """
import os, signal, torch
import imu_fast as imu
from imu_fast.ops.squared_products import add_squared_products
torch.set_num_threads(2)
a = torch.eye(30).expand(6, 30, 30)
x = torch.ones(3, 40, 65)

def both():
    add_squared_products(torch.zeros(65, 65), x, x)
    return float(imu.damped_cholesky_solve(a, torch.ones(6, 30), 1.0).sum())

torch.randn(1 << 20).exp()
there = both()
child = os.fork()
if not child:
    signal.alarm(20)
    os._exit(both() != there)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_with_openmp_lends_its_threads():
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("no OpenMP, or none that is known to export GOMP_parallel")
    assert extension.openmp()
