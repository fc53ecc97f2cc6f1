"""The command line: ``imu-fast demo | score | unlearn | compare | doctor``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from imu_fast.errors import ImuFastError, InputError, check_count, check_installed

app = typer.Typer(
    help="Influence-guided machine unlearning: score, reweight, unlearn.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arch = Annotated[
    str,
    typer.Option(
        help="torchvision:NAME, timm:NAME, transformers:FOLDER, or MODULE:FUNCTION of your own, "
        "which returns the model, or the model and how an image becomes its input."
    ),
]
Weights = Annotated[Path, typer.Option(help="State dict: .safetensors, or a torch file.")]
Data = Annotated[
    Path, typer.Option(help="Forget set: a folder with a sub-folder per class, or .npz (x, y).")
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="Which class a sub-folder of --data is: a text file with one class name per line in "
        "the order of the model's outputs, or the training set's folder. Without it, names that "
        "are whole numbers are the class indices, and other names must be all classes, sorted."
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Pixels of the images of a folder; without it the model's own."),
]
BatchSize = Annotated[int, typer.Option(help="Samples per batch.")]


def _clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Our own errors as one line and exit code 2; any other is a bug and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ImuFastError as error:
            typer.echo("error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(2) from None

    return wrapped


def _console() -> Any:
    from rich.console import Console

    # Wide enough for the tables where the width is unknown (a pipe, a log file).
    return Console() if sys.stdout.isatty() else Console(width=118)


def _opened(
    arch: str,
    weights: Path,
    data: Path,
    classes: Path | None,
    image_size: int | None,
    batch_size: int,
) -> tuple[Any, Any, list[str]]:
    """The model, its samples in batches, and their names; says how images become inputs."""
    from imu_fast.cli.model_files import build_model, count_classes
    from imu_fast.cli.preprocessing import preprocessing_of
    from imu_fast.data.image_files import load_data

    model = build_model(arch, weights)
    preprocessing = preprocessing_of(data, arch, model, weights, image_size)
    if preprocessing is not None:
        typer.echo(preprocessing.description)
    loader, names = load_data(
        data,
        functools.partial(count_classes, model),
        preprocessing=preprocessing,
        classes=classes,
        batch_size=batch_size,
    )
    return model, loader, names


def _version(value: bool) -> None:
    if value:
        from imu_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Influence-guided machine unlearning: score, reweight, unlearn."""


@app.command()
@_clean_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for plots and results.json.")] = Path(
        "imu-fast-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the split, the training and the runs.")] = 0,
    quick: Annotated[bool, typer.Option(help="Fewer methods, shorter training.")] = False,
) -> None:
    """Unlearn real digits by IMU and its rivals, all at the same depth; table, plots, JSON."""
    check_installed("the demo", "matplotlib", "sklearn")
    from imu_fast.cli.score_files import check_folder, writing
    from imu_fast.study.demo import run
    from imu_fast.study.report.demo_table import demo_table

    check_count("seed", seed, minimum=0)
    check_folder(out, out)
    with writing(out):
        results = run(out, seed=seed, quick=quick)
    console = _console()
    console.print(demo_table(results))
    console.print(f"{len(results['files'])} plots and results.json are in {out}/")


@app.command()
@_clean_errors
def score(
    arch: Arch,
    weights: Weights,
    data: Data,
    out: Annotated[Path, typer.Option(help="Scores: .npz, .parquet or .csv.")] = Path("scores.csv"),
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
    classes: Classes = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64,
) -> None:
    """Score every sample of a forget set by its influence at the classifier."""
    import torch

    from imu_fast.cli.score_files import check_ending, check_out, save_scores, write_or_rescue
    from imu_fast.curvature.named import CURVATURES
    from imu_fast.influence.scores import influence_scores
    from imu_fast.influence.weights import influence_weights

    check_ending(out)
    check_out(out)
    spec = CURVATURES.choose(curvature, damping=damping, damping_mode=damping_mode)
    model, loader, names = _opened(arch, weights, data, classes, image_size, batch_size)
    scores = influence_scores(model, loader, curvature=spec, progress=sys.stderr.isatty())
    selected, kept = influence_weights(scores, on_empty="uniform")
    weight = torch.zeros_like(scores).index_put_((selected,), kept)
    write_or_rescue(out, lambda path: save_scores(path, names, scores, weight))
    typer.echo(f"{len(scores)} scores, {int((scores < 0).sum())} negative, written to {out}")


