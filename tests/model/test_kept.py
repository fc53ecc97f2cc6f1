"""Features that a file keeps give the scores of those that memory keeps."""

from __future__ import annotations

import resource
import signal

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError, WriteError
from imu_fast.model import kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scores_of_a_file_are_those_of_memory(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "LEAST", 1)
    monkeypatch.setattr(kept.tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Linear(6, 4).to(dtype)
    x, y = torch.randn(500, 6).to(dtype), torch.arange(500) % 4
    whole, stored = imu.capture(model, (x, y)), imu.capture(model, (x, y), max_memory=2000)
    assert isinstance(stored, imu.ImplicitHead) and torch.equal(stored.features, x)
    assert not list(tmp_path.iterdir())  # it has no name any more
    for curvature in ("fisher_diag", "kfac", "ggn"):
        truth = imu.influence_scores(whole, curvature=curvature)
        found = imu.influence_scores(stored, curvature=curvature)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("much", "number of bytes"),
        ("1e9", "number of bytes"),
        (True, "number of bytes"),
        ("100MB", "at least 536870912"),
        (-1, "at least"),
    ],
)
def test_memory_that_is_no_number_of_bytes_is_refused(value, message):
    data = (torch.randn(4, 3), torch.arange(4) % 2)
    with pytest.raises(InputError, match=message):
        imu.capture(nn.Linear(3, 2), data, max_memory=value)


def test_what_a_file_cannot_hold_is_refused(monkeypatch):
    assert kept.bytes_of("max_memory", " 1.5 GiB") == 3 << 29
    assert kept.bytes_of("max_memory", "9" * 400) > 1 << 1000
    monkeypatch.setattr(kept, "LEAST", 1)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    with pytest.raises(InputError, match="layers='head'"):
        imu.capture(nn.Linear(3, 2), (x, y), "0", max_memory=100)
    cooled = nn.Sequential(nn.Linear(3, 2), nn.Softplus())
    with pytest.raises(InputError, match="more than its features"):
        imu.capture(cooled, (x, y), max_memory=100)
    with pytest.raises(InputError, match="the signal of .*Squared"):
        imu.capture(nn.Linear(3, 2), (x, torch.randn(40, 2)), max_memory=100, loss="squared_error")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    """Of a batch smaller than a block, too, which is refused when its file is closed."""
    monkeypatch.setattr(kept, "LEAST", 1)
    monkeypatch.setattr(kept.tempfile, "tempdir", str(tmp_path))
    batches = [(torch.randn(10, 16), torch.arange(10) % 4) for _ in range(20)]
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12700, limits[1]))  # of 12800
    try:
        with pytest.raises(WriteError, match="max_memory.*TMPDIR"):
            imu.capture(nn.Linear(16, 4), batches, max_memory=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())
