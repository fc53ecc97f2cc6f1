"""CIFAR-10 out of one ``.npz`` of JPEG files (Krizhevsky 2009)."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_installed

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def load(path: Path, split: str, count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32], normalised by CIFAR-10's mean and deviation, and labels [n].

    Args:
        path: the ``.npz`` with ``{split}_bytes`` (all files concatenated), ``{split}_offsets`` and
            ``{split}_labels``. split: "train" or "test".
        count: a seeded random subset of this size; None: all, in shuffled order.

    Raises:
        InputError: the file is missing or of another form.
    """
    check_installed(f"data={str(path)!r}", "PIL")
    import numpy as np
    from PIL import Image

    if not path.is_file():
        raise InputError(f"data={str(path)!r} does not exist; name the .npz of JPEG files")
    with np.load(path, allow_pickle=False) as file:
        keys = [f"{split}_{part}" for part in ("bytes", "offsets", "labels")]
        if not set(keys) <= set(file):
            raise InputError(f"data={str(path)!r} has arrays {sorted(file)}; it needs {keys}")
        raw, offsets, labels = (file[key] for key in keys)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    images = np.empty((len(order), 32, 32, 3), dtype=np.uint8)
    for out, i in zip(images, order.tolist(), strict=True):
        with Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]].tobytes())) as image:
            out[...] = np.asarray(image.convert("RGB"))
    return normalised(torch.from_numpy(images)), torch.from_numpy(
        labels[order.numpy()].astype("int64")
    )


def normalised(images: Tensor) -> Tensor:
    """uint8 [n, 32, 32, 3] to float32 [n, 3, 32, 32], by CIFAR-10's mean and deviation."""
    x = images.permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    return ((x - mean) / std).contiguous()


def load_torchvision(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """The same out of torchvision's own files (``cifar-10-batches-py`` in ``folder``), all of them.

    Raises:
        InputError: the files are not there.
    """
    check_installed(f"data_path={str(folder)!r}", "torchvision")
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(str(folder), train=split == "train")
    except RuntimeError as error:
        raise InputError(f"data_path={str(folder)!r} holds no CIFAR-10: {error}") from error
    return normalised(torch.from_numpy(data.data)), torch.tensor(data.targets)
