"""``imu-fast evaluate``: loss and accuracy, of images and of text."""

from __future__ import annotations

import json as to_json
import math
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from imu_fast.cli.arguments import Images, Texts, grouped, is_text
from imu_fast.cli.devices import DeviceName, device_named


@grouped
def evaluate(
    images: Images,
    texts: Texts,
    data: Annotated[
        Path,
        typer.Option(
            help="Images: a folder with a sub-folder per class, or .npz (x, y). Text: .jsonl, "
            ".json or .csv."
        ),
    ],
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch; default 64 images, 8 texts.")
    ] = None,
    device: DeviceName = None,
    json: Annotated[
        bool, typer.Option("--json", help="JSON alone; what else is said goes to stderr.")
    ] = False,
) -> None:
    """Accuracy and mean loss of a model, as stored, on any data; nothing is written."""
    text = is_text(images, texts)
    place = device_named(device)
    with redirect_stdout(sys.stderr) if json else nullcontext():
        if text:
            found = _of_texts(texts, data, batch_size, place)
        else:
            found = _of_images(images, data, batch_size, place)
    if json:
        # JSON has no word for what is not finite.
        plain = {k: v if math.isfinite(v) else None for k, v in found.items()}
        typer.echo(to_json.dumps(plain, indent=1))
        return
    line = f"accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}, n {found['n']}"
    if "tokens" in found:
        line += f", tokens {found['tokens']}, loss per token {found['token_loss']:.4f}"
    typer.echo(line)


def _of_images(images: Images, data: Path, batch_size: int | None, place: Any) -> dict[str, Any]:
    from imu_fast.cli.image_models import opened

    model, loader, _ = opened(images, data, 64 if batch_size is None else batch_size, place)
    return _measured(model, loader)


def _of_texts(texts: Texts, data: Path, batch_size: int | None, place: Any) -> dict[str, Any]:
    from imu_fast.cli.text import opened
    from imu_fast.data.text_files import read_records

    read_records(data)  # before a model is read
    reader = opened(texts, batch_size, place)
    return _measured(reader.made.model, reader.read(data).loader)


def _measured(model: Any, loader: Any) -> dict[str, Any]:
    from imu_fast.evaluation.evaluate import evaluate as library

    found = library(model, loader)
    return {name: value for name, value in found.items() if name != "confidence"}
