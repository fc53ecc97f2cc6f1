"""What the commands take, in groups, and how a group becomes options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from imu_fast.errors import InputError

ForgetData = Annotated[
    Path,
    typer.Option(
        help="Forget set. Images: a folder with a sub-folder per class, or .npz (x, y). Text: "
        ".jsonl, .json or .csv."
    ),
]


Force = Annotated[bool, typer.Option("--force", help="Replace --out where it is there already.")]


@dataclass(frozen=True)
class Images:
    """A model of images, and how an image folder is read."""

    arch: Annotated[
        str | None,
        typer.Option(
            help="Of images: torchvision:NAME, timm:NAME, transformers:FOLDER, or MODULE:FUNCTION "
            "of your own, which returns the model, or the model and how an image becomes its input."
        ),
    ] = None
    weights: Annotated[
        Path | None, typer.Option(help="Of --arch: state dict, .safetensors or a torch file.")
    ] = None
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Which class a sub-folder of --data is: a text file with one class name per line "
            "in the order of the model's outputs, or the training set's folder. Without it, names "
            "that are whole numbers are the class indices, and other names must be all classes, "
            "sorted."
        ),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels of the images of a folder; without it the model's own."),
    ] = None


@dataclass(frozen=True)
class Texts:
    """A model of text, and how a file of texts is read."""

    model: Annotated[
        Path | None,
        typer.Option(
            help="Of text: a folder of transformers (causal, seq2seq, sequence classifier) or of "
            "a PEFT adapter."
        ),
    ] = None
    base: Annotated[
        Path | None, typer.Option(help="What an adapter is of; without it as its config says.")
    ] = None
    merge: Annotated[bool, typer.Option("--merge", help="The adapter into its base first.")] = False
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder; without it the model's own.")
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, float64; default: as stored.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")
    ] = False
    question_key: Annotated[str | None, typer.Option(help="Default: question.")] = None
    answer_key: Annotated[str | None, typer.Option(help="Default: answer.")] = None
    text_key: Annotated[str | None, typer.Option(help="Default: text.")] = None
    label_key: Annotated[str | None, typer.Option(help="Of a classifier; default: label.")] = None
    messages_key: Annotated[str | None, typer.Option(help="Default: messages.")] = None
    template: Annotated[
        str | None,
        typer.Option(
            help="Around question and answer. auto: the tokenizer's chat template, or else as "
            "none; none: question, a space, answer; tofu; or a file: Jinja, or text with "
            "{question} and {answer}."
        ),
    ] = None
    turns: Annotated[
        str | None, typer.Option(help="Of a conversation: all assistant turns count, or the last.")
    ] = None
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a line; default: the tokenizer's and model's.")
    ] = None
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the first line as the model reads it.")
    ] = False


def given(group: Any) -> dict[str, Any]:
    """Those of a group that are not their defaults."""
    values = {field.name: (getattr(group, field.name), field.default) for field in fields(group)}
    return {name: value for name, (value, default) in values.items() if value != default}


def layer_names(text: str, argument: str = "layers") -> list[str]:
    """The entries of ``--layers``, or of another such argument.

    Raises:
        InputError: one is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"{argument}={text!r} has an empty name; write names with commas between")
    return names


def is_text(images: Images, texts: Texts) -> bool:
    """Which of the two the command is about.

    Raises:
        InputError: neither, or options of both.
    """
    if texts.model is None and images.arch is None:
        raise InputError(
            "arch=None, model=None: pass --arch and --weights of a model of images, or --model "
            "FOLDER of a model of text"
        )
    text = texts.model is not None
    other = given(images if text else texts)
    if other:
        own, its = ("--model", "--arch") if text else ("--arch", "--model")
        raise InputError(
            f"{', '.join(f'{name}={_plain(value)!r}' for name, value in other.items())}: goes with "
            f"{its}, and {own} is given; leave one of the two out"
        )
    if not text and images.weights is None:
        raise InputError("weights=None: pass --weights, the state dict of --arch")
    return text


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass as an option per field."""
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if not is_dataclass(parameter.annotation):
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = parameter.annotation
        hints = get_type_hints(parameter.annotation, include_extras=True)
        flat += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(parameter.annotation)
        ]

    def wrapped(**values: Any) -> None:
        for name, cls in groups.items():
            values[name] = cls(**{field.name: values.pop(field.name) for field in fields(cls)})
        command(**values)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return wrapped
