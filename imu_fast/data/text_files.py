"""A user's texts: JSON Lines, a JSON list or CSV, of questions and answers, chats or plain text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imu_fast.errors import InputError, brief

ENDINGS = {".jsonl": "line", ".json": "item", ".csv": "row"}
# Form -> the keys that its lines have, and what it is called.
FORMS: dict[str, tuple[tuple[str, ...], str]] = {
    "qa": (("question", "answer"), "questions and answers"),
    "completion": (("prompt", "completion"), "prompts and completions"),
    "chat": (("messages",), "conversations"),
    "text": (("text",), "plain text"),
    "label": (("text", "label"), "labelled text"),
}
Message = dict[str, str]


@dataclass(frozen=True)
class Keys:
    """What the fields of a line are called, where it is not the form's own name for them.

    One that is given says the form as well: ``Keys(question="q")`` is of questions and answers.
    """

    question: str | None = None
    answer: str | None = None
    text: str | None = None
    label: str | None = None
    messages: str | None = None

    def given(self) -> dict[str, str]:
        """Those that are not None."""
        return {name: key for name, key in vars(self).items() if key is not None}


@dataclass(frozen=True)
class Example:
    """What one line says.

    Attributes:
        number: of the line, item or row, from 1.
        prompt, answer: of questions and answers, and of prompts; text alone has no prompt.
        label: of labelled text, as it stands there.
        messages: of conversations, in place of the above; of these the assistant's from place
            ``first`` on count.
    """

    number: int
    prompt: str | None = None
    answer: str = ""
    label: Any = None
    messages: tuple[Message, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Records:
    """A file's lines, each an object.

    Attributes:
        objects: as they stand there, in order. numbers: of each, from 1, as an editor counts.
    """

    path: Path
    argument: str
    objects: list[dict[str, Any]]
    numbers: list[int]

    def at(self, number: int) -> str:
        """How a message about one of them begins."""
        return f"{self.argument}={str(self.path)!r}: {ENDINGS[self.path.suffix]} {number}"


def read_records(path: Path, argument: str = "data") -> Records:
    """Read ``.jsonl`` (an object per line, blank lines left out), ``.json`` (a list) or ``.csv``.

    Raises:
        InputError: missing, empty, of another ending, or broken; says in which line.
    """
    shown = f"{argument}={str(path)!r}"
    if path.suffix not in ENDINGS:
        raise InputError(f"{shown} must end in one of {', '.join(ENDINGS)}")
    if not path.is_file():
        raise InputError(f"{shown} is no file; check the name")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{shown} cannot be read ({error}); check its mode") from error
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    numbers: list[int] = []
    objects: Any = []
    if path.suffix == ".jsonl":
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if line.strip():
                objects.append(_parsed(line, f"{shown}: line {number}"))
                numbers.append(number)
    elif path.suffix == ".json":
        objects = _parsed(raw, shown)
        if not isinstance(objects, list):
            raise InputError(f"{shown} holds a {type(objects).__name__}; store a list of objects")
        numbers = list(range(1, len(objects) + 1))
    else:
        objects = _rows(raw, shown)
        numbers = list(range(1, len(objects) + 1))
    if not objects:
        raise InputError(f"{shown} is empty; store at least one {ENDINGS[path.suffix]}")
    found = Records(path, argument, objects, numbers)
    for number, value in zip(numbers, objects, strict=True):
        if not isinstance(value, dict):
            raise InputError(
                f"{found.at(number)} is a {type(value).__name__}; store an object, such as "
                '{"question": ..., "answer": ...}'
            )
    return found


def _parsed(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is no UTF-8 (byte {error.start} is {raw[error.start]:#04x}); save the file "
            "as UTF-8"
        ) from error
    # A ValueError is also what a number of too many digits raises.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON ({brief(error, 120)}); repair or remove it") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return made


def _rows(raw: bytes, shown: str) -> list[dict[str, Any]]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{shown}: line {line} is no UTF-8; save the file as UTF-8") from error
    try:
        header, *rows = [
            row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row
        ]
    except ValueError:
        return []
    except csv.Error as error:
        raise InputError(f"{shown} is no CSV ({error}); repair it") from error
    if len(set(header)) < len(header):
        raise InputError(f"{shown} has a column twice: {', '.join(header)}; rename one")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(
                f"{shown}: row {number} has {len(row)} fields, the header {len(header)}; repair it"
            )
    return [dict(zip(header, row, strict=True)) for row in rows]


def form_of(records: Records, keys: Keys, *, labelled: bool = False) -> tuple[str, tuple[str, ...]]:
    """The form of a file's lines, by the keys that are given or those of the first line.

    Args:
        labelled: whether the model is a classifier, so that lines are text with a label.

    Returns:
        The form, a name out of FORMS, and what its fields are called.

    Raises:
        InputError: none fits, several do, or keys of several forms are given.
    """
    given, there = keys.given(), records.objects[0]
    forms = ["label"] if labelled else ["qa", "completion", "chat", "text"]
    if given:
        forms = [form for form in forms if set(given) <= set(FORMS[form][0])]
        if not forms:
            named = ", ".join(f"{name}_key={key!r}" for name, key in given.items())
            fits = "text_key and label_key" if labelled else "those of one form"
            raise InputError(
                f"{named}: the lines of {'a classifier' if labelled else 'a language model'} "
                f"have no such fields together; give {fits}"
            )
        form = forms[0]
        names = tuple(given.get(name, name) for name in FORMS[form][0])
        return form, names
    fitting = [form for form in forms if all(key in there for key in FORMS[form][0])]
    if len(fitting) > 1:
        named = " or ".join("/".join(FORMS[form][0]) for form in fitting)
        raise InputError(
            f"{records.at(records.numbers[0])} may be read as {named}; say which by "
            "--question-key, --text-key or --messages-key"
        )
    if not fitting:
        wanted = ", or ".join(" and ".join(FORMS[form][0]) for form in forms)
        has = ", ".join(map(repr, there)) or "none"
        flags = (
            "--text-key, --label-key" if labelled else "--question-key, --answer-key, --text-key"
        )
        raise InputError(
            f"{records.at(records.numbers[0])} has the keys {has}; it needs {wanted}, or names of "
            f"its own by {flags}"
        )
    return fitting[0], FORMS[fitting[0]][0]


def examples_of(records: Records, form: str, names: Sequence[str]) -> list[Example]:
    """Every line as an example, all of them checked.

    Raises:
        InputError: a field is missing, empty or no text; names the line.
    """
    made = []
    for number, line in zip(records.numbers, records.objects, strict=True):
        where = records.at(number)
        for name in names:
            if name not in line:
                raise InputError(f"{where} has no {name!r}; it has {', '.join(map(repr, line))}")
        values = [line[name] for name in names]
        if form == "chat":
            made.append(_conversation(number, values[0], 0, f"{where}, {names[0]!r}"))
        elif form == "completion" and isinstance(values[0], list):
            before, after = ([v] if isinstance(v, Mapping) else v for v in values)
            if not isinstance(after, list):
                raise InputError(f"{where}: the prompt is a list of messages, the completion not")
            made.append(_conversation(number, [*before, *after], len(before), where))
        elif form == "label":
            text = _text(values[0], f"{where}: {names[0]!r}")
            made.append(Example(number, answer=text, label=values[1]))
        else:
            texts = [_text(v, f"{where}: {k!r}") for k, v in zip(names, values, strict=True)]
            made.append(Example(number, texts[0] if texts[1:] else None, texts[-1]))
    return made


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} is {_shown(value)}; it must be text")
    if not value.strip() and not empty:
        raise InputError(f"{where} is empty; fill in or remove the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a pair, as \ud800 is
        raise InputError(
            f"{where} has a lone surrogate at {error.start}, which is no character; remove it"
        ) from None
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _conversation(number: int, messages: Any, first: int, where: str) -> Example:
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f'{where} must be a list of messages, {{"role": ..., "content": ...}}; it is '
            f"{_shown(messages) if messages != [] else 'empty'}"
        )
    made: list[Message] = []
    for place, message in enumerate(messages, start=1):
        here = f"{where}: message {place}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            has = ", ".join(message) if isinstance(message, Mapping) else _shown(message)
            raise InputError(f"{here} must have role and content, and no more; it has {has}")
        role = _text(message["role"], f"{here}: role")
        content = _text(message["content"], f"{here}: content", empty=role != "assistant")
        made.append({"role": role, "content": content})
    if made[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last message is the {made[-1]['role']}'s; it must be the assistant's, "
            "which is what counts"
        )
    if made[0]["role"] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's; put a prompt before it")
    return Example(number, messages=tuple(made), first=first)
