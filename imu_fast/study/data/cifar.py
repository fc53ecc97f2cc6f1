"""CIFAR-10 out of one ``.npz`` of JPEG files (Krizhevsky 2009)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imu_fast.data.arrays import named_arrays
from imu_fast.errors import InputError, brief, check_installed

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
    keys = [f"{split}_{part}" for part in ("bytes", "offsets", "labels")]
    raw, offsets, labels = named_arrays(path, keys, ", ".join(keys))
    _check_files(str(path), raw, offsets, labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    images = np.empty((len(order), 32, 32, 3), dtype=np.uint8)
    for out, i in zip(images, order.tolist(), strict=True):
        try:
            with Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]].tobytes())) as image:
                out[...] = np.asarray(image.convert("RGB"))
        # What Pillow's decoders raise, and numpy on an image of another size.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(
                f"data={str(path)!r}: image {i} of {split} is none of 32x32 ({brief(error)})"
            ) from error
    return normalised(torch.from_numpy(images)), torch.from_numpy(
        labels[order.numpy()].astype("int64")
    )


def _check_files(path: str, raw: Any, offsets: Any, labels: Any) -> None:
    """Raise InputError unless bytes, offsets [n+1] and labels [n] in [0, 10) belong together."""
    integers = offsets.dtype.kind in "iu" and labels.dtype.kind in "iu"
    if raw.dtype != "uint8" or raw.ndim != 1 or not integers:
        raise InputError(
            f"data={path!r} has bytes of {raw.dtype} {raw.shape}, offsets of {offsets.dtype} and "
            f"labels of {labels.dtype}; they must be uint8 [bytes], and integers"
        )
    if offsets.ndim != 1 or labels.ndim != 1 or len(offsets) != len(labels) + 1:
        raise InputError(
            f"data={path!r} has offsets {offsets.shape} and labels {labels.shape}; they must be "
            "[n+1] and [n]"
        )
    if offsets[0] != 0 or offsets[-1] != len(raw) or (offsets[1:] < offsets[:-1]).any():
        raise InputError(f"data={path!r}: offsets must rise from 0 to the {len(raw)} bytes")
    if ((labels < 0) | (labels > 9)).any():
        raise InputError(f"data={path!r} has labels outside [0, 10)")


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
