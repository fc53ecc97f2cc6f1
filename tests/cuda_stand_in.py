"""imu_fast._C_cuda on CPU tensors, by imu_fast._C: solvers/cusolver.py's routes without a GPU.

What only a GPU can show (the kernels' speed, cuSOLVER itself, streams) this does not.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from imu_fast import _C
from imu_fast.solvers.cholesky import cholesky, cusolver
from imu_fast.solvers.cholesky.lapack import find_lapack

# As if little fitted shared memory, so that the suite's sizes take every route.
SMALL = {torch.float32: 40, torch.float64: 20}
DEVICE, STREAM = 3, 5
DTYPES = {"f32": torch.float32, "f64": torch.float64}
LAPACK = find_lapack()


def small_factor(kind, a, u, batch, n, damping, status, device, stream):
    assert n <= SMALL[DTYPES[kind]] and (device, stream) == (DEVICE, STREAM)
    getattr(_C, f"small_factor_{kind}")(a, u, batch, n, damping, status, 1)


def small_solve(kind, u, batch, n, b, m, device, stream):
    assert (device, stream) == (DEVICE, STREAM)
    getattr(_C, f"small_solve_{kind}")(u, batch, n, b, m, 1)


class Cusolver:
    """As csrc/cusolver.h."""

    def __init__(self):
        self.routes = set()

    def workspace(self, kind, n, device, stream):
        return 8 * n

    def _factor(self, kind, a, batch, n, damping, status):
        potrf = LAPACK.potrf[DTYPES[kind]]
        getattr(_C, f"factor_{kind}")(potrf, 0, a, batch, n, damping, status, 1)

    def factor(self, kind, a, batch, n, damping, status, workspace, size, device, stream):
        assert size == 8 * n and (device, stream) == (DEVICE, STREAM)
        ctypes.memset(workspace, 0xFF, size)
        self.routes.add("one by one")
        self._factor(kind, a, batch, n, damping, status)

    def factor_batched(self, kind, a, batch, n, damping, status, pointers, device, stream):
        assert (device, stream) == (DEVICE, STREAM)
        ctypes.memset(pointers, 0xFF, 8 * batch)
        self.routes.add("batched")
        self._factor(kind, a, batch, n, damping, status)

    def solve(self, kind, u, batch, n, b, m, info, device, stream):
        assert (device, stream) == (DEVICE, STREAM)
        ctypes.memset(info, 0, 4)
        potrs = LAPACK.potrs[DTYPES[kind]]
        getattr(_C, f"solve_{kind}")(potrs, 0, u, batch, n, b, m, 1)


class ByKind:
    """``name_f32`` and ``name_f64`` of ``functions.name``, which takes the kind first."""

    def __init__(self, functions):
        self.functions = functions

    def __getattr__(self, name):
        name, _, kind = name.rpartition("_")
        function = self.functions[name]
        return lambda *arguments: function(kind, *arguments)


def install(monkeypatch):
    """CPU tensors take the CUDA route from now on; returns the Cusolver."""
    solver = Cusolver()
    routes = ("workspace", "factor", "factor_batched", "solve")
    module = ByKind({"small_factor": small_factor, "small_solve": small_solve})
    monkeypatch.setattr("imu_fast._C_cuda", module, raising=False)
    monkeypatch.setitem(sys.modules, "imu_fast._C_cuda", module)
    bound = ByKind({name: getattr(solver, name) for name in routes})
    monkeypatch.setattr(cusolver, "find_cusolver", lambda: (bound, "stand-in"))
    monkeypatch.setattr(cusolver, "_small", lambda device: SMALL)
    monkeypatch.setattr(cusolver, "_where", lambda tensor: (DEVICE, STREAM))
    monkeypatch.setattr(cholesky, "backend_of", lambda a: "cuda")
    return solver
