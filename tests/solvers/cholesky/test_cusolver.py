"""What is particular to CUDA: routes, streams, no waiting; and what is said without a GPU."""

from __future__ import annotations

import logging

import cuda_stand_in
import pytest
import torch

import imu_fast as imu
from imu_fast.solvers.cholesky import cusolver
from imu_fast.solvers.cholesky.cholesky import damped_cholesky

needs_gpu = pytest.mark.skipif(
    not imu.backends()["cuda"].available, reason=imu.backends()["cuda"].reason
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    "shape, routes",
    [
        ((2, 40, 40), set()),
        ((2, 41, 41), {"batched"}),
        ((2, 512, 512), {"batched"}),
        ((41, 41), {"one by one"}),
        ((2, 513, 513), {"one by one"}),
    ],
    ids=str,
)
def test_routes(monkeypatch, shape, routes):
    solver = cuda_stand_in.install(monkeypatch)
    damped_cholesky(torch.eye(shape[-1]).expand(shape), 1.0).solve(torch.ones(shape[:-1]))
    assert solver.routes == routes


def test_without_cusolver_only_small_matrices_are_taken(monkeypatch, caplog):
    class OnCuda:
        device = torch.device("cuda:0")
        dtype, shape = torch.float32, (64, 64)

    monkeypatch.setattr(cusolver, "_small", lambda device: {torch.float32: 64})
    monkeypatch.setattr(cusolver, "find_cusolver", lambda: (None, "no libcusolver.so.12"))
    cusolver._has_cusolver.cache_clear()
    assert cusolver.can_factor(OnCuda())
    OnCuda.shape = (65, 65)
    with caplog.at_level(logging.WARNING):
        assert not cusolver.can_factor(OnCuda()) and not cusolver.can_factor(OnCuda())
    assert caplog.text.count("cuSOLVER not found (no libcusolver.so.12)") == 1
    monkeypatch.setattr(cusolver, "_small", lambda device: None)
    assert not cusolver.can_factor(OnCuda())
    cusolver._has_cusolver.cache_clear()


@pytest.mark.parametrize(
    "version, name", [("13.0", "libcusolver.so.12"), ("12.8", "libcusolver.so.11")]
)
def test_the_library_of_torchs_own_cuda_is_looked_for(monkeypatch, version, name):
    monkeypatch.setattr(torch.version, "cuda", version)
    *beside, last = cusolver._libraries()
    assert last == name and all(path.endswith(f"/lib/{name}") for path in beside)


def test_a_torch_without_cuda_has_no_library(monkeypatch):
    pytest.importorskip("imu_fast._C_cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    cusolver.find_cusolver.cache_clear()
    assert cusolver.find_cusolver() == (None, "torch is built without CUDA")
    cusolver.find_cusolver.cache_clear()


def test_errors_of_the_loader_carry_its_text_file_and_line():
    module = pytest.importorskip("imu_fast._C_cuda")
    with pytest.raises(RuntimeError, match=r"libabsent\.so: cannot open.*cusolver\.cpp:\d+\)"):
        module.Cusolver("libabsent.so")
    with pytest.raises(RuntimeError, match=r"cusolverDnCreate.*cusolver\.cpp:\d+\)"):
        module.Cusolver("libc.so.6")


@needs_no_gpu
def test_without_a_device_every_call_raises_cudas_text(caplog):
    """Which shows, too, that the arguments which are passed are those that are taken."""
    module = pytest.importorskip("imu_fast._C_cuda")
    where, text = (0, 0), r"cuda.*: cudaError\w+, .+ \(.*csrc/\w+\.\w+:\d+\)"
    for kind in ("f32", "f64"):
        calls = [
            (f"small_factor_{kind}", 0, 0, 1, 1, 1.0, 0, *where),
            (f"small_solve_{kind}", 0, 1, 1, 0, 1, *where),
            (f"largest_small_order_{kind}", 0),
        ]
        for name, *arguments in calls:
            with pytest.raises(RuntimeError, match=text):
                getattr(module, name)(*arguments)
        solver, reason = cusolver.find_cusolver()
        if solver is None:
            pytest.skip(reason)
        calls = [
            (f"workspace_{kind}", 1, *where),
            (f"factor_{kind}", 0, 1, 1, 1.0, 0, 0, 0, *where),
            (f"factor_batched_{kind}", 0, 1, 1, 1.0, 0, 0, *where),
            (f"solve_{kind}", 0, 1, 1, 0, 1, 0, *where),
        ]
        for name, *arguments in calls:
            with pytest.raises(RuntimeError, match=text):
                getattr(solver, name)(*arguments)
    cusolver._small.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert cusolver._small(0) is None
    assert "cannot run (cuda" in caplog.text and "torch factors instead" in caplog.text


# A size on each route: small, batched, one by one.
ON_EVERY_ROUTE = [(8, 129, 129), (8, 400, 400), (1024, 1024)]


@needs_gpu
@pytest.mark.parametrize("shape", ON_EVERY_ROUTE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_unchecked_solve_does_not_wait_for_the_device(shape, dtype):
    x = torch.randn(shape, dtype=dtype, device="cuda")
    a, b = x @ x.mT / shape[-1], torch.randn(*shape[:-1], 3, dtype=dtype, device="cuda")
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        # Handles and memory are had at a stream's first call, which may wait.
        expected = imu.damped_cholesky_solve(a, b, 0.1)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # for torch's own operations
        try:
            torch.cuda._sleep(1_000_000_000)
            done.record()
            found = imu.damped_cholesky_solve(a, b, 0.1, check=False)
            assert not done.query(), "the call returned only when the device was done"
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.testing.assert_close(found, expected)


@needs_gpu
@pytest.mark.parametrize("shape", ON_EVERY_ROUTE, ids=str)
def test_streams_and_threads_do_not_disturb_each_other(shape):
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(shape, device="cuda")
    a, b = x @ x.mT / shape[-1], torch.randn(shape[:-1], device="cuda")
    expected = imu.damped_cholesky_solve(a, b, 0.1)
    torch.cuda.synchronize()

    def work(index):
        # Two of the four share a stream.
        with torch.cuda.stream(streams[index % 3]):
            return [imu.damped_cholesky_solve(a, b, 0.1) for _ in range(20)]

    streams = [torch.cuda.Stream() for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            for one in found:
                torch.testing.assert_close(one, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("shape", ON_EVERY_ROUTE, ids=str)
def test_another_device_than_the_current_one(shape):
    x = torch.randn(shape, dtype=torch.float64, device="cuda:1")
    a, b = x @ x.mT / shape[-1], torch.randn(shape[:-1], dtype=torch.float64, device="cuda:1")
    found = imu.damped_cholesky_solve(a, b, 0.1)
    assert torch.cuda.current_device() == 0
    truth = imu.damped_cholesky_solve(a.cpu(), b.cpu(), 0.1)
    torch.testing.assert_close(found.cpu(), truth)
