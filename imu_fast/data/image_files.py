"""A user's images: a folder with a sub-folder per class, or an ``.npz`` with arrays x and y."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from imu_fast.data.arrays import named_arrays
from imu_fast.errors import InputError, brief, check_count, check_installed

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLASSES_HELP = (
    "a text file with one class name per line in the order of the model's outputs, or the folder "
    "of the training set"
)


@dataclass(frozen=True)
class Preprocessing:
    """How an image of a folder becomes a model's input.

    Attributes:
        transform: an RGB image of Pillow -> a float tensor [3, h, w].
        description: one line: size, interpolation, mean, deviation, and whose they are.
    """

    transform: Callable[[Any], Tensor]
    description: str


def imagenet_preprocessing(image_size: int) -> Preprocessing:
    """The shorter side to ``image_size``, its centre, ImageNet's mean and deviation."""
    check_count("image_size", image_size)
    check_installed("an image folder", "torchvision")
    from torchvision import transforms

    steps = [
        transforms.Resize(image_size),
        transforms.CenterCrop(image_size),
        transforms.ToTensor(),
        transforms.Normalize(*IMAGENET),
    ]
    return Preprocessing(
        transforms.Compose(steps),
        described(image_size, image_size, "bilinear", *IMAGENET, "ImageNet's, for want of others"),
    )


def described(
    resize: Any, crop: Any, interpolation: str, mean: Sequence[float], std: Sequence[float], of: str
) -> str:
    """One line that says what is done to an image."""
    numbers = [" ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    return (
        f"images: shorter side {resize} ({interpolation}), centre {crop}, mean {numbers[0]}, "
        f"deviation {numbers[1]} ({of})"
    )


def load_data(
    path: Path,
    count_classes: Callable[[Tensor], int],
    *,
    preprocessing: Preprocessing | None = None,
    classes: Path | None = None,
    batch_size: int = 64,
) -> tuple[DataLoader, list[str]]:
    """A loader over ``path`` in a fixed order, and the name of every sample in that order.

    Args:
        path: a folder with one sub-folder per class (torchvision.datasets.ImageFolder), or an
            ``.npz`` with ``x`` [n, ...] floating, taken as it is, and ``y`` [n] integers.
        count_classes: from one sample [1, ...] to the number of the model's outputs.
        preprocessing: of the images of a folder; needed for one, and for nothing else.
        classes: which class a sub-folder is, see :func:`class_indices`.

    Raises:
        InputError: missing, empty, broken or not of these forms; labels that the model has not.
    """
    check_count("batch_size", batch_size)
    if path.is_dir():
        if preprocessing is None:
            raise InputError(f"data={str(path)!r} is an image folder; say its preprocessing")
        return _image_folder(path, count_classes, classes, preprocessing, batch_size)
    if path.suffix != ".npz" or not path.is_file():
        raise InputError(
            f"data={str(path)!r} is neither a folder with a sub-folder per class nor an .npz file"
        )
    if preprocessing is not None:
        raise InputError(
            f"data={str(path)!r} is taken as it is; preprocessing is for image folders, leave it "
            "out"
        )
    if classes is not None:
        raise InputError(
            f"classes={str(classes)!r} names the sub-folders of an image folder; leave it out "
            "with an .npz, whose y are class indices"
        )
    return _arrays(path, count_classes, batch_size)


def class_indices(
    names: Sequence[str], count: int, classes: Path | None, *, data: str
) -> list[int]:
    """The class index of every sub-folder.

    A forget set may hold some of the classes only, so a sub-folder's place says nothing unless all
    classes are there. In this order: ``classes`` says; or all names are whole numbers, which are
    the indices; or there are as many sub-folders as classes, numbered alphabetically.

    Args:
        names: of the sub-folders, sorted. count: classes of the model.
        classes: a text file with one class name per line in the order of the model's outputs, or a
            folder whose sub-folders, sorted, are all classes. data: the folder, for messages.

    Raises:
        InputError: a name that is no class, or no way to know which class it is.
    """
    if classes is not None:
        known = _class_names(classes)
        if len(known) != count:
            raise InputError(
                f"classes={str(classes)!r} has {len(known)} classes, the model {count}; "
                f"pass {_CLASSES_HELP}"
            )
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(
                f"data={data!r} has the sub-folders {_some(unknown)}, which are not in "
                f"classes={str(classes)!r} ({_some(known)}); rename or remove them"
            )
        return [known.index(name) for name in names]
    if all(name.isascii() and name.isdecimal() for name in names):
        indices = [int(name) for name in names]
        wrong = [n for n, i in zip(names, indices, strict=True) if i >= count]
        if wrong or len(set(indices)) < len(indices):
            raise InputError(
                f"data={data!r} has the sub-folders {_some(wrong or names)}; whole numbers are "
                f"class indices, each once, from 0 to {count - 1}; rename them, or pass --classes"
            )
        if len(names) == count and indices != sorted(indices):
            # ImageFolder numbers 0, 1, 10, 2: which of the two the model learned is not known.
            raise InputError(
                f"data={data!r} has all {count} classes under whole numbers whose alphabetical "
                "order (ImageFolder's numbering) is another; say which the model was trained "
                f"with, by --classes: {_CLASSES_HELP}"
            )
        return indices
    if len(names) != count:
        raise InputError(
            f"data={data!r} has {len(names)} sub-folders ({_some(names)}), the model {count} "
            f"classes; say which is which with --classes: {_CLASSES_HELP}"
        )
    return list(range(count))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _class_names(path: Path) -> list[str]:
    try:
        if path.is_dir():
            return sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"classes={str(path)!r} cannot be read ({error}); pass {_CLASSES_HELP}"
        ) from error
    names = [line.strip() for line in lines]
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name:
            raise InputError(
                f"classes={str(path)!r}: line {number} is empty; every line is a class, remove it"
            )
        if name in seen:
            raise InputError(
                f"classes={str(path)!r}: {name!r} is on the lines {seen[name]} and {number}; "
                "every class has one line"
            )
        seen[name] = number
    return names


