"""What every command does with its errors and its tables."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import typer

from imu_fast.cli.processes import alone, speaks
from imu_fast.errors import ImuFastError


def clean_errors(command: Callable[..., None], *, processes: bool = False) -> Callable[..., None]:
    """Our own errors, and those of a file that is named, as one line and exit code 2.

    Any other is a bug and keeps its traceback.

    Args:
        processes: whether several may run the command under torchrun: they share its work, or
            write nothing. Of any other each would do all of it, and write the same files.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        _write_any_name()
        failure: Exception
        try:
            if not processes:
                alone(f"imu-fast {command.__name__.replace('_', '-')}")
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
