"""``imu-fast index | query``: gradients of a training set in a folder, and who is asked of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from imu_fast.cli.arguments import Force, Images, Texts, grouped, is_text, layer_names
from imu_fast.cli.devices import DeviceName, device_named

BatchSize = Annotated[
    int | None, typer.Option(help="Samples per batch; default 64 images, 8 texts.")
]
_DTYPES = ("bfloat16", "float32", "float64")


@grouped
def index(
    images: Images,
    texts: Texts,
    data: Annotated[
        Path,
        typer.Option(
            help="Training set. Images: a folder with a sub-folder per class, or .npz (x, y). "
            "Text: .jsonl, .json or .csv."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="The index's folder: new, or one to go on in, begun by the same call."),
    ] = Path("imu-fast-index"),
    layers: Annotated[
        str | None,
        typer.Option(help="Linear layers: names or patterns, commas between; default: the head."),
    ] = None,
    projection: Annotated[
        int | None,
        typer.Option(help="Numbers per sample and layer, by random projection; default: exact."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of --projection; default 0.")] = None,
    index_dtype: Annotated[
        str | None,
        typer.Option(help="What is stored: bfloat16, float32, float64; default: as captured."),
    ] = None,
    batch_size: BatchSize = None,
    device: DeviceName = None,
) -> None:
    """Store the gradients of a training set, for queries that come later; resumable."""
    from imu_fast.cli.index_files import Names, opened_samples
    from imu_fast.errors import InputError, check_count, check_seed

    text, place = is_text(images, texts), device_named(device)
    if index_dtype is not None and index_dtype not in _DTYPES:
        raise InputError(f"index_dtype={index_dtype!r}; choose one of {', '.join(_DTYPES)}")
    if projection is not None:
        check_count("projection", projection)
    if seed is not None:
        check_seed("seed", seed)
        if projection is None:
            raise InputError(f"seed={seed} without --projection: nothing is drawn; leave it out")
    chosen = "head" if layers is None else layer_names(layers)
    Names.check(out)
    model, loader, names, _ = opened_samples(images, texts, text, data, batch_size, place)
    import torch

    from imu_fast.attribution.index import build_index

    made = build_index(
        model,
        loader,
        out,
        layers=chosen,
        projection=projection,
        seed=seed,
        dtype=None if index_dtype is None else getattr(torch, index_dtype),
        progress=sys.stderr.isatty(),
    )
    Names(names).write(out)
    size = f"{made.nbytes / 1e6:.1f} MB"
    typer.echo(f"{made.n} samples at {', '.join(made.layers)}, {size}, in {out}/")


@grouped
def query(
    images: Images,
    texts: Texts,
    data: Annotated[
        Path,
        typer.Option(
            help="Queries. Images: a folder with a sub-folder per class, or .npz (x, y). Text: "
            ".jsonl, .json or .csv."
        ),
    ],
    index: Annotated[Path, typer.Option(help="Folder that imu-fast index has made.")] = Path(
        "imu-fast-index"
    ),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Of text .jsonl, the lines and their top samples; .csv or .parquet: a row per "
            "query and sample; .npz: all influences [n, m]. Default: top.csv, top.jsonl."
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="Training samples per query; default 10, or all there are.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="helpful (default), harmful or magnitude.")] = None,
    curvature: Annotated[
        str | None,
        typer.Option(
            help="identity, fisher_diag, fisher, ggn, ggn_block, kfac or ekfac; of a projected "
            "index identity or fisher; at inner layers ggn, ggn_block, kfac and ekfac with "
            "--fisher empirical. Default: the library's for attribution."
        ),
    ] = None,
    damping: Annotated[float | None, typer.Option(help="> 0, of --curvature.")] = None,
    damping_mode: Annotated[
        str | None, typer.Option(help="Of --curvature: add, relative or clamp.")
    ] = None,
    fisher: Annotated[
        str | None,
        typer.Option(
            help="Of ggn, ggn_block, kfac and ekfac: auto, exact (the head) or empirical."
        ),
    ] = None,
    batch_size: BatchSize = None,
    device: DeviceName = None,
    force: Force = False,
) -> None:
    """Which training samples of an index help or harm on each query, and by how much."""
    from imu_fast.attribution.index import load_index
    from imu_fast.cli.index_files import Answers, Names, check_lines, opened_samples
    from imu_fast.curvature.named import CURVATURES
    from imu_fast.errors import InputError, check_choice, check_count

    text, place = is_text(images, texts), device_named(device)
    out = Path("top.jsonl" if text else "top.csv") if out is None else out
    Answers.check(out, text, force, data=data, weights=images.weights, index=index)
    whole = out.suffix == ".npz"
    for name, value in (("top", top), ("by", by)):
        if whole and value is not None:
            raise InputError(
                f"{name}={value!r}: a .npz has all samples; leave it out, or write a .csv"
            )
    check_choice("by", "helpful" if by is None else by, ("helpful", "harmful", "magnitude"))
    made: dict[str, Any] = {"damping": damping, "damping_mode": damping_mode, "fisher": fisher}
    given = {name: value for name, value in made.items() if value is not None}
    spec = None if curvature is None else CURVATURES.choose(curvature, **given)
    found = load_index(index)
    names = Names.read(index, found.n)
    if top is not None and check_count("top", top) > found.n:
        raise InputError(f"top={top} is more than the {found.n} samples of the index")
    if text:
        check_lines(data, out)
    model, loader, asked, lines = opened_samples(images, texts, text, data, batch_size, place)
    queries = found.capture(model, loader, progress=sys.stderr.isatty())
    how: Any = {} if spec is not None else given
    if whole:
        scores = found.scores(queries, curvature=spec, **how)
        answers = Answers(names, asked, scores.T, None, lines)
    else:
        k = min(10, found.n) if top is None else top
        most: Any = "helpful" if by is None else by
        values, places = found.top(queries, k, by=most, curvature=spec, **how)
        answers = Answers(names, asked, values, places, lines)
    answers.write(out)
    typer.echo(f"{len(asked)} queries against {found.n} samples, written to {out}")