def _open_image(path: str) -> Any:
    check_installed("an image folder", "PIL")
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # What Pillow's decoders raise on files that are cut short, damaged or no images.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"data: the image {path!r} cannot be read ({error}); repair or remove it"
        ) from error


def _open_folder(path: Path, transform: Callable[[Any], Tensor]) -> Any:
    """torchvision's ImageFolder, its images opened by :func:`_open_image`."""
    check_installed(f"data={str(path)!r} is an image folder, which", "PIL", "torchvision")
    from torchvision.datasets import ImageFolder

    _check_tree(path)
    try:
        return ImageFolder(str(path), transform, loader=_open_image)
    except FileNotFoundError as error:
        raise InputError(
            f"data={str(path)!r}: {error}; make a sub-folder per class, none empty"
        ) from error


def _check_tree(path: Path) -> None:
    """Raise InputError where a folder leads back to one that it is in, or cannot be read.

    A walk that follows links would give each image forty times over, and leave out what it may not
    read.
    """
    at = str(path)
    try:
        waiting = [(at, frozenset([_identity(at)]))]
        while waiting:
            folder, above = waiting.pop()
            at = folder
            with os.scandir(folder) as entries:
                for entry in entries:
                    at = entry.path
                    if not entry.is_dir():
                        continue
                    found = _identity(at)
                    if found in above:
                        raise InputError(
                            f"data={str(path)!r}: the folder {at!r} is a link to one that it is "
                            "in, so that its images would never end; remove it"
                        )
                    waiting.append((at, above | {found}))
    except OSError as error:
        raise InputError(
            f"data={str(path)!r}: {at!r} cannot be read ({brief(error)}); repair or remove it"
        ) from error


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def load_images(path: Path, image_size: int = 32) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """A folder with a sub-folder per class, whole in memory: ``(x [n, 3, s, s], y [n])``, classes.

    Raises:
        InputError: missing, empty or broken.
    """
    dataset = _open_folder(path, imagenet_preprocessing(image_size).transform)
    x = torch.stack([image for image, _ in dataset])
    return (x, torch.tensor(dataset.targets)), dataset.classes


def _image_folder(
    path: Path,
    count_classes: Callable[[Tensor], int],
    classes: Path | None,
    preprocessing: Preprocessing,
    batch_size: int,
) -> tuple[DataLoader, list[str]]:
    dataset = _open_folder(path, preprocessing.transform)
    try:
        count = count_classes(dataset[0][0][None])
    except InputError as error:
        raise InputError(f"{error} [{preprocessing.description}]") from error
    indices = class_indices(dataset.classes, count, classes, data=str(path))
    dataset.target_transform = indices.__getitem__
    names = [str(Path(name).relative_to(path)) for name, _ in dataset.samples]
    return DataLoader(dataset, batch_size=batch_size), names


def _arrays(
    path: Path, count_classes: Callable[[Tensor], int], batch_size: int
) -> tuple[DataLoader, list[str]]:
    x, y = read_arrays(path)
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise InputError(
            f"data={str(path)!r}: x is {x.dtype}; store what the model takes (float32)"
        )
    if y.dtype.kind not in "iu":
        raise InputError(f"data={str(path)!r}: y is {y.dtype}; store class indices (int64)")
    # PyTorch knows the machine's own byte order only.
    inputs = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), copy=False))
    count = count_classes(inputs[:1])
    wrong = (y < 0) | (y >= count)
    if wrong.any():
        first = int(wrong.argmax())
        raise InputError(
            f"data={str(path)!r}: y[{first}]={y[first]} is outside [0, {count}); "
            f"the model has {count} classes"
        )
    dataset = TensorDataset(inputs, torch.from_numpy(y.astype("int64")))
    return DataLoader(dataset, batch_size=batch_size), [str(i) for i in range(len(x))]


def read_arrays(path: Path) -> tuple[Any, Any]:
    """The arrays ``x`` [n, ...] and ``y`` [n] of an ``.npz``, n >= 1, as they are stored.

    Raises:
        InputError: missing, broken or not of these shapes.
    """
    if path.suffix != ".npz" or not path.is_file():
        raise InputError(
            f"data={str(path)!r} is neither a folder with a sub-folder per class nor an .npz file"
        )
    x, y = named_arrays(path, ("x", "y"), "x [n, ...] and y [n]")
    if x.ndim == 0 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
        raise InputError(
            f"data={str(path)!r}: x has shape {x.shape} and y {y.shape}; "
            "store x [n, ...] and y [n], n >= 1"
        )
    return x, y


def list_images(path: Path) -> tuple[list[str], list[int], list[str]]:
    """The images of a folder with a sub-folder per class, none of them opened.

    Returns:
        Their names within the folder and their sub-folders' places, in the order of
        :func:`load_data`; and the sub-folders, sorted.

    Raises:
        InputError: no sub-folder, or one without images.
    """
    dataset = _open_folder(path, _open_image)
    names = [str(Path(name).relative_to(path)) for name, _ in dataset.samples]
    return names, dataset.targets, dataset.classes
