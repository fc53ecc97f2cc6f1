"""What a comparison has made, kept on disk: an interrupted one makes nothing twice.

An entry is named by all that it depends on: settings, architecture, seed, task, the images
themselves. Inside it says its own name and a checksum, so one that was damaged, or put in the place
of another, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imu_fast.errors import InputError, brief
from imu_fast.storage import load_tensors, replacing, save_tensors
from imu_fast.study.configuration import Configuration
from imu_fast.study.data.tasks import Dataset, Samples
from imu_fast.study.networks import NETWORKS, train

# Raised whenever what an older version made must not be taken over.
_VERSION = 2
# A retrained model starts from other weights than the original: the reference is any model that
# never saw the forget set.
_RETRAINED_SEED = 10_000


def fingerprint(data: Dataset) -> str:
    """SHA-256 of every image and label, in their order, and of which part they are in."""
    found = hashlib.sha256()
    for part in (data.train, data.validation, data.test):
        for tensor in part:
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """The folder of one comparison's entries.

    Attributes:
        contents: the data of each seed, by :func:`fingerprint`.
    """

    folder: Path
    config: Configuration
    contents: Mapping[int, str]

    def _name(self, arch: str, seed: int, task: str, *further: Any) -> str:
        depends = [_VERSION, self.config.training(), self.contents[seed], arch, seed, task]
        return _digest([*depends, *further])[:12]

    def model(
        self, data: Dataset, arch: str, seed: int, *, without: str = "", rest: Samples | None = None
    ) -> nn.Module:
        """The network of this architecture and seed, read or trained now.

        Args:
            without: the task whose forget set is left out, and ``rest`` what remains of it.

        Raises:
            InputError: the entry is damaged, or another's.
        """
        key = self._name(arch, seed, without)
        path = self.folder / f"{arch}-{seed}-{without or 'original'}-{key}.safetensors"
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
            seed=seed + (_RETRAINED_SEED if without else 0),
            epochs=self.config.epochs,
            lr=self.config.lr,
            mirror=data.mirror,
        )
        save_tensors(path, model.state_dict(), {"key": key})
        return model

    def run(
        self, arch: str, seed: int, task: str, name: str, extra: Any, make: Callable[[], Any]
    ) -> Any:
        """What ``make`` returns (for JSON) for one method on one model and task, or has returned.

        Raises:
            InputError: the entry is damaged, or another's.
        """
        key = self._name(arch, seed, task, self.config.max_steps, name, extra)
        slug = "".join(c if c.isalnum() else "-" for c in name)
        path = self.folder / "runs" / f"{arch}-{seed}-{task}-{slug}-{key}.json"
        if not path.is_file():
            value = make()
            entry = {"key": key, "checksum": _digest(value), "value": value}
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(entry, indent=1) + "\n")
        try:
            entry = json.loads(path.read_text())
            found, value = entry["key"], entry["value"]
            whole = entry["checksum"] == _digest(value)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _damaged(path, brief(error)) from error
        if not whole:
            raise _damaged(path, "by its checksum")
        if found != key:
            raise _another(path, found)
        return value


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"path={str(path)!r} is damaged ({why}); delete it")


def _another(path: Path, found: Any) -> InputError:
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