@app.command()
@_clean_errors
def unlearn(
    arch: Arch,
    weights: Weights,
    data: Data,
    out: Annotated[Path, typer.Option(help="Unlearned weights, .safetensors.")] = Path(
        "unlearned.safetensors"
    ),
    method: Annotated[
        str, typer.Option(help="auto, imu, uniform, npo, margin_edit, ...: imu_fast.methods().")
    ] = "imu",
    preset: Annotated[str | None, typer.Option(help="paper: as the authors' code.")] = None,
    scope: Annotated[str | None, typer.Option(help="head, layers or all.")] = None,
    objective: Annotated[str | None, typer.Option(help="ce, margin or log1mp.")] = None,
    precondition: Annotated[str | None, typer.Option(help="features, ggn or kfac.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of SGD; default 0.01.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget; default 10.")] = None,
    stop_accuracy: Annotated[
        float | None, typer.Option(help="Stop at this forget accuracy, in [0, 1].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the batch order.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Resume from, and save each epoch to, this file.")
    ] = None,
    classes: Classes = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = 64,
) -> None:
    """Make a checkpoint forget a set of samples."""
    from imu_fast.cli.score_files import check_out, write_or_rescue
    from imu_fast.storage import save_tensors
    from imu_fast.unlearning.checkpoint import check_resumable
    from imu_fast.unlearning.depth import StopRule
    from imu_fast.unlearning.named import METHODS
    from imu_fast.unlearning.unlearn import unlearn as run

    if out.suffix != ".safetensors":
        raise InputError(f"out={str(out)!r} must end in .safetensors")
    check_out(out)
    if checkpoint is not None:
        check_out(checkpoint, "checkpoint")
        check_resumable(checkpoint)
    stop = None if stop_accuracy is None else StopRule(forget_accuracy=stop_accuracy)
    given: dict[str, Any] = {
        "preset": preset,
        "scope": scope,
        "objective": objective,
        "lr": lr,
        "epochs": epochs,
    }
    given |= {"precondition": precondition}
    if method != "auto" and method in METHODS and "batch_size" in METHODS[method].paths():
        given["batch_size"] = batch_size
    how = METHODS.choose(method, **given)
    model, loader, _ = _opened(arch, weights, data, classes, image_size, batch_size)
    check_out(out, size=sum(tensor.nbytes for tensor in model.state_dict().values()))
    result = run(
        model,
        loader,
        how,
        stop=stop,
        seed=seed,
        checkpoint=checkpoint,
        progress=sys.stderr.isatty(),
    )
    write_or_rescue(out, lambda path: save_tensors(path, model.state_dict(), {"format": "pt"}))
    first, last = result.trajectory[0], result.trajectory[-1]
    typer.echo(
        f"forget accuracy {first['forget_accuracy']:.3f} -> {last['forget_accuracy']:.3f} in "
        f"{result.steps} steps ({result.stopped_by}); written to {out}"
    )


@app.command()
@_clean_errors
def compare(
    config: Annotated[
        Path | None, typer.Option(help="A yaml file of the settings below; flags win.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="digits, cifar10 or folder.")] = None,
    data_path: Annotated[
        Path | None, typer.Option(help="CIFAR-10 files, or a folder with train/ and test/.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results, report and cache.")] = Path(
        "imu-fast-compare"
    ),
    archs: Annotated[str | None, typer.Option(help="resnet,vgg")] = None,
    tasks: Annotated[str | None, typer.Option(help="class,random-1,random-5,...")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names with semicolons between, or all; digits: a few."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Models per architecture.")] = None,
    train: Annotated[int | None, typer.Option(help="Training images, drawn by seed.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of training.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Budget of a run.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes side by side.")] = None,
) -> None:
    """Compare methods at matched depth, over seeds and architectures; table, plots, HTML."""
    check_installed("compare", "jinja2", "matplotlib", "scipy", "sklearn", "statsmodels")
    from imu_fast.cli.score_files import check_folder, writing
    from imu_fast.study.comparison import run
    from imu_fast.study.configuration import Configuration
    from imu_fast.study.report.report import comparison_table, write_report

    flags = {
        "data": data,
        "data_path": None if data_path is None else str(data_path),
        "archs": archs,
        "tasks": tasks,
        "methods": None if methods is None else [m.strip() for m in methods.split(";")],
        "seeds": seeds,
        "train": train,
        "epochs": epochs,
        "max_steps": max_steps,
        "workers": workers,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = Configuration.of(given) if config is None else Configuration.read(config, given)
    check_folder(out, out)
    with writing(out):
        results, trajectories = run(settings, out)
        files = write_report(results, trajectories, out)
    _console().print(comparison_table(results))
    typer.echo(f"results.json, {', '.join(files)} are in {out}/")


@app.command()
def doctor() -> None:
    """Say what is available here, and how to get what is not."""
    from imu_fast.cli.doctor import diagnose
    from imu_fast.study.report.demo_table import key_value_table

    rows: list[tuple[str, ...]] = list(diagnose())
    table = key_value_table("imu-fast doctor", rows, ("component", "here", "for"))
    _console().print(table)
