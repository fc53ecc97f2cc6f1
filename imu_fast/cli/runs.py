"""One run of unlearning, as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from imu_fast.cli.arguments import Force, ForgetData, layer_names
from imu_fast.cli.devices import DeviceName
from imu_fast.errors import InputError


@dataclass(frozen=True)
class How:
    """The method and its options, flat."""

    method: Annotated[
        str, typer.Option(help="auto, imu, uniform, npo, margin_edit, ...: imu_fast.methods().")
    ] = "imu"
    preset: Annotated[str | None, typer.Option(help="paper: as the authors' code.")] = None
    scope: Annotated[str | None, typer.Option(help="head, layers or all.")] = None
    layers: Annotated[
        str | None,
        typer.Option(help="Of the scope: names or patterns, commas between; default: the head."),
    ] = None
    objective: Annotated[
        str | None,
        typer.Option(help="ce, margin, log1mp, npo, simnpo, relabel, or refusal (text)."),
    ] = None
    precondition: Annotated[str | None, typer.Option(help="features, ggn or kfac.")] = None
    optimizer: Annotated[
        str | None, typer.Option(help="sgd, or a class out of torch.optim, such as AdamW.")
    ] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate; of SGD 0.01.")] = None
    epochs: Annotated[int | None, typer.Option(help="Budget; default 10.")] = None
    summary: Annotated[
        Path | None,
        typer.Option(help="Of the training set, as imu-fast summary wrote it."),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(help="Any other option of the method: NAME=VALUE, more than once."),
    ] = None

    def options(self) -> dict[str, Any]:
        """Those that are given, by name.

        Raises:
            InputError: ``set`` is not NAME=VALUE, or names what has a flag.
        """
        named = {k: v for k, v in vars(self).items() if k not in ("method", "set")}
        found = {name: value for name, value in named.items() if value is not None}
        if self.layers is not None:
            names = layer_names(self.layers)
            found["layers"] = names if len(names) > 1 else names[0]
        if self.summary is not None:
            from imu_fast.unlearning.summary.summary import load_summary

            found["summary"] = load_summary(self.summary)
        if self.optimizer is not None:
            found["optimizer"] = _optimizer(self.optimizer)
        for entry in self.set or ():
            name, equals, value = entry.partition("=")
            name = name.strip().replace("-", "_")
            if not equals or not name:
                raise InputError(f"set={entry!r}; write NAME=VALUE, such as beta=2.5")
            if name in (*named, "batch_size", "retain", "answer", "method"):
                flag = {"answer": "refusal"}.get(name, name).replace("_", "-")
                raise InputError(f"set={entry!r}: it has a flag of its own, --{flag}")
            if name in found:
                raise InputError(f"set={entry!r}: {name} is set twice")
            try:
                found[name] = json.loads(value)
            except ValueError:
                found[name] = value
        return found


def _optimizer(name: str) -> Any:
    import torch

    if name == "sgd":
        return name
    made = getattr(torch.optim, name, None)
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise InputError(
            f"optimizer={name!r} is unknown; choose sgd, or a class out of torch.optim, such as "
            "AdamW"
        )
    return made


@dataclass(frozen=True)
class Run:
    """One run, whatever it is of."""

    data: ForgetData
    out: Annotated[
        Path | None,
        typer.Option(
            help="Images: weights, default unlearned.safetensors. Text: a new folder, default "
            "unlearned."
        ),
    ] = None
    stop_accuracy: Annotated[
        float | None, typer.Option(help="Stop at this forget accuracy, in [0, 1].")
    ] = None
    stop_loss: Annotated[float | None, typer.Option(help="Stop at this forget loss.")] = None
    unseen: Annotated[
        str | None,
        typer.Option(
            help="Stop where the forget set is predicted no better than data that the model never "
            "saw: that accuracy, in [0, 1], or such data, read as --data is."
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the batch order.")] = 0
    checkpoint: Annotated[
        Path | None, typer.Option(help="Resume from, and save each epoch to, this file.")
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch and step; default 64 images, 8 texts.")
    ] = None
    device: DeviceName = None
    force: Force = False

    def stop(self, read: Callable[[Path], Any] | None = None) -> Any:
        """The stop rule, or None.

        Args:
            read: opens ``unseen`` where it is data; without it, whether there is such a file is all
                that is found out.

        Raises:
            InputError: a depth that is none, or no such data.
        """
        from imu_fast.unlearning.depth import StopRule

        unseen: Any = None
        if self.unseen is not None:
            try:
                unseen = float(self.unseen)
            except ValueError:
                path = Path(self.unseen)
                if not path.exists():
                    raise InputError(
                        f"unseen={self.unseen!r} is neither an accuracy in [0, 1] nor a file or "
                        "folder that is there"
                    ) from None
                unseen = () if read is None else read(path)
        given = {
            "forget_accuracy": self.stop_accuracy,
            "forget_loss": self.stop_loss,
            "unseen_accuracy": unseen,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return StopRule(**given) if given else None

    def told(self, how: How, options: dict[str, Any], stop: Any) -> tuple[dict[str, Any], Any]:
        """Options and stop rule: of ``auto`` unseen data alone are an option, and no rule.

        With it a model is left alone whose forget set is predicted no better; a rule insists.
        """
        alone = self.unseen is not None and (self.stop_accuracy, self.stop_loss) == (None, None)
        if how.method != "auto" or not alone:
            return options, stop
        return options | {"unseen": stop.unseen_accuracy}, None

    def check_apart(self, out: Path, **inputs: Path | None) -> None:
        """Raise InputError where one file is to be read and written, or written twice."""
        from imu_fast.cli.score_files import check_apart

        read = {"data": self.data, **inputs}
        check_apart("out", out, **read, checkpoint=self.checkpoint)
        if self.checkpoint is not None:
            check_apart("checkpoint", self.checkpoint, **read)

    def check_checkpoint(self) -> None:
        """Raise InputError where a checkpoint cannot be written, or be gone on from."""
        from imu_fast.cli.score_files import check_out
        from imu_fast.unlearning.checkpoint import check_resumable

        if self.checkpoint is not None:
            check_out(self.checkpoint, "checkpoint")
            check_resumable(self.checkpoint)


@dataclass(frozen=True)
class TextRun:
    """What only texts have."""

    retain: Annotated[
        Path | None, typer.Option(help="Texts that are to stay, read as --data is.")
    ] = None
    refusal: Annotated[
        str | None, typer.Option(help="The answer to learn instead, with --objective refusal.")
    ] = None
    lora: Annotated[
        str | None,
        typer.Option(
            help="Train an adapter, and write that: r=8,alpha=16,target=q_proj|v_proj, each "
            "optional (peft's own targets); or default."
        ),
    ] = None


def with_batch_size(how: How, options: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The options, and the batch size where the method has one."""
    from imu_fast.unlearning.named import METHODS

    has = how.method != "auto" and how.method in METHODS
    has = has and "batch_size" in METHODS[how.method].paths()
    return options | {"batch_size": batch_size} if has else options
