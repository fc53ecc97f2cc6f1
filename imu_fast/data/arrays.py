"""Arrays out of an ``.npz``, or one error that says why not."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imu_fast.errors import InputError, brief
from imu_fast.storage import DAMAGE

# What numpy and the archive's reader raise besides on what is no archive, cut short, damaged,
# encrypted, of Python objects, or says sizes that no array has.
_DAMAGE: tuple[type[Exception], ...] = (
    *DAMAGE,
    EOFError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def named_arrays(path: Path, names: Sequence[str], needs: str) -> list[Any]:
    """These arrays of an ``.npz``, as they are stored; nothing in the file is run.

    Args:
        names: of the arrays. needs: what the file should hold, for the message.

    Raises:
        InputError: it cannot be read, or lacks one of them.
    """
    import numpy as np

    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with file:
            keys = sorted(file)
            found = {name: file[name] for name in names if name in file}
    except _DAMAGE as error:
        first = names[0]
        raise InputError(
            f"data={str(path)!r} cannot be read ({brief(error)}); write it with "
            f"numpy.savez(path, {first}=..., ...), arrays of numbers"
        ) from error
    if len(found) < len(names):
        raise InputError(f"data={str(path)!r} has arrays {keys}; it needs {needs}")
    # A member of another ending is given as its bytes.
    for name, value in found.items():
        if not isinstance(value, np.ndarray):
            raise InputError(f"data={str(path)!r}: {name} is no array; it needs {needs}")
    return [found[name] for name in names]
