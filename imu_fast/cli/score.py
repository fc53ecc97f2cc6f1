"""``imu-fast score``: of images, and of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from imu_fast.cli.arguments import Force, ForgetData, Images, Texts, grouped, is_text, layer_names
from imu_fast.cli.devices import DeviceName, device_named
from imu_fast.cli.processes import joined


@grouped
def score(
    images: Images,
    texts: Texts,
    data: ForgetData,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Scores: .csv, .parquet or .npz; of text also .jsonl, the lines and their "
            "scores. Default: scores.csv, scores.jsonl."
        ),
    ] = None,
    curvature: Annotated[
        str, typer.Option(help="identity, fisher_diag, fisher, ggn, ggn_block, kfac or ekfac.")
    ] = "fisher_diag",
    damping: Annotated[
        float | None, typer.Option(help="> 0; default 0.01. identity has none.")
    ] = None,
    damping_mode: Annotated[
        str | None,
        typer.Option(help="add (default), relative (to the mean eigenvalue) or clamp."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Linear layers: names or patterns, commas between; default: the head."),
    ] = None,
    self_influence: Annotated[
        bool, typer.Option("--self-influence", help="A column more: each with itself.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch; default 64 images, 8 texts.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Go on from, and keep each part of the samples that is done in, this folder."
        ),
    ] = None,
    device: DeviceName = None,
    force: Force = False,
) -> None:
    """Score every sample of a forget set by its influence at the classifier."""
    from imu_fast.cli.score_files import (
        check_apart,
        check_ending,
        check_free,
        check_out,
        save_scores,
        write_or_rescue,
    )
    from imu_fast.curvature.named import CURVATURES

    spec = CURVATURES.choose(curvature, damping=damping, damping_mode=damping_mode)
    chosen = "head" if layers is None else layer_names(layers)
    text, place = is_text(images, texts), device_named(device)
    with joined(place, "imu-fast score") as here:
        kept = None
        if checkpoint is not None:
            kept = _checkpoint(checkpoint, images, texts, data, f"{chosen} {batch_size}")
        if text:
            from imu_fast.cli.text import score_lines

            how = (spec, chosen, self_influence)
            score_lines(texts, data, out, how, batch_size, place, force, here, kept)
            return
        from imu_fast.cli.image_models import opened
        from imu_fast.cli.influences import influences, said

        out = Path("scores.csv") if out is None else out
        check_ending(out)
        check_apart("out", out, data=data, weights=images.weights)
        check_out(out)
        check_free(out, force)
        size = 64 if batch_size is None else batch_size
        model, loader, names = opened(images, data, size, place)
        columns, _ = influences(model, loader, spec, chosen, self_influence, here, kept)
        named = {"influence": columns.pop("score"), **columns}
        if here.first:
            write_or_rescue(out, lambda path: save_scores(path, names, named))
        said(named["influence"], out)


def _checkpoint(folder: Path, images: Images, texts: Texts, data: Path, rest: str) -> Any:
    """What parts of this run are of; the model's weights come once it is there."""
    from imu_fast.cli.chunks import Checkpoint, digest_of
    from imu_fast.errors import InputError

    if not data.exists():
        raise InputError(f"data={str(data)!r} does not exist; check the name")
    belongs = {"reading": f"{images} {texts} {rest}", "data": digest_of(data)}
    return Checkpoint(folder, belongs)
