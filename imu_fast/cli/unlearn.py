"""``imu-fast unlearn``: of images, and of text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from imu_fast.cli.arguments import Images, Texts, given, grouped, is_text
from imu_fast.cli.devices import device_named
from imu_fast.cli.processes import Processes, alone, joined
from imu_fast.cli.runs import How, Run, TextRun, with_batch_size
from imu_fast.errors import InputError


@grouped
def unlearn(images: Images, texts: Texts, run: Run, how: How, more: TextRun) -> None:
    """Make a checkpoint forget a set of samples."""
    run.stop()
    if is_text(images, texts):
        alone("unlearn --model")
        from imu_fast.cli.text_unlearning import unlearn_lines

        unlearn_lines(texts, run, how, more)
        return
    if extra := given(more):
        raise InputError(f"{', '.join(extra)}: for texts, with --model; leave it out with --arch")
    place = device_named(run.device)
    with joined(place, "imu-fast unlearn") as here:
        _unlearn_images(images, run, how, place, here)


def _unlearn_images(images: Images, run: Run, how: How, place: Any, here: Processes) -> None:
    from imu_fast.cli.image_models import opened
    from imu_fast.cli.score_files import check_free, check_out, write_or_rescue
    from imu_fast.evaluation.evaluate import evaluate
    from imu_fast.model.reading import taken
    from imu_fast.storage import save_tensors
    from imu_fast.unlearning.named import METHODS
    from imu_fast.unlearning.unlearn import unlearn as library

    out = Path("unlearned.safetensors") if run.out is None else run.out
    if out.suffix != ".safetensors":
        raise InputError(f"out={str(out)!r} must end in .safetensors")
    run.check_apart(out, weights=images.weights, summary=how.summary)
    check_out(out)
    check_free(out, run.force)
    run.check_checkpoint()
    batch_size = 64 if run.batch_size is None else run.batch_size
    reading, options = taken(with_batch_size(how, how.options(), batch_size))
    METHODS.choose(how.method, **options)  # before a model is read
    model, loader, _ = opened(images, run.data, batch_size, place)
    check_out(out, size=sum(tensor.nbytes for tensor in model.state_dict().values()))
    stop = run.stop(lambda path: opened(images, path, batch_size, place)[1])
    if stop is not None and here.group is not None:
        stop = stop.measured(lambda unseen: evaluate(model, unseen, **reading)["accuracy"])
    options, stop = run.told(how, options, stop)
    method = METHODS.choose(how.method, **options)
    result = library(
        model,
        here.share(loader),
        method,
        stop=stop,
        seed=run.seed,
        checkpoint=run.checkpoint,
        progress=sys.stderr.isatty(),
        group=here.group,
        **reading,
    )
    if here.first:
        write_or_rescue(out, lambda path: save_tensors(path, model.state_dict(), {"format": "pt"}))
    if result.stopped_by == "left_alone":
        typer.echo(result.settings["auto"])
    first, last = result.trajectory[0], result.trajectory[-1]
    typer.echo(
        f"forget accuracy {first['forget_accuracy']:.3f} -> {last['forget_accuracy']:.3f} in "
        f"{result.steps} steps ({result.stopped_by}); written to {out}"
    )
