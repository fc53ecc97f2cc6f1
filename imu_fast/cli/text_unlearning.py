"""``imu-fast unlearn --model``: a checkpoint, or an adapter, that has forgotten some lines."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer

from imu_fast.cli.adapters import Lora
from imu_fast.cli.arguments import Texts
from imu_fast.cli.devices import device_named
from imu_fast.cli.language_models import LanguageModel, is_adapter, load, save
from imu_fast.cli.runs import How, Run, TextRun, with_batch_size
from imu_fast.cli.score_files import check_folder, check_new_folder, write_or_rescue
from imu_fast.cli.text import BATCH_SIZE, opened, source_of
from imu_fast.data.text_files import read_records
from imu_fast.errors import InputError
from imu_fast.evaluation.evaluate import evaluate
from imu_fast.model.reading import taken
from imu_fast.model.selection import selected
from imu_fast.storage import replacing, replacing_folder
from imu_fast.unlearning.named import METHODS
from imu_fast.unlearning.result import UnlearnResult
from imu_fast.unlearning.unlearn import unlearn

REPORT = "imu_fast.json"
# How far what was written may be from what was trained: its dtype's rounding.
_NEAR = 1e-2


def unlearn_lines(texts: Texts, run: Run, how: How, more: TextRun) -> None:
    """Load, measure, unlearn, write, load what is written, and measure that."""
    out = Path("unlearned") if run.out is None else run.out
    if run.force:
        raise InputError(
            f"force: out={str(out)!r} is a folder, which is never replaced; remove it, or choose "
            "another name"
        )
    check_new_folder(out)
    run.check_apart(out, retain=more.retain)
    run.check_checkpoint()
    device = device_named(run.device)
    given, lora = how.options(), None if more.lora is None else Lora.of(more.lora)
    batch_size = BATCH_SIZE if run.batch_size is None else run.batch_size
    reading, options = taken(with_batch_size(how, given, batch_size))
    assert texts.model is not None
    adapted = lora is not None or (is_adapter(texts.model) and not texts.merge)
    _choose(how, options, more, adapted)  # before a model is read
    for path, argument in ((run.data, "data"), (more.retain, "retain")):
        if path is not None:
            read_records(path, argument)
    reader = opened(texts, batch_size, device, trained=True)
    made = reader.made
    if made.task != "classifier" and not METHODS.choose(how.method).sequences:
        named = ", ".join(name for name in METHODS if METHODS[name].sequences)
        raise InputError(
            f"method={how.method!r} is for samples of one label, and {texts.model} is a language "
            f"model; choose one of {named}"
        )
    if how.method == "auto" and made.task != "classifier":
        options["batch_size"] = batch_size
    if made.adapter and lora is not None:
        raise InputError(
            f"lora={more.lora!r}: the model is an adapter already, which is trained; leave --lora "
            "out, or --merge it into its base first"
        )
    sets = {"forget": reader.read(run.data)}
    if more.retain is not None:
        sets["retain"] = reader.read(more.retain, "retain")
        options["retain"] = sets["retain"].loader
    if more.refusal is not None:
        options["answer"] = sets["forget"].answer(more.refusal)
    if made.adapter or lora is not None:
        options = _of_adapter(made, how, options, lora, run.seed)
    size = sum(t.nbytes for n, t in made.model.state_dict().items() if _written(made, n))
    check_folder(out.parent, out, size=size)
    stop = run.stop(lambda path: reader.read(path, "unseen").loader)
    options, stop = run.told(how, options, stop)
    method = METHODS.choose(how.method, **options)
    before = {name: measured(made.model, data.loader, reading) for name, data in sets.items()}
    result = unlearn(
        made.model,
        sets["forget"].loader,
        method,
        stop=stop,
        seed=run.seed,
        checkpoint=run.checkpoint,
        progress=sys.stderr.isatty(),
        **reading,
    )
    write_or_rescue(out, lambda path: _write(made, path))
    report = {"method": how.method, "model": str(texts.model), "before": before, **_report(result)}
    adapter = made.adapter
    # One model at a time: what was trained is on the disk now.
    made.model = result.model = None  # type: ignore[assignment]
    del result
    gc.collect()
    again = _written_model(texts, out, adapter, device)
    report["after"] = {
        name: measured(again.model, data.loader, reading) for name, data in sets.items()
    }
    with replacing(out / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=2, default=repr) + "\n", "utf-8")
    _say(report, out, adapter)


def _choose(how: How, options: dict[str, Any], more: TextRun, adapted: bool) -> None:
    """Raise InputError for options that the method has not; data and answer come later."""
    coming: dict[str, Any] = {}
    if adapted and how.method in METHODS and "scope" in METHODS[how.method].paths():
        options = {"scope": "all"} | options
    if more.retain is not None:
        coming["retain"] = ()
    if more.refusal is not None:
        coming["answer"] = [0]
    METHODS.choose(how.method, **options, **coming)
    if options.get("objective") == "refusal" and more.refusal is None:
        raise InputError("objective='refusal' needs --refusal, the answer to learn instead")


def _of_adapter(
    made: LanguageModel, how: How, options: dict[str, Any], lora: Lora | None, seed: int
) -> dict[str, Any]:
    """The options with which the adapter is trained, put on where it is not there yet.

    Raises:
        InputError: what is asked for is no adapter.
    """
    shown = "lora" if lora is not None else "an adapter"
    edits = how.method == "auto" and made.task == "classifier"
    if edits or "scope" not in METHODS[how.method].paths():
        raise InputError(
            f"{shown}: method={how.method!r} edits the head, which an adapter has not; choose "
            "another method, or write the whole model (no --lora; --merge)"
        )
    scope = options.get("scope", "all")
    if how.preset is not None or scope not in ("all", "layers"):
        asked = f"preset={how.preset!r}" if how.preset is not None else f"scope={scope!r}"
        raise InputError(
            f"{shown}: {asked} trains the model's own layers; choose --scope all, or --scope "
            "layers with --layers, or write the whole model (no --lora; --merge)"
        )
    names: list[str] | None = None
    layers = options.pop("layers", None)
    if scope == "layers":
        if lora is None or layers is None:
            raise InputError(
                "scope='layers' with an adapter is for --lora, with --layers that say where it is "
                "put; an adapter that is there is trained whole, by --scope all"
            )
        if lora.target is not None:
            raise InputError("lora: target and --layers both say where it is put; leave one out")
        wanted = [layers] if isinstance(layers, str) else layers
        names = [layer.name for layer in selected(made.model, wanted)[0]]
    if lora is not None:
        lora.put_on(made, names, seed)
    return options | {"scope": "all"}


def _written(made: LanguageModel, name: str) -> bool:
    return not made.adapter or "lora_" in name


def _write(made: LanguageModel, path: Path) -> None:
    with replacing_folder(path) as temporary:
        save(made.model, made.tokenizer, temporary)


def _written_model(texts: Texts, out: Path, adapter: bool, device: torch.device) -> LanguageModel:
    """What is on the disk, as anyone will load it."""
    source = source_of(texts, device)
    source = replace(source, model=out, tokenizer=None, merge=False, dtype=None)
    return load(source if adapter else replace(source, base=None))


def measured(model: Any, loader: Any, reading: dict[str, Any]) -> dict[str, float]:
    """Loss and accuracy by the model's own forward pass."""
    found = evaluate(model, loader, **reading)
    return {name: value for name, value in found.items() if name != "confidence"}


def _report(result: UnlearnResult) -> dict[str, Any]:
    names = ("steps", "epochs", "stopped_by", "reached", "seconds", "backends", "trajectory")
    settings = {
        name: value if _plain(value) else type(value).__name__
        for name, value in result.settings.items()
    }
    return {"settings": settings, **{name: getattr(result, name) for name in names}}


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, str | int | float | bool | None)


def _say(report: dict[str, Any], out: Path, adapter: bool) -> None:
    for name, after in report["after"].items():
        before = report["before"][name]
        typer.echo(
            f"{name} loss {before['loss']:.4f} -> {after['loss']:.4f}, accuracy "
            f"{before['accuracy']:.3f} -> {after['accuracy']:.3f}"
        )
    last, written = report["trajectory"][-1]["forget_loss"], report["after"]["forget"]["loss"]
    if abs(last - written) > _NEAR * (1 + abs(last)):
        typer.echo(
            f"the written model's forget loss {written:.4f} is not the trained one's {last:.4f}",
            err=True,
        )
    what = "the adapter" if adapter else "the checkpoint"
    typer.echo(
        f"{report['steps']} steps ({report['stopped_by']}); {what}, measured as written, and "
        f"{REPORT} are in {out}/"
    )
