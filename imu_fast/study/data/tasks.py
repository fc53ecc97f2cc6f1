"""Data sets, and what is forgotten of them: a class, or a random part."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_choice
from imu_fast.study.data import cifar, digits

Samples = tuple[Tensor, Tensor]
# Held-out images: the first for stop rules and learning rates, the others for the report alone.
_VALIDATION, _TEST = 1000, 4000


@dataclass(frozen=True)
class Dataset:
    """Images [n, channels, height, width] float32 and labels [n] int64, in three disjoint parts.

    Attributes:
        train: what models are trained on. validation: held out, for choices (learning rate, stop
            rule). test: held out, for reports alone.
        classes: C.
        mirror: whether a mirrored image is still one of its class.
    """

    train: Samples
    validation: Samples
    test: Samples
    classes: int
    mirror: bool


@dataclass(frozen=True)
class ForgetTask:
    """What is forgotten, and what must be kept.

    Attributes:
        name, title: for files and for tables. kind: "class" or "random".
        forget, retain: the two parts of the training set.
        validation, test: held-out images of the classes that are kept.
        unseen_validation, unseen_test: held-out images like the forget set: of the forgotten class,
            or of all (the same tensors as validation and test).
    """

    name: str
    title: str
    kind: str
    forget: Samples
    retain: Samples
    validation: Samples
    test: Samples
    unseen_validation: Samples
    unseen_test: Samples


def take(samples: Samples, chosen: Tensor) -> Samples:
    """The samples of a mask or of indices."""
    return samples[0][chosen], samples[1][chosen]


def _split(samples: Samples, first: int, second: int) -> tuple[Samples, Samples]:
    x, y = samples
    return (x[:first], y[:first]), (x[first : first + second], y[first : first + second])


def _digits(path: Path | None, count: int | None, seed: int) -> Dataset:
    if path is not None:
        raise InputError(
            f"data_path={str(path)!r} goes with data='cifar10' or 'folder'; the digits come with "
            "scikit-learn: leave it out, or choose other data"
        )
    data = digits.load(seed)
    train = take(data.train, torch.arange(len(data.train[1]))[:count])
    return Dataset(train, data.calibration, data.test, 10, False)


def _cifar10(path: Path | None, count: int | None, seed: int) -> Dataset:
    if path is None:
        raise InputError(
            "data='cifar10' needs the files: pass data_path, an .npz of JPEG files or the folder "
            "that holds torchvision's cifar-10-batches-py"
        )
    if path.is_dir():
        train, held_out = (cifar.load_torchvision(path, part) for part in ("train", "test"))
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
        train = take(train, order[:count])
    else:
        train = cifar.load(path, "train", count, seed)
        held_out = cifar.load(path, "test", _VALIDATION + _TEST)
    return Dataset(train, *_split(held_out, _VALIDATION, _TEST), 10, True)


def _folder(path: Path | None, count: int | None, seed: int) -> Dataset:
    from imu_fast.data.image_files import load_images

    if path is None:
        raise InputError("data='folder' needs data_path, a folder with train/ and test/ in it")
    (train, classes), (held_out, others) = (load_images(path / p) for p in ("train", "test"))
    if classes != others:
        raise InputError(
            f"data_path={str(path)!r}: train/ has classes {classes}, test/ has {others}; they must "
            "be the same sub-folders"
        )
    generator = torch.Generator().manual_seed(seed)
    train = take(train, torch.randperm(len(train[1]), generator=generator)[:count])
    held_out = take(held_out, torch.randperm(len(held_out[1]), generator=generator))
    size = len(held_out[1])
    return Dataset(train, *_split(held_out, size // 5, size), len(classes), True)


DATASETS: dict[str, Callable[[Path | None, int | None, int], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "folder": _folder,
}


def load_dataset(name: str, path: Path | None, count: int | None, seed: int) -> Dataset:
    """Load a data set of ``DATASETS``; another seed draws another training subset.

    Args:
        path: of the files; digits need none. count: training images to use; None: all.

    Raises:
        InputError: unknown name, missing or broken files, fewer images than ``count``.
    """
    check_choice("data", name, DATASETS)
    found = DATASETS[name](path, count, seed)
    there = len(found.train[1])
    if count is not None and count > there:
        raise InputError(
            f"train={count}: there are {there} training images; ask for as many, or leave it out"
        )
    return found


def kind_of(task: str) -> str:
    """``"class"`` or ``"random"``."""
    return task.partition("-")[0]


def check_task(name: str) -> str:
    """Return ``name``, or raise InputError unless it is ``class-K`` or ``random-P`` (P percent)."""
    percent = re.fullmatch(r"random-(\d+(?:\.\d+)?)", name, re.ASCII)
    good = 0 < float(percent[1]) < 100 if percent else re.fullmatch(r"class-[0-9]{1,9}", name)
    if not good:
        shown = name if len(name) <= 60 else f"{name[:60]}..."
        raise InputError(
            f"task={shown!r} is unknown; use 'class-3' for the fourth class, or 'random-5' for "
            "five percent"
        )
    return name


def make_task(name: str, data: Dataset, seed: int) -> ForgetTask:
    """``class-K``: every training image of class K. ``random-P``: P percent, drawn by the seed.

    Raises:
        InputError: unknown name, a class that there is not, or nothing would be forgotten.
    """
    check_task(name)
    _, labels = data.train
    parts = {"validation": data.validation, "test": data.test}
    kind, _, which = name.partition("-")
    if kind == "class":
        label = int(which)
        if label >= data.classes:
            raise InputError(f"task={name!r}: there are classes 0 to {data.classes - 1}")
        title, forget = f"class {label}", labels == label
        kept = {k: take(part, part[1] != label) for k, part in parts.items()}
        alike = {k: take(part, part[1] == label) for k, part in parts.items()}
    else:
        generator = torch.Generator().manual_seed(1000 + seed)
        forget = torch.zeros(len(labels), dtype=torch.bool)
        count = round(float(which) / 100 * len(labels))
        forget[torch.randperm(len(labels), generator=generator)[:count]] = True
        title, kept, alike = f"{which} % at random", parts, parts
    if not bool(forget.any()):
        raise InputError(f"task={name!r} forgets none of {len(labels)} training images; use more")
    return ForgetTask(
        name,
        title,
        kind,
        take(data.train, forget),
        take(data.train, ~forget),
        kept["validation"],
        kept["test"],
        alike["validation"],
        alike["test"],
    )


def check_measurable(task: ForgetTask) -> None:
    """Raise InputError unless the task has what a comparison measures on.

    Two forget images and two retained ones (a probe is trained on one of each), and one of every
    held-out part.
    """
    parts = {
        "training images to forget": (task.forget, 2),
        "training images that are kept": (task.retain, 2),
        "held-out images of kept classes for choices": (task.validation, 1),
        "held-out images of kept classes for the report": (task.test, 1),
        "held-out images like the forgotten for choices": (task.unseen_validation, 1),
        "held-out images like the forgotten for the report": (task.unseen_test, 1),
    }
    for what, ((_, y), least) in parts.items():
        if len(y) < least:
            raise InputError(
                f"task={task.name!r} has {len(y)} {what}, and needs {least}; give more images, or "
                "another task"
            )
