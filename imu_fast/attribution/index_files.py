"""The folder of an index: a manifest, and a file of each chunk of samples, all written whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.storage import (
    DAMAGE,
    file_digest,
    mapped_tensors,
    replacing,
    save_tensors,
    writable_folder,
)

# Of the folders below; a reader refuses any other.
# 1: at a convolution, a sample without a signal had an input of another one.
# 2: weights without the modules' settings, such as an adapter's scaling.
FORMAT = 3
_MANIFEST = "index.json"


@dataclass(frozen=True)
class ChunkEntry:
    """A finished chunk.

    Attributes:
        file: its name. sha256: of the file's bytes. n: samples. batches: how many each batch had.
        tokens: of each layer. data: says what the batches held.
    """

    file: str
    sha256: str
    n: int
    batches: list[int]
    tokens: list[int]
    data: str


@dataclass
class Manifest:
    """What is said of an index.

    Attributes:
        settings: what the samples were read with, by the argument's name.
        weights: the model's checksums and settings, by name.
        layers: what is known of each, once there is a chunk. way: how the model was read there.
        chunks: finished ones. complete: whether all samples are in them.
    """

    settings: dict[str, Any]
    weights: dict[str, str]
    layers: list[dict[str, Any]] = field(default_factory=list)
    way: dict[str, Any] = field(default_factory=dict)
    chunks: list[ChunkEntry] = field(default_factory=list)
    complete: bool = False

    def digest(self) -> str:
        """Of what a sample's projection depends on: indices with the same take each other's."""
        how = [self.settings[name] for name in ("reading", "projection", "seed")]
        said = json.dumps([how, self.weights, self.layers], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def folder_of(path: Any) -> Path:
    """Its absolute path; raises InputError where ``path`` is none that files can be read in."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is a {type(path).__name__}; pass the name of the index's folder")
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"path={str(path)!r} is not UTF-8, under which no safetensors file can be read; choose "
            "another name"
        ) from error
    return Path(path).absolute()  # the current directory may be another one later


class IndexFolder:
    """Reads and writes an index at ``path``."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()

    @property
    def shown(self) -> str:
        """As messages begin."""
        return f"path={str(self.path)!r}"

    @classmethod
    def opened(cls, path: Path) -> IndexFolder:
        """One that is there.

        Raises:
            InputError: there is none, or its manifest is damaged or of another format.
        """
        shown, file = f"path={str(path)!r}", path / _MANIFEST
        if not file.is_file():
            raise InputError(
                f"{shown} holds no index ({_MANIFEST} is missing); imu_fast.build_index makes one"
            )
        try:
            found = json.loads(file.read_text("utf-8"))
            version, told = found["format"], found.pop("sha256")
            intact = told == _checksum(found)
        except DAMAGE as error:
            raise InputError(f"path={str(file)!r} is damaged; remove the folder") from error
        if not intact:
            raise InputError(
                f"path={str(file)!r} is damaged, by its checksum; restore a copy, or remove the "
                "folder and build the index anew"
            )
        if version != FORMAT:
            raise InputError(
                f"path={str(file)!r} has the index format {version}, this version reads {FORMAT}; "
                "build it anew, or use the version of imu_fast that wrote it"
            )
        del found["format"]
        found["chunks"] = [ChunkEntry(**chunk) for chunk in found["chunks"]]
        return cls(path, Manifest(**found))

    @classmethod
    def agreed(cls, path: Path, settings: dict[str, Any], weights: dict[str, str]) -> IndexFolder:
        """A new one, or one that was begun in the same way.

        Raises:
            InputError: it is another's, which says in what; or a folder with other files.
        """
        shown = f"path={str(path)!r}"
        writable_folder(path, shown)
        if (path / _MANIFEST).exists():
            found = cls.opened(path)
            if not found.manifest.chunks:  # nothing that others' arguments could spoil
                found.manifest = Manifest(settings, weights)
                found.write()
                return found
            found.check_weights(weights)
            for name, value in settings.items():
                known = found.manifest.settings.get(name)
                if known != value:
                    raise InputError(
                        f"{name}: {shown} holds an index with {name}={known!r}, this call has "
                        f"{value!r}; choose another folder, or pass the same"
                    )
            return found
        if path.is_dir() and any(p.name[0] != "." for p in path.iterdir()):
            raise InputError(f"{shown} is a folder with other files; choose a new name")
        path.mkdir(parents=True, exist_ok=True)
        made = cls(path, Manifest(settings, weights))
        made.write()
        return made

    def check_weights(self, weights: Mapping[str, str]) -> None:
        """Raise InputError unless a model has the weights of the index."""
        known = self.manifest.weights
        names = [*known, *(name for name in weights if name not in known)]
        odd = [name for name in names if known.get(name) != weights.get(name)]
        if odd:
            raise InputError(
                f"model: {self.shown} holds gradients of other weights: {odd[0]!r} (and "
                f"{len(odd) - 1} more) differs; pass the model that the index was built with, or "
                "build an index of this one"
            )

    def write(self) -> None:
        """The manifest, as it is now."""
        found = {"format": FORMAT, **asdict(self.manifest)}
        with replacing(self.path / _MANIFEST) as temporary:
            temporary.write_text(
                json.dumps(found | {"sha256": _checksum(found)}, indent=1), "utf-8"
            )

    def add(
        self,
        tensors: Mapping[str, Tensor],
        texts: list[dict[str, str]],
        said: dict[str, Any],
    ) -> None:
        """A chunk, and then the manifest that knows of it.

        Args:
            texts: of the layers. said: of the chunk, as :class:`ChunkEntry` has it.
        """
        name = f"chunk-{len(self.manifest.chunks):06d}.safetensors"
        save_tensors(self.path / name, tensors, {"layers": json.dumps(texts)})
        entry = ChunkEntry(file=name, sha256=file_digest(self.path / name), **said)
        self.manifest.chunks.append(entry)
        self.write()

    def read(self, number: int, prefix: str = "") -> tuple[dict[str, Tensor], list[dict[str, str]]]:
        """Tensors of a chunk whose names begin so, mapped; its bytes are verified once.

        Raises:
            InputError: the file is missing or damaged.
        """
        entry = self.manifest.chunks[number]
        file = self.path / entry.file
        shown = f"path={str(file)!r}"
        try:
            if entry.file not in self._verified:
                if file_digest(file) != entry.sha256:
                    raise InputError(
                        f"{shown} is damaged: its bytes are not those that were written, by their "
                        "checksum; restore a copy, or remove the folder and build the index anew"
                    )
                self._verified.add(entry.file)
            tensors, metadata = mapped_tensors(file, prefix)
        except OSError as error:
            raise InputError(
                f"{shown} cannot be read ({error}); restore it, or remove the folder and build the "
                "index anew"
            ) from error
        return tensors, json.loads(metadata["layers"])


def _checksum(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
