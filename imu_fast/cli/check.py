"""``imu-fast check``: every operation against its definition, on the user's machine."""

from __future__ import annotations

import json as to_json
import os
import subprocess
import sys
from typing import Annotated

import typer

from imu_fast.cli.console import console
from imu_fast.errors import check_installed

_INTERPRETER = "TRITON_INTERPRET"


def check(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any.")] = None,
    only: Annotated[str | None, typer.Option(help="Operations, with commas between.")] = None,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Triton's kernels too, on the CPU; slow, no times.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> None:
    """Check every operation here against its definition, beside the bound of its rounding error.

    Beside it the time of plain PyTorch, and the share of what the machine allows. Exit code 1
    if an error is above its bound; times never fail.
    """
    if interpret and os.environ.get(_INTERPRETER) != "1":
        check_installed("--interpret", "triton")
        # Read when the kernels are imported, so it is set before there is anything else.
        asked = {"--device": device, "--only": only}
        # Lanes that a mask leaves out divide by zero there, and numpy says so.
        command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "imu_fast", "check"]
        command += ["--json"] if json else []
        command += [x for flag, value in asked.items() if value is not None for x in (flag, value)]
        done = subprocess.run(command, env={**os.environ, _INTERPRETER: "1"}, check=False)
        raise typer.Exit(done.returncode)
    from imu_fast.check.check import run
    from imu_fast.check.table import notes, tables, title

    names = [] if only is None else [name.strip() for name in only.split(",")]
    screen = console()
    if json or not screen.is_terminal:
        report = run(device, names)
    else:
        with screen.status("") as status:
            report = run(device, names, watch=lambda name: status.update(name))
    if json:
        typer.echo(to_json.dumps(report.as_dict(), indent=1))
    else:
        screen.print(title(report), highlight=False)
        for part in tables(report, screen.width):
            screen.print(part, highlight=False)
        for line in notes(report):
            screen.print(line, highlight=False, style="red" if line.startswith("BROKEN") else "")
    if report.broken:
        raise typer.Exit(1)
