"""``imu-fast check``: every operation is in it; what is wrong is named, and exit code 1."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from imu_fast import backend
from imu_fast.check import plain
from imu_fast.check.bounds import Bound
from imu_fast.check.calls import copied, exact, results
from imu_fast.check.check import run
from imu_fast.check.counts import Ceilings, cost_of
from imu_fast.check.entries import Shape, entries, flat
from imu_fast.check.error import compared
from imu_fast.cli.app import app
from imu_fast.errors import InputError
from imu_fast.ops.named import operations

OPERATIONS = operations()
ENTRIES = entries()


def command(*flags):
    return CliRunner().invoke(app, ["check", *flags])


def test_every_operation_in_every_dtype_is_within_its_bound():
    assert set(ENTRIES) == {*OPERATIONS, "damped_cholesky_solve"}
    report = run("cpu", timed=False)
    assert report.broken == []
    found = {(row.operation, row.backend, row.dtype) for row in report.rows}
    assert len(found) == len(report.rows)
    for name in OPERATIONS:
        assert {(name, "torch", "float64"), (name, "torch", "float32")} <= found
    assert ("softmax_residual", "torch", "bfloat16") in found
    # A bound that says something: below a thousandth of the largest it could be, and not zero.
    assert all(row.worst.error > 0 for row in report.rows)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_plain_form_is_the_same_operation(name):
    """In float64, where it is the truth of the shape that is timed."""
    entry, shape = ENTRIES[name], flat("", 9, 6, 5)
    given = entry.make(shape, torch.float64, entry.names[0])
    found = results(entry, entry.plain, copied(given))
    truth = results(entry, entry.run, copied(given))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    bounds = entry.bounds(*exact(given), **entry.options)
    assert [torch.as_tensor(b.rounded).shape for b in bounds] == [x.shape for x in truth]
    cost = entry.cost("fp32", shape)
    assert cost.bytes > 0 and cost.flops > 0
    assert set(inspect.signature(getattr(plain, name)).parameters)


def wrong_by_a_little(body):
    @functools.wraps(body)
    def broken(*args, **named):
        return body(*args, **named) * (1 + 3e-3)

    return broken


def not_a_number(body):
    @functools.wraps(body)
    def broken(*args, **named):
        found = body(*args, **named)
        found.view(-1)[-1] = torch.nan
        return found

    return broken


def of_the_wrong_shape(body):
    @functools.wraps(body)
    def broken(*args, **named):
        return body(*args, **named)[:-1]

    return broken


def raising(body):
    @functools.wraps(body)
    def broken(*args, **named):
        raise ZeroDivisionError("of this kernel")

    return broken


@pytest.mark.parametrize("how", [wrong_by_a_little, not_a_number, of_the_wrong_shape, raising])
def test_a_broken_operation_is_exit_code_1_and_its_name(how, monkeypatch):
    monkeypatch.setattr(OPERATIONS["gram"], "body", how(OPERATIONS["gram"].body))
    done = command("--only", "gradient_norms,gram", "--device", "cpu")
    assert done.exit_code == 1, done.output
    assert "2 of 4 within their bounds" in done.output
    assert "BROKEN: gram (torch, float64, ieee)" in done.output
    assert "BROKEN: gradient_norms" not in done.output
    if how is raising:
        assert "ZeroDivisionError: of this kernel" in done.output
    done = command("--only", "gram", "--device", "cpu", "--json")
    assert done.exit_code == 1
    read = json.loads(done.output, parse_constant=pytest.fail)
    assert [line.split(" ")[0] for line in read["broken"]] == ["gram", "gram"]
    assert all(row["seconds"] is None and not row["holds"] for row in read["rows"])


def test_in_place_results_are_checked_too(monkeypatch):
    body = OPERATIONS["head_ascent"].body

    @functools.wraps(body)
    def lazy(features, labels, weights, theta, buffer, *rest, **rates):
        return body(features, labels, weights, theta, buffer.clone(), *rest, **rates)

    monkeypatch.setattr(OPERATIONS["head_ascent"], "body", lazy)
    assert len(run("cpu", ["head_ascent"], timed=False).broken) == 4


def test_numbers_and_times_in_json():
    done = command("--only", "softmax_residual,damped_cholesky_solve", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    read = json.loads(done.output)
    assert read["broken"] == [] and read["machine"]["torch"] == torch.__version__
    assert len(read["rows"]) == 6
    for row in read["rows"]:
        assert 0 < row["error"] <= row["bound"] and row["holds"]
        assert min(row["seconds"], row["plain"], row["floor"]) > 0
        assert row["limited_by"] in ("bytes", "FLOPs")
    if not torch.cuda.is_available():
        assert backend.why_no_triton() in read["missing"]["triton"] or backend.interpreted()


@pytest.mark.parametrize("columns", ["80", "120"])
def test_no_line_is_cut_or_wider_than_the_terminal(columns, monkeypatch):
    from rich.console import Console

    from imu_fast.check.table import tables

    report = run("cpu", ["conjugate_gradient_iteration", "softmax_residual"])
    screen = Console(width=int(columns), record=True, file=open(os.devnull, "w"))
    for part in tables(report, screen.width):
        screen.print(part)
    lines = [line.rstrip() for line in screen.export_text().splitlines()]
    assert all(len(line) <= int(columns) and "…" not in line for line in lines)
    assert sum("float32" in line and line.endswith("%") for line in lines) == 2
    assert any("conjugate_gradient_iteration" in line for line in lines)


def test_what_cannot_be_checked_is_refused_by_name():
    with pytest.raises(InputError, match="only='grams' is unknown; choose one of"):
        run("cpu", ["grams"])
    with pytest.raises(InputError, match="device='tpu' is unknown; choose one of cpu, cuda"):
        run("tpu")
    if not torch.cuda.is_available():
        done = command("--device", "cuda")
        assert done.exit_code == 2


def test_a_bound_knows_dtypes_and_what_is_no_number():
    truth, ones = torch.ones(3, dtype=torch.float64), Bound(torch.ones(3, dtype=torch.float64))
    off = torch.tensor([1.0, 1.0, 1.0 + 2**-20])
    assert compared([off], [truth], [ones], torch.float32, 0.0, "").share > 1
    assert compared([off.double()], [truth], [ones], torch.float64, 0.0, "").share > 1
    cut = Bound(ones.rounded, 1.0)
    assert compared([off], [truth], [cut], torch.float32, 2.0**-10, "").share <= 1
    half = off.bfloat16()
    assert compared([half], [truth], [ones], torch.bfloat16, 0.0, "").share <= 1
    for value in (torch.nan, torch.inf):
        bad = compared([torch.full((3,), value)], [truth], [cut], torch.float32, 1.0, "").share
        assert not bad <= 1


def test_a_floor_is_the_longer_of_bytes_and_flops():
    machine = Ceilings(100.0, {"fp32": 10.0})
    assert cost_of(200, 5, "fp32").seconds_on(machine) == 2
    assert cost_of(200, 50, "fp32").bound_on(machine) == "FLOPs"
    assert Shape("", (2, 0, 3), 4, 5).N == 5


BROKEN_KERNEL = """
from imu_fast.cli.app import app
from imu_fast.ops.named import operations
operation = operations()["softmax_residual"]
launch = operation.kernel
operation.kernel = lambda *args: (launch(*args)[0] * 1.003, launch(*args)[1])
app(["check", "--only", "softmax_residual,gradient_norms"])
"""


def test_kernels_are_checked_under_the_interpreter():
    pytest.importorskip("triton", minversion="3.6")
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_KERNEL],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"BROKEN: softmax_residual (triton, {dtype}, ieee)" in done.stdout
    assert done.stdout.count("BROKEN") == 3 and "ours, ms" not in done.stdout


def test_the_interpreter_is_asked_for_in_a_process_of_its_own(monkeypatch):
    """Before the kernels are imported; its exit code is the command's."""
    pytest.importorskip("triton", minversion="3.6")
    asked = []

    def child(command, env, check):
        asked.append((command, env["TRITON_INTERPRET"]))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(subprocess, "run", child)
    done = command("--interpret", "--only", "gram", "--json")
    assert done.exit_code == 1
    module = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "imu_fast", "check"]
    assert asked == [([*module, "--json", "--only", "gram"], "1")]
