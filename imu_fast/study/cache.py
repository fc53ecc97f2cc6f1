"""Models that a comparison has trained, kept on disk: an interrupted one trains none twice.

A model's file is named by all that it depends on: settings, architecture, seed, task, the images
themselves. Inside it says its own name, so one that was put in the place of another is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError
from imu_fast.storage import load_tensors, save_tensors
from imu_fast.study.cells import Cell, digest
from imu_fast.study.configuration import Configuration
from imu_fast.study.data.tasks import Dataset, Samples
from imu_fast.study.networks import NETWORKS, train

# Raised whenever what an older version made must not be taken over.
_VERSION = 3
# A retrained model starts from other weights than the original: the reference is any model that
# never saw the forget set. Another retrained model (the second) starts from others again.
_RETRAINED_SEEDS = (10_000, 20_000)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def fingerprint(data: Dataset) -> str:
    """SHA-256 of every image and label, in their order, and of which part they are in."""
    found = hashlib.sha256()
    for part in (data.train, data.validation, data.test):
        for tensor in part:
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(_bytes(tensor))
    return found.hexdigest()[:16]


def known_images(x: Tensor) -> Tensor:
    """A number int64 [n] for each image [n, ...], of its content alone."""
    first = (hashlib.sha256(_bytes(image)).digest()[:8] for image in x)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in first])


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, shortened."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(_bytes(tensor))
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Contents:
    """What a seed's data are: their :func:`fingerprint`, and which images are trained on."""

    fingerprint: str
    trained_on: Tensor

    @classmethod
    def of(cls, data: Dataset) -> Contents:
        return cls(fingerprint(data), known_images(data.train[0]))


@dataclass(frozen=True)
class Cache:
    """The folder of one comparison's entries.

    Attributes:
        contents: the data of each seed.
    """

    folder: Path
    config: Configuration
    contents: Mapping[int, Contents]

    def _name(self, arch: str, seed: int, task: str) -> str:
        data = self.contents[seed].fingerprint
        depends = [_VERSION, self.config.training(), data, arch, seed, task]
        return digest(depends)[:12]

    def model(
        self,
        data: Dataset,
        arch: str,
        seed: int,
        *,
        without: str = "",
        rest: Samples | None = None,
        twin: bool = False,
    ) -> nn.Module:
        """The network of this architecture and seed, read or trained now.

        Args:
            without: the task whose forget set is left out, and ``rest`` what remains of it.
            twin: another such model, from other weights and in another order.

        Raises:
            InputError: the entry is damaged, or another's.
        """
        name = f"{without or 'original'}{'-twin' * twin}"
        key = self._name(arch, seed, name)
        path = self.folder / f"{arch}-{seed}-{name}-{key}.safetensors"
        x, y = data.train if rest is None else rest
        if path.is_file():
            state, metadata = load_tensors(path)
            if metadata.get("key") != key:
                raise _another(path, metadata.get("key"))
            model = NETWORKS[arch](x.shape[1], data.classes).to(memory_format=torch.channels_last)
            _check_fits(path, model.state_dict(), state)
            model.load_state_dict(state)
            return model.eval()
        model = train(
            arch,
            (x, y),
            data.classes,
            seed=seed + (_RETRAINED_SEEDS[twin] if without else 0),
            epochs=self.config.epochs,
            lr=self.config.lr,
            mirror=data.mirror,
        )
        save_tensors(path, model.state_dict(), {"key": key})
        return model

    def cell(self, arch: str, seed: int, task: str) -> Cell:
        """Where what is measured of one model on one task is kept."""
        key = self._name(arch, seed, task)
        return Cell(self.folder.parent / "cells" / f"{arch}-{seed}-{task}-{key[:6]}.json", key)


def _another(path: Path, found: object) -> InputError:
    return InputError(
        f"path={str(path)!r} is the entry of another model or run ({found!r}); delete it"
    )


def _check_fits(path: Path, ours: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    shapes = [{k: tuple(t.shape) for k, t in tensors.items()} for tensors in (ours, state)]
    if shapes[0] != shapes[1]:
        odd = sorted(k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k))
        raise InputError(
            f"path={str(path)!r} holds another network (differs in {', '.join(odd[:3])}); delete it"
        )
