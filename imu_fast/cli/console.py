"""What every command does with its errors and its tables."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import typer

from imu_fast.cli.processes import speaks
from imu_fast.errors import ImuFastError


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Our own errors, and those of a file that is named, as one line and exit code 2.

    Any other is a bug and keeps its traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        _write_any_name()
        failure: Exception
        try:
            command(*args, **kwargs)
        except ImuFastError as error:
            said, failure = str(error), error
        except OSError as error:  # no such name can be, links go in a circle, it is not ours
            if error.filename is None:
                raise
            failure = error
            said = f"{error.filename!r} cannot be used ({error.strerror}); choose another"
        else:
            return
        if speaks(failure):
            typer.echo("error: " + " ".join(said.split()), err=True)
        raise typer.Exit(2) from None

    return wrapped


def _write_any_name() -> None:
    """Let stdout take what it has no code for, such as bytes of a file's name that are no UTF-8.

    stderr does so by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def console() -> Any:
    """Of rich."""
    from rich.console import Console

    # Wide enough for the tables where the width is unknown (a pipe, a log file).
    return Console() if sys.stdout.isatty() else Console(width=118)
