"""Shared by the throughput suites: one thread, and one table of ratios at the end of the run."""

from __future__ import annotations

import platform

import pytest
import torch


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


def per_sample(entry) -> float:
    """Median seconds per sample: baselines too slow for all samples run on fewer."""
    return entry["median"] / entry["extra_info"]["samples"]


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
    entries = [b.as_dict(include_data=False, flat=True) for b in session.benchmarks]
    rows = []
    for group in sorted({e["group"] for e in entries}):
        members = [e for e in entries if e["group"] == group and "samples" in e["extra_info"]]
        ours = [e for e in members if e["extra_info"].get("role") == "imu_fast"]
        for mine in ours:
            for other in members:
                role = other["extra_info"]["role"]
                if role == "imu_fast" or role not in mine["extra_info"].get("against", [role]):
                    continue
                ratio = per_sample(mine) / per_sample(other)
                rows.append(
                    [
                        mine["name"],
                        other["name"],
                        f"{1e6 * per_sample(mine):.2f}",
                        f"{1e6 * per_sample(other):.2f}",
                        f"{100 * ratio:.4f} %",
                        f"{1 / ratio:,.0f}x",
                    ]
                )
            floor = mine["extra_info"].get("floor_s")
            if floor:
                # Minima of both: what another process took is in neither.
                reached = floor / mine["min"]
                kind = mine["extra_info"].get("floor", "matmul")
                rows.append(
                    [
                        mine["name"],
                        f"its {kind} floor",
                        "",
                        "",
                        f"{100 * reached:.0f} % reached",
                        "",
                    ]
                )
    if rows:
        head = ["benchmark", "against", "us/sample", "baseline", "cost of ours", "faster by"]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU paths"
        terminalreporter.write_line(
            f"\nratios, medians of this run on {device}; one CPU thread unless a suite says"
        )
        terminalreporter.write_line(tabulate(rows, headers=head, colalign=("left",) * 6))
