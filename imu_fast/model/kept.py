"""Rows that a capture keeps: in memory up to a limit, beyond it in a file that has no name."""

from __future__ import annotations

import contextlib
import ctypes
import re
import tempfile
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError, WriteError, brief

# Below this the arithmetic of a pass, whose tiles are what they are, would not fit.
LEAST = 1 << 29
# Bytes written between two times that freed memory is given back.
_TRIMMED = 1 << 27
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def bytes_of(name: str, value: Any) -> int:
    """A number of bytes, or a text such as ``"1.5GiB"``.

    Raises:
        InputError: neither, or less than 512 MiB.
    """
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found is not None and found[2].lower() in _UNITS:
            number = int(Fraction(found[1]) * _UNITS[found[2].lower()])
    if number is None:
        raise InputError(f"{name}={value!r}; pass a number of bytes, or a text such as '1.5GiB'")
    if number < LEAST:
        raise InputError(f"{name}={value!r} is {number} bytes; pass at least {LEAST} ('512MiB')")
    return number


def _trim() -> None:
    """Have the C library give back freed memory, from which small blocks between keep it."""
    with contextlib.suppress(OSError, AttributeError):  # another than glibc
        ctypes.CDLL(None).malloc_trim(0)


class Rows:
    """Rows [k, d] of one dtype, put one after the other.

    Args:
        limit: bytes that they may take in memory; None: any number. Twice as much is taken where
            they are put together, so that beyond half of it they go to a file.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._parts, self._size = limit, list[Tensor](), 0
        self._file: Any = None
        self._written = self._freed = 0

    def add(self, rows: Tensor) -> None:
        """Append; the tensor is not kept where a file takes it.

        Raises:
            InputError: rows on a GPU, whose memory is another, beyond the limit.
            WriteError: the file system refuses.
        """
        if self._parts and (rows.dtype, rows.shape[1:]) != self._kind():
            raise InputError(
                f"max_memory: features are {rows.dtype} {list(rows.shape[1:])} in one batch and "
                f"{self._kind()} in another, which no file of them can hold; leave max_memory out"
            )
        self._parts.append(rows)
        self._size += rows.nbytes
        full = self._limit is not None and 2 * self._size > self._limit
        if full or self._file is not None:
            self._write()

    def _kind(self) -> tuple[torch.dtype, torch.Size]:
        return self._parts[0].dtype, self._parts[0].shape[1:]

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.NamedTemporaryFile(
                    buffering=0, prefix="imu-fast-", suffix=".features"
                )
            for rows in self._parts:
                if rows.device.type != "cpu":
                    raise InputError(
                        f"max_memory is of the main memory, and features are on {rows.device}; "
                        "leave it out, or capture on the CPU"
                    )
                flat = rows.detach().contiguous().flatten().view(torch.uint8)
                # Not by numpy's tofile, which loses what a full disk refuses at the end.
                left = flat.numpy().data
                while len(left):
                    left = left[self._file.write(left) :]
                self._written += rows.nbytes
        except OSError as error:
            raise WriteError(
                f"max_memory: {tempfile.gettempdir()} does not take the features "
                f"({brief(error)}); free space there, or name another folder by TMPDIR"
            ) from error
        self._freed += self._size
        self._parts, self._size = [self._parts[0][:0].clone()], 0
        if self._freed >= _TRIMMED:
            self._freed = 0
            _trim()

    def tensor(self) -> Tensor:
        """All rows; of a file, mapped, so that the system may drop and read them again."""
        if self._file is None:
            return torch.cat(self._parts)
        if self._size:
            self._write()
        dtype, shape = self._kind()
        count = self._written // dtype.itemsize
        whole = torch.from_file(self._file.name, shared=False, size=count, dtype=dtype)
        with contextlib.suppress(OSError):
            self._file.close()  # unlinked; the mapping holds it
        return whole.view(-1, *shape)
