"""safetensors files, written whole or not at all, and read memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from imu_fast.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; renamed onto it on success, removed on failure."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and string metadata as one safetensors file, atomically."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        # Clones: safetensors refuses tensors that share memory (tied weights).
        save_file(
            {k: v.detach().contiguous().clone() for k, v in tensors.items()},
            str(temporary),
            dict(metadata),
        )


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Raises:
        InputError: the file is missing, cut short or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"path={str(path)!r} does not exist; check the name")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"path={str(path)!r} is no readable safetensors file: {error}") from error
