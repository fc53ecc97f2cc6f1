"""What every command does with its errors and its tables."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from imu_fast.cli.processes import speaks
from imu_fast.errors import ImuFastError


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Our own errors as one line and exit code 2; any other is a bug and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ImuFastError as error:
            if speaks(error):
                typer.echo("error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(2) from None

    return wrapped


def console() -> Any:
    """Of rich."""
    from rich.console import Console

    # Wide enough for the tables where the width is unknown (a pipe, a log file).
    return Console() if sys.stdout.isatty() else Console(width=118)
