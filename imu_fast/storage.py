"""Files written whole or not at all, and safetensors files that say when they are damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imu_fast.errors import InputError, WriteError, brief

# Of the files below; a reader refuses those of a later version.
FORMAT = 1
_OURS = "imu_fast."
_ALIGNMENT = 64
_FORMAT, _CHECKSUM = f"{_OURS}format", f"{_OURS}sha256"


def writable(path: str | os.PathLike[str], name: str = "path", *, size: int = 0) -> None:
    """Try, before the work, whether a file can be written; missing folders need not exist yet.

    Args:
        path: a link is followed. name: of the argument, for messages.
        size: bytes that will be needed.

    Raises:
        InputError: it cannot: the path is a folder, a device, read-only, in no folder, or the
            disk is full; or no file can have this name.
    """
    shown = f"{name}={os.fspath(path)!r}"
    target = _real(path, shown)
    if target.is_dir():
        raise InputError(f"{shown} is a folder; add a file name")
    if target.exists():
        if not target.is_file():
            raise InputError(
                f"{shown} is a device or a pipe, which would be replaced; choose a file"
            )
        if not os.access(target, os.W_OK):
            raise InputError(f"{shown} is read-only; change its mode or choose another")
    writable_folder(target.parent, shown, size=size)


def writable_folder(folder: Path, shown: str, *, size: int = 0) -> None:
    """As :func:`writable`, for a folder that exists or can be made.

    Args:
        shown: what the message begins with.
    """
    folder = _real(folder, shown)
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    if not there.is_dir():
        raise InputError(f"{shown}: {str(there)!r} is no folder; choose another")
    refused = f"{shown}: the folder {str(there)!r} cannot be written to"
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{refused}; choose another")
    try:  # a mount may be read-only, a quota used up
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise InputError(f"{refused} ({error}); choose another") from error
    if free < size:
        raise InputError(
            f"{shown}: {free / 2**20:.0f} MB are free there, {size / 2**20:.0f} MB are needed; "
            "free space or choose another"
        )


def _real(path: str | os.PathLike[str], shown: str) -> Path:
    """Where a path leads.

    Raises:
        InputError: nowhere: a name too long, links in a circle, a zero byte.
    """
    try:
        target = Path(os.path.realpath(path))
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(target)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{shown}: no file can have this name ({why}); choose another") from error
    return target


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; renamed onto it on success, removed on failure.

    A link stays, what it points to is replaced; a file that was there keeps its mode and owner.

    Raises:
        InputError: no file can have this name.
        WriteError: the file system refuses; what was there is untouched.
    """
    target = _real(path, f"path={os.fspath(path)!r}")
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or the renaming may reach the disk before the content
        if target.exists():
            _like(temporary, target)
        os.replace(temporary, target)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"path={os.fspath(path)!r} cannot be written ({error}); what was there is untouched: "
            "free space there or choose another"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; renamed to it on success, removed on failure.

    Raises:
        WriteError: the file system refuses, or there is something already.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        os.replace(temporary, target)  # refuses a folder that is not empty, and a file
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"path={os.fspath(path)!r} cannot be written ({error}); choose another name, or free "
            "space there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _like(temporary: Path, target: Path) -> None:
    now = target.stat()
    with suppress(OSError):  # another's file: the owner may not be ours to give
        os.chown(temporary, now.st_uid, now.st_gid)
    os.chmod(temporary, stat.S_IMODE(now.st_mode))


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all that a file holds: metadata, names, dtypes, shapes, values."""
    digest = hashlib.sha256()
    kept = {key: value for key, value in metadata.items() if key != _CHECKSUM}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and string metadata as one safetensors file, atomically, with a checksum.

    Any reader of safetensors reads it.

    Raises:
        WriteError: the file system refuses; what was there is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones: safetensors refuses tensors that share memory (tied weights).
    copies = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    marked = {**metadata, _FORMAT: str(FORMAT)}
    marked[_CHECKSUM] = _checksum(copies, marked)
    with replacing(path) as temporary:
        try:
            save_file(copies, str(temporary), marked)
        except SafetensorError as error:
            raise OSError(brief(error)) from error


# What reading damaged bytes raises, in safetensors, in json and in torch (a RecursionError is a
# RuntimeError, an error of an encoding a ValueError).
DAMAGE: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: libraries round by how memory is aligned.

    In the file it stands wherever the header ends, so what is read would else not give the bits of
    what was written.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file; one that :func:`save_tensors` wrote is verified.

    Files of other programs, and those written before there were checksums, have none and are read
    as they are.

    Returns:
        Tensors, and the metadata that was saved with them.

    Raises:
        InputError: the file is missing, damaged, cut short or of another format.
    """
    from safetensors import SafetensorError, safe_open

    damage: tuple[type[Exception], ...] = (SafetensorError, *DAMAGE)
    shown = f"path={os.fspath(path)!r}"
    if not os.path.exists(path):
        raise InputError(f"{shown} does not exist; check the name")
    if not os.path.isfile(path):
        raise InputError(f"{shown} is no file; check the name")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        ours = any(key.startswith(_OURS) for key in metadata)
        damaged = ours and metadata.get(_CHECKSUM) != _checksum(tensors, metadata)
    except damage as error:
        raise InputError(f"{shown} is no readable safetensors file: {brief(error)}") from error
    if damaged:
        raise InputError(
            f"{shown} is damaged: its content is not what was written, by its checksum; write it "
            "anew or restore a copy (if another program changed it on purpose, let that leave out "
            f"the metadata {_OURS}*)"
        )
    if ours and metadata[_FORMAT] != str(FORMAT):
        raise InputError(
            f"{shown} has the format {metadata[_FORMAT]}, this version reads {FORMAT}; upgrade "
            "imu_fast"
        )
    # Only now: a copy would make a whole True of a damaged one.
    aligned = {key: _aligned(tensor) for key, tensor in tensors.items()}
    return aligned, {k: v for k, v in metadata.items() if not k.startswith(_OURS)}


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, read some at a time."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def mapped_tensors(
    path: str | os.PathLike[str], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Some tensors of a safetensors file, mapped: for a file whose bytes were verified.

    Args:
        prefix: of the names of those that are wanted; left out in what is returned.
    """
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="pt") as file:
        wanted = [key for key in file.keys() if key.startswith(prefix)]
        tensors = {key.removeprefix(prefix): _aligned(file.get_tensor(key)) for key in wanted}
        return tensors, dict(file.metadata() or {})
