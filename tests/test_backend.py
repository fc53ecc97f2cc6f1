"""Which backend is chosen: what is there, who decides, and what is recorded."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading

import pytest
import torch

import imu_fast as imu
from imu_fast import backend
from imu_fast.errors import BackendUnavailableError, InputError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("IMU_FAST_BACKEND", raising=False)


def test_what_is_there():
    found = imu.backends()
    assert list(found) == ["reference", "torch", "triton", "extension", "cuda"]
    assert all(name == info.name and info.reason for name, info in found.items())
    assert found["reference"].available and found["torch"].available
    assert torch.__version__ in found["torch"].reason
    if not torch.cuda.is_available():
        assert not found["cuda"].available
        assert found["triton"].available == backend.interpreted()
    why = backend.why_no_triton()
    assert why == ("" if found["triton"].available else found["triton"].reason)


def test_the_argument_is_over_the_environment_over_automatic(monkeypatch):
    assert backend.current_backend() == "auto"
    monkeypatch.setenv("IMU_FAST_BACKEND", "torch")
    assert backend.current_backend() == "torch"
    with imu.use_backend("reference"):
        assert backend.current_backend() == "reference"
        with imu.use_backend("auto"):
            assert backend.current_backend() == "auto"
        assert backend.current_backend() == "reference"
    assert backend.current_backend() == "torch"
    with pytest.raises(ZeroDivisionError), imu.use_backend("reference"):
        raise ZeroDivisionError
    assert backend.current_backend() == "torch"


@pytest.mark.parametrize("name", ["quick", "", "Torch"])
def test_an_unknown_name_lists_those_that_are_known(name, monkeypatch):
    known = "is unknown; choose one of auto, reference, torch, triton"
    with pytest.raises(InputError, match=f"^backend='{name}' {known}$"):
        with imu.use_backend(name):
            raise AssertionError
    monkeypatch.setenv("IMU_FAST_BACKEND", name)
    with pytest.raises(InputError, match=f"^IMU_FAST_BACKEND='{name}' {known}$"):
        backend.current_backend()


def test_the_compiled_modules_are_no_backend_of_operations():
    for name in ("extension", "cuda"):
        with pytest.raises(InputError, match=f"backend='{name}' is unknown"):
            with imu.use_backend(name):
                pass


def test_a_backend_that_cannot_run_is_refused_with_the_remedy(monkeypatch):
    gone = backend.BackendInfo("triton", False, "no CUDA device")
    monkeypatch.setattr(backend, "_triton", lambda: gone)
    message = "^backend='triton' cannot run here: no CUDA device; use 'torch' or 'auto'$"
    with pytest.raises(BackendUnavailableError, match=message):
        with imu.use_backend("triton"):
            raise AssertionError
    assert backend.current_backend() == "auto"
    there = backend.BackendInfo("triton", True, "3.6")
    monkeypatch.setattr(backend, "_triton", lambda: there)
    with imu.use_backend("triton"):
        assert backend.current_backend() == "triton"
    assert backend.why_no_triton() == ""


def test_records_are_of_their_body_and_of_those_within():
    backend.record("before", "torch")
    with backend.record_backends() as outer:
        backend.record("a", "torch")
        with backend.record_backends() as inner:
            backend.record("b", "reference")
        backend.record("a", "triton")
    backend.record("after", "torch")
    assert outer == {"a": "torch, triton", "b": "reference"} and inner == {"b": "reference"}


def test_a_choice_is_of_its_context():
    """Other threads, and tasks that began before, choose for themselves."""
    found = []
    before = contextvars.copy_context()
    with imu.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(backend.current_backend()))
        thread.start()
        thread.join()
        found.append(before.run(backend.current_backend))
    assert found == ["auto", "auto"]


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), (None, False)])
def test_interpreted(value, expected, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backend.interpreted() is expected


MISSING = """
import sys
sys.modules["triton"] = None
sys.modules["imu_fast._C"] = sys.modules["imu_fast._C_cuda"] = None
import imu_fast as imu
found = imu.backends()
for name, said in {
    "triton": "triton does not import",
    "extension": "imu_fast._C does not load",
    "cuda": "imu_fast._C_cuda does not load",
}.items():
    assert not found[name].available and found[name].reason.startswith(said), found
"""


def test_what_does_not_load_says_so():
    subprocess.run([sys.executable, "-c", MISSING], check=True, timeout=120)
