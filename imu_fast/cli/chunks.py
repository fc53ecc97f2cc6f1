"""A capture in parts, each kept in a folder when it is done: a run that was ended goes on there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imu_fast.cli.processes import Processes
from imu_fast.errors import InputError

# Samples of a part, in whole batches: what an end costs at most.
SAMPLES = 512
_MANIFEST = "run.json"


def digest_of(data: Path) -> str:
    """What says that data are the same: a file's bytes; of a folder names, sizes and times."""
    found = hashlib.blake2b(digest_size=16)
    if data.is_dir():
        for path in sorted(data.rglob("*")):
            kind = path.stat()
            if path.is_file():
                said = (str(path.relative_to(data)), kind.st_size, kind.st_mtime_ns)
                found.update(repr(said).encode("utf-8", "backslashreplace"))
    else:
        with open(data, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a run are.

    Attributes:
        folder: theirs. belongs: what they are of, by name.
    """

    folder: Path
    belongs: dict[str, str]

    def captured(
        self, model: Any, loader: Any, layers: Any, here: Processes, progress: bool
    ) -> Any:
        """This process's factors: of each part read, or captured and written.

        Raises:
            InputError: the folder holds parts of another run, or what is none.
        """
        from torch.utils.data import DataLoader, Subset
        from tqdm.auto import tqdm

        from imu_fast.attribution.index_reading import as_data, digest_of
        from imu_fast.distributed import text_of
        from imu_fast.factors.chunked import ChunkedFactors
        from imu_fast.factors.gradient_factors import GradientFactors
        from imu_fast.model.batches import as_batches
        from imu_fast.model.capture import capture

        self._agree(model, here)
        mine = here.share(loader)
        n = len(mine.dataset) if mine else 0
        size = max(1, SAMPLES // loader.batch_size) * loader.batch_size if n else 1
        parts: list[list[GradientFactors]] = []
        starts = range(0, n, size)
        for number, start in enumerate(tqdm(starts, "parts", unit="part", disable=not progress)):
            rows = range(start, min(start + size, n))
            some: Any = DataLoader(
                Subset(mine.dataset, rows), mine.batch_size, collate_fn=mine.collate_fn
            )
            # What the model reads depends on more files than the data's: a template, a tokenizer,
            # names of classes, how images are prepared.
            batches = list(as_batches(some, model))
            part = f"{here.rank}-{number:06d}-{digest_of(batches)[:16]}"
            paths = self._files(part)
            if not paths:
                paths = self._written(capture(model, as_data(batches), layers), part)
            parts.append([GradientFactors.load(path) for path in paths])
        if not parts:
            return None
        # Each part found out for itself how the model is read.
        ways = {text_of([layer.loss for layer in one]) for one in parts}
        if len(ways) > 1:
            raise InputError(
                "checkpoint: parts of the samples are read in different ways, "
                f"{' and '.join(sorted(ways))}; leave --checkpoint out"
            )
        found = [ChunkedFactors(layer) for layer in zip(*parts, strict=True)]
        return found if len(found) > 1 else found[0]

    def _agree(self, model: Any, here: Processes) -> None:
        """The first process makes the folder, before the others look."""
        from imu_fast.attribution.index_reading import weights_of

        weights = hashlib.blake2b(repr(weights_of(model)).encode(), digest_size=16).hexdigest()
        belongs = self.belongs | {"model": weights, "processes": str(here.world)}
        if here.first:
            self._check(belongs)
        here.wait("imu-fast score: a checkpoint")
        if not here.first:
            self._check(belongs)

    def _check(self, belongs: dict[str, str]) -> None:
        from imu_fast.storage import replacing, writable_folder

        writable_folder(self.folder, f"checkpoint={str(self.folder)!r}")
        manifest = self.folder / _MANIFEST
        if manifest.exists():
            try:
                known = json.loads(manifest.read_text("utf-8"))
            except ValueError:
                known = None
            if not isinstance(known, dict):
                raise InputError(f"checkpoint={str(manifest)!r} is damaged; remove the folder")
            for name, value in belongs.items():
                if known.get(name) != value:
                    raise InputError(
                        f"checkpoint={str(self.folder)!r} holds parts of another run: its {name} "
                        "is another; choose another folder, or remove it"
                    )
        elif self.folder.is_dir() and any(p.name[0] != "." for p in self.folder.iterdir()):
            raise InputError(
                f"checkpoint={str(self.folder)!r} is a folder with other files; choose a new name"
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(manifest) as temporary:
                temporary.write_text(json.dumps(belongs, indent=1), "utf-8")

    def _name(self, part: str, layer: int, count: int) -> Path:
        return self.folder / f"{part}-{layer}-of-{count}.safetensors"

    def _files(self, part: str) -> list[Path]:
        """Of a part that is whole; else none.

        Raises:
            InputError: the folder holds other samples in its place.
        """
        place = part.rpartition("-")[0]
        every = sorted(self.folder.glob(f"{place}-*-0-of-*.safetensors"))
        if not every:
            return []
        if not every[0].name.startswith(f"{part}-"):
            raise InputError(
                f"checkpoint={str(self.folder)!r} holds parts of samples that were read in another "
                "way (the tokenizer, the template, the classes or what is done to images has "
                "changed since); choose another folder, or remove it"
            )
        count = int(every[0].stem.rpartition("-")[2])
        paths = [self._name(part, layer, count) for layer in range(count)]
        return paths if all(path.exists() for path in paths) else []

    def _written(self, factors: Any, part: str) -> list[Path]:
        layers = factors if isinstance(factors, list) else [factors]
        for layer in layers:
            if not hasattr(layer, "save"):
                raise InputError(
                    f"checkpoint: layer {layer.name!r} is a convolution, whose inputs no file "
                    "keeps; leave --checkpoint out"
                )
        paths = [self._name(part, i, len(layers)) for i in range(len(layers))]
        for path, layer in zip(paths, layers, strict=True):
            layer.save(path)
        return paths
