"""Files of every format that is written here, and read again, with faults of any kind.

``python tests/fuzz/damage.py 200`` prints for each format what came of so many damaged files.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_comparison import METHODS, make_results
from torch import Tensor, nn

import imu_fast as imu
from imu_fast.data.image_files import read_arrays
from imu_fast.data.text_files import read_records
from imu_fast.errors import InputError
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.study.cells import Cell
from imu_fast.study.results import read_results, write_results


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one fault of any kind; never the content itself."""
    raw = bytearray(content)
    kind = rng.randrange(6)
    at = rng.randrange(len(raw))
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:  # where the names and the checksum are
        at = rng.randrange(min(len(raw), 1100))
    if kind in (1, 2):
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        raw[at : at + 8] = rng.randbytes(8)
    elif kind == 4:
        raw[at:at] = rng.randbytes(1 + rng.randrange(4))
    else:
        return rng.randbytes(rng.randrange(300))
    return bytes(raw) if bytes(raw) != content else content[:-1]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        write: a whole one. read: what is in it, to be compared.
        sealed: a checksum is over all of it, so that every fault is refused. Others (zip archives
            and cells of a comparison have places that say nothing) may be read as they were.
        plain: text without a checksum, where a fault may be another text.
        file: its name, where it has one of its own.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    sealed: bool = True
    plain: bool = False
    file: str = ""


def _factors() -> imu.GradientFactors:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(k, 4, generator=generator) for k in (6, 3))
    return imu.GradientFactors.from_head(x, w, torch.zeros(3), torch.arange(6) % 3, implicit=False)


def _operator(curvature: str) -> Format:
    return Format(
        lambda path: imu.fit(curvature, _factors(), damping=0.1).save(path),
        lambda path: imu.load_operator(path).diagonal(),
    )


def _summarised(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    imu.save_summary(model, (torch.randn(6, 4), torch.arange(6) % 3), path)


def _resumed(path: Path) -> Any:
    torch.manual_seed(0)
    data = torch.randn(6, 4), torch.arange(6) % 3
    return imu.unlearn(nn.Linear(4, 3), data, epochs=2, checkpoint=path).model.weight.detach()


def _cell(path: Path) -> Cell:
    return Cell(path, "model")


_ENTRIES: dict[str, Any] = {"first": {"rows": [1, 2.5, None]}, "second": "größe"}


def _measure(path: Path) -> None:
    for name, value in _ENTRIES.items():
        _cell(path).made(name, [name], lambda value=value: value)


def _known(path: Path) -> Any:
    """What is there of each; an entry whose digest has another digit is measured anew."""
    found = {name: _cell(path).get(name, [name]) for name in _ENTRIES}
    return {name: _ENTRIES[name] if value is None else value for name, value in found.items()}


def _arrays(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, x=np.ones((6, 4), "f4"), y=np.arange(6) % 3)


def _indexed(path: Path) -> None:
    torch.manual_seed(0)
    imu.build_index(nn.Linear(4, 3), (torch.randn(6, 4), torch.arange(6) % 3), path.parent)


def _read_index(folder: Path) -> Any:
    return next(iter(imu.load_index(folder).factors()[0].chunks())).delta


_LINES = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(9)]

FORMATS: dict[str, Format] = {
    "tensors": Format(
        lambda path: save_tensors(path, {"a": torch.arange(40.0), "b": torch.ones(3)}, {"k": "v"}),
        load_tensors,
    ),
    "factors": Format(
        lambda path: _factors().save(path), lambda path: imu.GradientFactors.load(path).delta
    ),
    **{f"operator, {name}": _operator(name) for name in ("fisher_diag", "kfac", "ggn")},
    "summary of a training set": Format(_summarised, lambda path: repr(imu.load_summary(path))),
    "chunk of an index": Format(
        _indexed, lambda path: _read_index(path.parent), file="index/chunk-000000.safetensors"
    ),
    "manifest of an index": Format(
        _indexed, lambda path: _read_index(path.parent), sealed=False, file="index/index.json"
    ),
    "checkpoint of a run": Format(_resumed, _resumed),
    "cell of a comparison": Format(_measure, _known, sealed=False),
    "results of a comparison": Format(
        lambda path: write_results(
            make_results(seeds=1, archs=("vgg",), tasks=("class-3",), methods=METHODS[:2]),
            {},
            path.parent,
        ),
        lambda path: read_results(path.parent),
        file="results.json",
    ),
    "arrays .npz": Format(
        _arrays,
        lambda path: [array.tolist() for array in read_arrays(path)],
        sealed=False,
    ),
    "texts .jsonl": Format(
        lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in _LINES)),
        lambda path: read_records(path).objects,
        plain=True,
    ),
    "texts .csv": Format(
        lambda path: path.write_text(
            "question,answer\n" + "".join(",".join(line.values()) + "\n" for line in _LINES)
        ),
        lambda path: read_records(path).objects,
        plain=True,
    ),
}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def outcomes(name: str, cases: int, folder: Path) -> Counter[str]:
    """What came of so many damaged files: "refused", "as it was", "another text".

    Raises:
        AssertionError: a number read is another, an error is none of ours or does not name the
            file.
    """
    form, rng, found = FORMATS[name], random.Random(0), Counter[str]()
    ending = name.partition(".")[2] or "safetensors"
    path = folder / (form.file or f"damaged.{ending}")
    form.write(path)
    content = path.read_bytes()
    truth = form.read(path)
    for _ in range(cases):
        path.write_bytes(damaged(content, rng))
        try:
            read = form.read(path)
        except InputError as error:
            assert path.name in str(error), error
            found["refused"] += 1
            continue
        same = _equal(truth, read)
        assert same or form.plain, f"{name}: {read} where {truth} was written"
        found["as it was" if same else "another text"] += 1
    return found


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"{'format':24} {'files':>6} {'refused':>8} {'as it was':>10} {'another text':>13}")
    for name in FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            found = outcomes(name, cases, Path(folder))
        counts = [found[kind] for kind in ("refused", "as it was", "another text")]
        print(f"{name:24} {cases:6} {counts[0]:8} {counts[1]:10} {counts[2]:13}")


if __name__ == "__main__":
    main()
