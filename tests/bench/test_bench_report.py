"""bench/report.py on a small file of results."""

from __future__ import annotations

import json

import pytest
import report
from typer import Typer
from typer.testing import CliRunner

GROUP = "gram, fp32 N=4"


def entry(role, median, samples=4, **extra):
    stats = {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "min": 0.8 * median}
    extra |= {"role": role, "samples": samples}
    return {"name": f"test[{role}]", "group": GROUP, "extra_info": extra, "stats": stats}


def results(device, *entries):
    return {"machine_info": {"imu_fast": {"device": device}}, "benchmarks": entries}


def test_a_table_and_a_figure(tmp_path):
    ours = entry("imu_fast", 1e-3, floor_s=4e-4, floor="bare", peak_bytes=2_000_000)
    others = entry("torch.compile", 2e-3), entry("naive", 1e-3, samples=1)
    without_role = {**ours, "extra_info": {}}
    (tmp_path / "gpu").mkdir()
    (tmp_path / "cpu.json").write_text(json.dumps(results("cpu", ours, *others, without_role)))
    # The same group on another device has baselines of its own; other files are none of ours.
    (tmp_path / "gpu" / "gram.json").write_text(json.dumps(results("H200", ours)))
    (tmp_path / "other.json").write_text(json.dumps([1, 2]))

    app = Typer()
    app.command()(report.main)
    done = CliRunner().invoke(app, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    table = (tmp_path / "report.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [(c[1], c[2], c[5]) for c in cells] == [
        ("H200", "imu_fast", "1.00"),
        ("cpu", "imu_fast", "1.00"),
        ("cpu", "torch.compile", "2.00"),
        ("cpu", "naive", "4.00"),
    ]
    assert cells[1][3:5] + cells[1][6:] == ["1.000", "0.900 - 1.100", "50 % (bare)", "2"]
    assert "torch.compile" in done.output
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_an_empty_folder_is_said_by_name(tmp_path):
    with pytest.raises(report.typer.BadParameter, match=r"no pytest-benchmark results under"):
        report.read(tmp_path)


def test_a_benchmark_compares_only_with_those_that_it_names():
    mine = report.timing(entry("imu_fast", 1.0, against=["forward"]))
    others = [report.timing(entry(role, 1.0)) for role in ("forward", "vmap")]
    assert list(report.comparisons([mine, *others])) == [(mine, others[:1])]
