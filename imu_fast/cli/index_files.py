"""What the commands of an index read and write beside it: names of samples, and answers."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from imu_fast.cli.arguments import Images, Texts
from imu_fast.cli.score_files import (
    as_text_cell,
    check_apart,
    check_ending,
    check_folder,
    check_free,
    check_out,
    readable,
    save_lines,
    write_or_rescue,
    writing,
)
from imu_fast.errors import InputError, check_installed
from imu_fast.storage import DAMAGE, replacing

logger = logging.getLogger("imu_fast")

_NAMES = "samples.json"
# What a line's most influential samples are called beside it.
_TOP = "top"


def opened_samples(
    images: Images, texts: Texts, text: bool, data: Path, batch_size: int | None, place: Any
) -> tuple[Any, Any, list[str], list[Mapping[str, Any]] | None]:
    """The model, samples in batches, their names, and of text the lines as they are."""
    if not text:
        from imu_fast.cli.image_models import opened

        return *opened(images, data, 64 if batch_size is None else batch_size, place), None
    from imu_fast.cli.text import opened as opened_text
    from imu_fast.data.text_files import read_records

    read_records(data)  # before a model is read
    reader = opened_text(texts, batch_size, place)
    found = reader.read(data)
    names = [str(number) for number in found.records.numbers]
    return reader.made.model, found.loader, names, list(found.records.objects)


def check_lines(data: Path, out: Path) -> None:
    """Raise InputError where a line has the name already that answers are written as."""
    from imu_fast.data.text_files import read_records

    records = read_records(data)
    if out.suffix != ".jsonl":
        return
    for number, line in zip(records.numbers, records.objects, strict=True):
        if _TOP in line:
            raise InputError(
                f"{records.at(number)} has {_TOP!r} already, which the samples are written as; "
                "rename it, or write a .csv"
            )


@dataclass(frozen=True)
class Names:
    """Of an index's samples, in its folder: images' files, or numbers of lines."""

    names: Sequence[str]

    @staticmethod
    def check(folder: Path) -> None:
        """Raise InputError unless an index and its names can be written to ``folder``."""
        check_folder(folder, folder)

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        with writing(folder), replacing(folder / _NAMES) as temporary:
            temporary.write_text(json.dumps({"samples": list(self.names)}), "utf-8")

    @staticmethod
    def read(folder: Path, n: int) -> list[str]:
        """Those of n samples; their places, where the index was not made by the command.

        Raises:
            InputError: the file is damaged, or of other samples.
        """
        file = folder / _NAMES
        if not file.exists():
            logger.warning(
                "index: %r has no %s (made in Python, or imu-fast index was ended early and "
                "goes on if run again); samples are named by their places",
                str(folder),
                _NAMES,
            )
            return [str(place) for place in range(n)]
        try:
            names = json.loads(file.read_text("utf-8"))["samples"]
        except DAMAGE as error:
            raise _damaged(file) from error
        if (
            not isinstance(names, list)
            or len(names) != n
            or not all(isinstance(name, str) for name in names)
        ):
            raise _damaged(file)
        return names


def _damaged(file: Path) -> InputError:
    return InputError(
        f"index: {str(file)!r} is damaged; run imu-fast index again, with the same options"
    )


@dataclass(frozen=True)
class Answers:
    """What an index says of queries.

    Attributes:
        samples: names of the index's. queries: names of these. values: influences [m, k], in the
            order of ``places`` [m, k]; None: [m, n], of all. lines: the queries', of text.
    """

    samples: Sequence[str]
    queries: Sequence[str]
    values: Tensor
    places: Tensor | None
    lines: Sequence[Mapping[str, Any]] | None

    @staticmethod
    def check(out: Path, text: bool, force: bool, **others: Path | None) -> None:
        """Raise InputError unless ``out`` can be written, and is none of the others."""
        check_ending(out, *((".jsonl",) if text else ()))
        check_apart("out", out, **others)
        check_out(out)
        check_free(out, force)

    def write(self, out: Path) -> None:
        """By the file's ending."""
        write = {".npz": self._npz, ".parquet": self._parquet, ".csv": self._csv}
        write_or_rescue(out, write.get(out.suffix, self._jsonl))

    def _rows(self) -> list[tuple[str, int, str, float]]:
        """``(query, rank, sample, influence)``, the first rank 1."""
        assert self.places is not None
        found = zip(self.queries, self.values.tolist(), self.places.tolist(), strict=True)
        return [
            (name, rank, self.samples[place], value)
            for name, values, places in found
            for rank, (value, place) in enumerate(zip(values, places, strict=True), 1)
        ]

    def _npz(self, path: Path) -> None:
        with replacing(path) as temporary:
            np.savez(
                temporary,
                influence=self.values.T.numpy(),
                sample=np.array(self.samples),
                query=np.array(self.queries),
            )

    def _parquet(self, path: Path) -> None:
        check_installed("out=.parquet", "pyarrow")
        import pyarrow as pa
        import pyarrow.parquet as pq

        query, rank, sample, influence = zip(*self._rows(), strict=True)
        columns = {
            "query": list(map(readable, query)),
            "rank": rank,
            "sample": list(map(readable, sample)),
            "influence": influence,
        }
        with replacing(path) as temporary, open(temporary, "wb") as file:
            pq.write_table(pa.table(columns), file)

    def _csv(self, path: Path) -> None:
        with (
            replacing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["query", "rank", "sample", "influence"])
            for query, rank, sample, influence in self._rows():
                writer.writerow([as_text_cell(query), rank, as_text_cell(sample), influence])

    def _jsonl(self, path: Path) -> None:
        assert self.lines is not None and self.places is not None
        k = self.places.shape[1]
        pairs = [{"sample": sample, "influence": value} for _, _, sample, value in self._rows()]
        lists = [pairs[start : start + k] for start in range(0, len(pairs), k)]
        save_lines(path, self.lines, {_TOP: lists})
