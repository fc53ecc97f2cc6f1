"""A model of images and its samples, as a user names them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import typer

from imu_fast.cli.arguments import Images


def opened(images: Images, data: Path, batch_size: int, device: Any) -> tuple[Any, Any, list[str]]:
    """The model, its samples in batches, and their names; says how images become inputs."""
    from imu_fast.cli.model_files import build_model, count_classes
    from imu_fast.cli.preprocessing import preprocessing_of
    from imu_fast.data.image_files import load_data

    assert images.arch is not None and images.weights is not None  # is_text has asked
    model = build_model(images.arch, images.weights).to(device)
    preprocessing = preprocessing_of(data, images.arch, model, images.weights, images.image_size)
    if preprocessing is not None:
        typer.echo(preprocessing.description)
    loader, names = load_data(
        data,
        functools.partial(count_classes, model),
        preprocessing=preprocessing,
        classes=images.classes,
        batch_size=batch_size,
    )
    return model, loader, names
