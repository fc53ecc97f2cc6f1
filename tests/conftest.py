"""Fixtures that every test has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_configure(config):
    """Workers side by side have a thread each, and so have the processes that they start."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _look_through_the_language_once()


def _look_through_the_language_once():
    """Once a launch: Triton's interpreter goes through all of its language anew at every call of a
    helper, to patch what it has patched already; that is a quarter of its time."""
    language = pytest.importorskip("triton.language")
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(fn):
        modules = [m for m in fn.__globals__.values() if m is language or m is language.core]
        if any(language.core.is_builtin(module.load) for module in modules):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_is_full_of_nan():
    """Make every ``torch.empty`` NaN, so that reading unwritten memory fails a comparison."""
    fill, mode = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data, or a skip that says why: IMU_FAST_DATA, else beside the repository."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("IMU_FAST_DATA", root.parent / "shared" / "data"))
    if not (path / "cifar10_jpeg.npz").is_file():
        pytest.skip(f"no cifar10_jpeg.npz in {path}; set IMU_FAST_DATA")
    return path
