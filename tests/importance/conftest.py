"""What the log says."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture
def said(caplog):
    """Which parameters went one sample at a time, by what the log says."""

    def lines():
        return " ".join(r.getMessage() for r in caplog.records if "one sample" in r.getMessage())

    with caplog.at_level(logging.INFO, "imu_fast"):
        yield lines
