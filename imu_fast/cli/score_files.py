"""Scores to ``.npz``, ``.parquet`` or ``.csv``, by the file's ending; whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from imu_fast.errors import ImuFastError, InputError, check_installed
from imu_fast.storage import replacing, writable, writable_folder

ENDINGS = (".npz", ".parquet", ".csv")


def check_out(path: Path, name: str = "out", size: int = 0) -> None:
    """Raise InputError unless a file of ``size`` bytes can be written here.

    Missing folders can be made.
    """
    writable(path, name, size=size)


def check_free(path: Path, force: bool) -> None:
    """Raise InputError where something is there already and may not be replaced."""
    if path.exists() and not force:
        raise InputError(
            f"out={str(path)!r} is there already; choose another name, or replace it with --force"
        )


def check_apart(name: str, path: Path, **others: Path | None) -> None:
    """Raise InputError where ``path``, which is to be written, is one of the others."""
    for other, given in others.items():
        # Not by Path.resolve(), which raises where links go in a circle.
        if given is not None and os.path.realpath(given) == os.path.realpath(path):
            raise InputError(
                f"{name}={str(path)!r} is {other}={str(given)!r} too, and would replace it; choose "
                "another name"
            )


def check_folder(folder: Path, path: Path, name: str = "out", size: int = 0) -> None:
    """Raise InputError unless ``folder``, which ``path`` needs, exists or can be made, writable.

    Args:
        size: bytes that will be needed.
    """
    writable_folder(folder, f"{name}={str(path)!r}", size=size)


def check_new_folder(out: Path, size: int = 0) -> None:
    """Raise InputError unless ``out`` can be made, or is an empty folder: none is replaced."""
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"out={str(out)!r} is there already; choose another name, or remove it")
    check_folder(out.parent, out, size=size)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses (no space, no rights) into an InputError."""
    try:
        yield
    except ImuFastError:
        raise
    except OSError as error:
        raise InputError(
            f"out={str(path)!r} cannot be written ({error}); free space there or choose another"
        ) from error


def write_or_rescue(out: Path, write: Callable[[Path], None]) -> None:
    """Write what a command has worked for; where ``out`` cannot take it, somewhere else.

    Args:
        write: to the path that it is given, whole or not at all.

    Raises:
        InputError: ``out`` could not be written; says where the result is.
    """
    try:
        with writing(out):
            write(out)
    except ImuFastError as error:
        for folder in (Path.cwd(), Path(tempfile.gettempdir()), Path.home()):
            rescued = folder / f"{out.stem}-{uuid.uuid4().hex[:8]}{out.suffix}"
            try:
                with writing(rescued):
                    write(rescued)
            except ImuFastError:
                continue
            raise InputError(f"{error}; the result is in {str(rescued)!r}: move it") from None
        raise


def check_ending(path: Path, *more: str) -> None:
    """Raise InputError unless scores can be written under this name.

    Args:
        more: endings beside ENDINGS.
    """
    endings = (*more, *ENDINGS)
    if path.suffix not in endings:
        raise InputError(f"out={str(path)!r} must end in one of {', '.join(endings)}")
    if path.suffix == ".parquet":
        check_installed(f"out={str(path)!r}", "pyarrow.parquet", install="pyarrow")


# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def readable(name: str) -> str:
    """A name as UTF-8 can be written: bytes of a file's name that are none as ``\\udcXX``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def as_text_cell(name: str) -> str:
    """A name for a .csv, which no spreadsheet runs: an apostrophe goes before what looks like a
    formula. Numbers are no names.
    """
    text = readable(name)
    return f"'{text}" if text.startswith(_FORMULA) else text


def save_scores(path: Path, names: Sequence[str], columns: Mapping[str, Tensor]) -> None:
    """Write one row per sample: its name, and its place in each of the columns [n]."""
    check_ending(path)
    found: dict[str, Any] = {name: column.cpu().numpy() for name, column in columns.items()}
    with replacing(path) as temporary:
        if path.suffix == ".npz":
            np.savez(temporary, sample=np.array(names), **found)
        elif path.suffix == ".parquet":
            check_installed("out=.parquet", "pyarrow")
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.table({"sample": list(map(readable, names)), **found})
            with open(temporary, "wb") as file:  # pyarrow takes no name that is not UTF-8
                pq.write_table(table, file)
        else:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["sample", *found])
                rows = zip(
                    map(as_text_cell, names),
                    *(column.tolist() for column in found.values()),
                    strict=True,
                )
                writer.writerows(rows)


def save_lines(
    path: Path, objects: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[Any]]
) -> None:
    """Write JSON Lines: each object as it was, with its place in each of the columns of n."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for line, values in zip(objects, zip(*columns.values(), strict=True), strict=True):
            whole = {**line, **dict(zip(columns, values, strict=True))}
            try:
                text = json.dumps(whole, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:  # a lone surrogate, in a field that nothing reads
                text = json.dumps(whole).encode("ascii")
            file.write(text + b"\n")
