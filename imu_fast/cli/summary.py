"""``imu-fast summary``: what is kept of a training set of images to forget some of it later."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from imu_fast.cli.arguments import Force, Images, grouped, layer_names
from imu_fast.cli.devices import DeviceName, device_named
from imu_fast.errors import InputError


@grouped
def summary(
    images: Images,
    data: Annotated[
        Path,
        typer.Option(
            help="The training set, without augmentation: a folder with a sub-folder per class, or "
            ".npz (x, y)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A .safetensors file.")] = Path("summary.safetensors"),
    weight_decay: Annotated[float, typer.Option(help="Of the training, as SGD's.", min=0)] = 0.0,
    unseen: Annotated[
        str | None,
        typer.Option(
            help="The model's accuracy on data that it never saw, in [0, 1], or such data, read as "
            "--data is: how deep random samples go."
        ),
    ] = None,
    inner_layers: Annotated[
        str,
        typer.Option(
            help="Layers before the head that are kept too, for self-distillation: names or "
            "patterns, commas between; auto: the last three that fit; none."
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    device: DeviceName = None,
    force: Force = False,
) -> None:
    """Keep of a training set what forgetting some of it needs: sums over samples, no sample."""
    from imu_fast.cli.image_models import opened
    from imu_fast.cli.score_files import check_apart, check_free, check_out
    from imu_fast.unlearning.summary.saving import save_summary

    if out.suffix != ".safetensors":
        raise InputError(f"out={str(out)!r} must end in .safetensors")
    check_apart("out", out, data=data, weights=images.weights)
    check_out(out)
    check_free(out, force)
    place = device_named(device)
    known: Any = unseen
    if unseen is not None:
        try:
            known = float(unseen)
        except ValueError:
            if not Path(unseen).exists():
                raise InputError(
                    f"unseen={unseen!r} is neither an accuracy in [0, 1] nor a file or folder that "
                    "is there"
                ) from None
            known = opened(images, Path(unseen), batch_size, place)[1]
    model, loader, _ = opened(images, data, batch_size, place)
    found = save_summary(
        model,
        loader,
        out,
        weight_decay=weight_decay,
        unseen=known,
        inner_layers=_inner(inner_layers),
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"{found!r}; written to {out}")


def _inner(given: str) -> Any:
    if given in ("auto", "none"):
        return "auto" if given == "auto" else None
    return layer_names(given, "inner_layers")
