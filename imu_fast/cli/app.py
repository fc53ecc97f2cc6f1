"""The command line: ``imu-fast``, a command per line of its ``--help``."""

from __future__ import annotations

import json as to_json
from pathlib import Path
from typing import Annotated

import typer

from imu_fast.cli.check import check
from imu_fast.cli.console import clean_errors, console
from imu_fast.cli.evaluate import evaluate
from imu_fast.cli.index import index, query
from imu_fast.cli.score import score
from imu_fast.cli.split import split
from imu_fast.cli.summary import summary
from imu_fast.cli.unlearn import unlearn
from imu_fast.errors import check_installed, check_seed

app = typer.Typer(
    help="Influence-guided machine unlearning: score, reweight, unlearn.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
@clean_errors
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

    check_seed("seed", seed)
    check_folder(out, out)
    with writing(out):
        results = run(out, seed=seed, quick=quick)
    console().print(demo_table(results))
    typer.echo(f"{len(results['files'])} plots and results.json are in {out}/")


app.command()(clean_errors(split))
app.command()(clean_errors(score, processes=True))
app.command()(clean_errors(unlearn, processes=True))
app.command()(clean_errors(summary))
app.command()(clean_errors(evaluate, processes=True))
app.command()(clean_errors(index))
app.command()(clean_errors(query))
app.command()(clean_errors(check, processes=True))


@app.command()
@clean_errors
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
    tasks: Annotated[str | None, typer.Option(help="class-3,random-1,random-5,...")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names with semicolons between, or all; digits: a few."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Models per architecture.")] = None,
    train: Annotated[int | None, typer.Option(help="Training images, drawn by seed.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of training.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Budget of a run.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes side by side.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Begin nothing more after that long; the same command goes on.", min=0),
    ] = None,
) -> None:
    """Compare methods at matched depth with retraining: table, plots, HTML."""
    check_installed("compare", "jinja2", "matplotlib", "scipy", "sklearn")
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
        results = run(settings, out, minutes=minutes)
        files = write_report(results, out)
    console().print(comparison_table(results))
    typer.echo(f"results.json, {', '.join(files)} are in {out}/")


@app.command()
@clean_errors
def compare_language(
    data: Annotated[str, typer.Option(help="markov (drawn here) or tofu.")] = "markov",
    data_path: Annotated[
        Path | None, typer.Option(help="tofu: .jsonl of split, index, question, answer.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results, table, cells and cache.")] = Path(
        "imu-fast-compare-language"
    ),
    seeds: Annotated[int, typer.Option(help="Originals, each with two retrained models.")] = 5,
    methods: Annotated[str, typer.Option(help="Names with semicolons between, or all.")] = "all",
    workers: Annotated[int, typer.Option(help="Processes side by side.")] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(help="Begin nothing more after that long; the same command goes on.", min=0),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny, for a first look.")] = False,
) -> None:
    """Small language models, trained here: methods at matched depth with retraining."""
    check_installed("compare-language", "transformers", install="'imu_fast[demo,text]'")
    check_installed("compare-language", "scipy", "rouge_score")
    from imu_fast.cli.score_files import check_folder, writing
    from imu_fast.study.language.named import experiment_named
    from imu_fast.study.language.report import language_table
    from imu_fast.study.language.run import run

    experiment = experiment_named(data, data_path, quick=quick)
    names = tuple(name.strip() for name in methods.split(";"))
    check_folder(out, out)
    with writing(out):
        results = run(experiment, out, seeds=seeds, methods=names, workers=workers, minutes=minutes)
    console().print(language_table(results))
    typer.echo(f"results.json and table.md are in {out}/")


@app.command()
@clean_errors
def validate(
    data: Annotated[str, typer.Option(help="digits or cifar10.")] = "digits",
    data_path: Annotated[Path | None, typer.Option(help="CIFAR-10 files.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results, table, figure and cache.")] = Path(
        "imu-fast-validate"
    ),
    subsets: Annotated[int, typer.Option(help="Random halves that are retrained.")] = 50,
    repeats: Annotated[int, typer.Option(help="Models per half, averaged.")] = 2,
    seed: Annotated[int, typer.Option(help="Of data, halves and training.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Small, for a first look.")] = False,
) -> None:
    """Are the scores right? Compare them with models retrained on random halves; resumable."""
    check_installed("validate", "matplotlib", "scipy", "sklearn")
    from imu_fast.cli.score_files import check_folder, writing
    from imu_fast.study.validation import run, validation_table

    check_folder(out, out)
    with writing(out):
        results = run(
            data,
            out,
            data_path=data_path,
            subsets=subsets,
            repeats=repeats,
            seed=seed,
            quick=quick,
        )
    console().print(validation_table(results))
    typer.echo(f"results.json, table.md and lds.png are in {out}/")


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> None:
    """Say what is available here, and how to get what is not."""
    from imu_fast.cli.doctor import diagnose, report
    from imu_fast.study.report.demo_table import key_value_table

    if json:
        typer.echo(to_json.dumps(report(), indent=1))
        return
    rows: list[tuple[str, ...]] = [one.row for one in diagnose()]
    table = key_value_table("imu-fast doctor", rows, ("component", "here", "for"))
    console().print(table)
