"""A user's images: a folder with a sub-folder per class, or an ``.npz`` with arrays x and y."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from imu_fast.errors import InputError, check_count

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_data(
    path: Path, *, image_size: int = 224, batch_size: int = 64
) -> tuple[DataLoader, list[str]]:
    """A loader over ``path`` in a fixed order, and the name of every sample in that order.

    Args:
        path: a folder with one sub-folder per class (in alphabetical order, as
            torchvision.datasets.ImageFolder: resized, cropped, ImageNet's mean and deviation), or
            an ``.npz`` with ``x`` [n, ...] floating, taken as it is, and ``y`` [n] integers.

    Raises:
        InputError: missing, empty, or not of these forms.
    """
    check_count("image_size", image_size)
    check_count("batch_size", batch_size)
    if path.is_dir():
        return _image_folder(path, image_size, batch_size)
    if path.suffix == ".npz" and path.is_file():
        return _arrays(path, batch_size)
    raise InputError(
        f"data={str(path)!r} is neither a folder with a sub-folder per class nor an .npz file"
    )


def _image_folder(path: Path, image_size: int, batch_size: int) -> tuple[DataLoader, list[str]]:
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"data={str(path)!r} is an image folder, which needs torchvision ({error}); "
            "pip install 'imu_fast[demo]'"
        ) from error
    steps = [
        transforms.Resize(image_size),
        transforms.CenterCrop(image_size),
        transforms.ToTensor(),
        transforms.Normalize(*IMAGENET),
    ]
    try:
        dataset = ImageFolder(str(path), transforms.Compose(steps))
    except FileNotFoundError as error:
        raise InputError(f"data={str(path)!r}: {error}; make a sub-folder per class") from error
    names = [str(Path(name).relative_to(path)) for name, _ in dataset.samples]
    return DataLoader(dataset, batch_size=batch_size), names


def _arrays(path: Path, batch_size: int) -> tuple[DataLoader, list[str]]:
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        found: dict[str, Any] = {k: file[k] for k in ("x", "y") if k in file}
        keys = sorted(file)
    if len(found) < 2:
        raise InputError(f"data={str(path)!r} has arrays {keys}; it needs x [n, ...] and y [n]")
    x, y = torch.from_numpy(found["x"]), torch.from_numpy(found["y"])
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"data={str(path)!r}: x has {len(x)} samples and y {len(y)}")
    if not x.is_floating_point():
        raise InputError(
            f"data={str(path)!r}: x is {x.dtype}; store what the model takes (float32)"
        )
    dataset = TensorDataset(x, y.to(torch.int64))
    return DataLoader(dataset, batch_size=batch_size), [str(i) for i in range(len(x))]
