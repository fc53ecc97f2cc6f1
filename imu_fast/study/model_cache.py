"""Trained models of a comparison, kept on disk: an interrupted comparison trains none twice."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from imu_fast.storage import load_tensors, save_tensors
from imu_fast.study.configuration import Configuration
from imu_fast.study.data.tasks import Dataset, Samples
from imu_fast.study.networks import NETWORKS, train

# A retrained model starts from other weights than the original: the reference is any model that
# never saw the forget set.
_RETRAINED_SEED = 10_000


def trained_model(
    config: Configuration,
    folder: Path,
    data: Dataset,
    arch: str,
    seed: int,
    *,
    without: str = "",
    samples: Samples | None = None,
) -> nn.Module:
    """The network of this architecture and seed, from the cache or trained now.

    Args:
        without: the task whose forget set is left out, and ``samples`` what remains of it.
    """
    path = folder / f"{arch}-{seed}-{without or 'original'}-"
    key = config.training_key(arch, seed, without)
    path = path.with_name(f"{path.name}{key}.safetensors")
    x, y = data.train if samples is None else samples
    if path.is_file():
        model = NETWORKS[arch](x.shape[1], data.classes).to(memory_format=torch.channels_last)
        model.load_state_dict(load_tensors(path)[0])
        return model.eval()
    model = train(
        arch,
        (x, y),
        data.classes,
        seed=seed + (_RETRAINED_SEED if without else 0),
        epochs=config.epochs,
        lr=config.lr,
        mirror=data.mirror,
    )
    save_tensors(path, model.state_dict(), {"key": key})
    return model
