"""What was measured, in files small enough to be kept with the code: one per model and task.

A comparison goes on from them, without its models where a cell is whole: a method that is in its
cell is not run again. A cell's name says which models it is of; each
entry in it says by a digest what it depends on, and a checksum whether it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imu_fast.errors import InputError, brief
from imu_fast.storage import replacing

Json = dict[str, Any]
# Significant figures that are kept of a number: more than another machine would share.
_FIGURES = 4


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    return digest(value)[:12]


def rounded(value: Any) -> Any:
    """The value for JSON, numbers to four significant figures, None for NaN and infinity."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{_FIGURES}g}") if math.isfinite(value) else None
    return value


def pack(rows: list[Json]) -> Json:
    """Rows as a table, their keys once; what a row lacks is None there, as what is None in it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "rows": [[row.get(key) for key in columns] for row in rows]}


def unpack(table: Json) -> list[Json]:
    """The rows of :func:`pack`, each with every key."""
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


@dataclass(frozen=True)
class Cell:
    """The entries of one model and task, or whatever else a comparison has to remember.

    Attributes:
        path: of the file, there or not. key: of what all entries depend on.
    """

    path: Path
    key: str

    def read(self) -> dict[str, Json]:
        """Every entry: ``{name: {"key", "checksum", "value"}}``.

        Raises:
            InputError: the file is damaged, or another's.
        """
        if not self.path.is_file():
            return {}
        try:
            found = json.loads(self.path.read_text())
            entries, key = dict(found["entries"]), found["cell"]
            whole = all(e["checksum"] == _short([n, e["value"]]) for n, e in entries.items())
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._refused(f"is damaged ({brief(error)})") from error
        if not whole:
            raise self._refused("is damaged (by its checksum)")
        if key != self.key:
            raise self._refused(f"is the entry of another model or run ({key!r})")
        return entries

    def _refused(self, why: str) -> InputError:
        return InputError(f"path={str(self.path)!r} {why}; delete it")

    def get(self, name: str, depends: Any) -> Any:
        """What is there under this name and of the same dependence, or None."""
        entry = self.read().get(name)
        return (
            entry["value"] if entry is not None and entry["key"] == digest(depends)[:12] else None
        )

    def made(self, name: str, depends: Any, make: Callable[[], Any]) -> Any:
        """What is there, or what ``make`` returns (for JSON), which then is there."""
        if (value := self.get(name, depends)) is not None:
            return value
        value = rounded(make())
        entries = self.read()
        checksum = _short([name, value])
        entries[name] = {"key": _short(depends), "checksum": checksum, "value": value}
        # A line an entry: what has changed can be seen in a diff.
        lines = ",\n".join(
            f"{json.dumps(n)}: {json.dumps(e, separators=(',', ':'))}" for n, e in entries.items()
        )
        with replacing(self.path) as temporary:
            temporary.write_text(
                f'{{"cell": {json.dumps(self.key)}, "entries": {{\n{lines}\n}}}}\n'
            )
        return value
