"""Shared by the throughput suites: one thread, and one table of ratios at the end of the run."""

from __future__ import annotations

import platform

import pytest
import report
import torch


@pytest.fixture
def two_threads():
    """Two threads for one test, where others have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config, machine_info):
    """Versions and device beside every result."""
    import numpy
    import triton

    import imu_fast

    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info["imu_fast"] = {
        "imu_fast": imu_fast.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": 1,
    }


def pytest_terminal_summary(terminalreporter, config):
    """Each benchmark beside its group's baselines: cost as a fraction, and speed as a factor."""
    try:
        from tabulate import tabulate
    except ImportError:
        terminalreporter.write_line("no table of ratios: pip install tabulate")
        return
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    entries = [report.timing(b.as_dict(include_data=False)) for b in session.benchmarks]
    rows = []
    for mine, others in report.comparisons([entry for entry in entries if entry]):
        for other in others:
            ratio = mine.per_sample / other.per_sample
            rows.append(
                [
                    mine.name,
                    other.name,
                    f"{1e6 * mine.per_sample:.2f}",
                    f"{1e6 * other.per_sample:.2f}",
                    f"{100 * ratio:.4f} %",
                    f"{1 / ratio:,.2f}x",
                ]
            )
        if mine.reached is not None:
            reached = f"{100 * mine.reached:.0f} % reached"
            rows.append([mine.name, f"its {mine.floor_kind} floor", "", "", reached, ""])
    if rows:
        head = ["benchmark", "against", "us/sample", "baseline", "cost of ours", "faster by"]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU paths"
        terminalreporter.write_line(
            f"\nratios, medians of this run on {device}; one CPU thread unless a suite says"
        )
        terminalreporter.write_line(tabulate(rows, headers=head, colalign=("left",) * 6))
