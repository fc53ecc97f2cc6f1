"""How an example becomes token ids, and where in them the answer is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from imu_fast.data.frame import Frame
from imu_fast.data.text_files import FORMS, Example, Message
from imu_fast.errors import InputError, brief, check_installed

IGNORED = -100
# A chat template that says itself which tokens are the assistant's.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WAY_OUT = "pass --template with a file of one that does, or --template none"


@dataclass(frozen=True)
class Plain:
    """Text around a question and its answer.

    The prompt is ``before + question + between``; ``lead + answer + after`` counts.
    """

    before: str = ""
    between: str = ""
    lead: str = " "
    after: str = ""

    def prompt(self, question: str) -> str:
        return f"{self.before}{question}{self.between}"

    def rest(self, answer: str) -> str:
        return f"{self.lead}{answer}{self.after}"

    def __str__(self) -> str:
        return repr(f"{self.prompt('{question}')}{self.rest('{answer}')}")


@dataclass(frozen=True)
class Chat:
    """A chat template in Jinja; None: the tokenizer's own."""

    jinja: str | None
    source: str

    def __str__(self) -> str:
        return f"the chat template of {self.source}"


# As the original code of TOFU has it for models that are no chat models: the tag counts too.
PLAIN, TOFU, JOINED = Plain(), Plain("Question: ", "\n", "Answer: "), Plain(lead="")


def template_of(choice: str, tokenizer: Any, form: str, task: str, messages: bool) -> Plain | Chat:
    """What is put around the examples.

    Args:
        choice: ``"auto"``: the tokenizer's chat template where it has one, else
            ``question + " " + answer``; ``"none"``: the latter; ``"tofu"``:
            ``Question: ...``, a line break, ``Answer: ...``; or a file: a chat template in Jinja,
            or text with ``{question}`` and ``{answer}``.
        messages: whether examples are conversations.

    Raises:
        InputError: there is none that fits, or one that has no meaning for these examples.
    """
    own = getattr(tokenizer, "chat_template", None)
    auto = Chat(None, "the tokenizer") if own and task == "causal" else PLAIN
    named = {"auto": auto, "none": PLAIN, "tofu": TOFU}
    made = named[choice] if choice in named else _from_file(Path(choice))
    shown = f"template={choice!r}"
    if messages:
        if task != "causal":
            raise InputError(f"conversations are for causal models; this is a {task} one")
        if not isinstance(made, Chat):
            lacking = "the tokenizer has none" if choice == "auto" else f"{shown} is none"
            raise InputError(
                f"conversations need a chat template, and {lacking}; pass a file of one in Jinja "
                "by --template"
            )
    elif form != "qa":
        if choice not in ("auto", "none"):
            raise InputError(
                f"{shown} is put around questions and answers; {FORMS[form][1]} are taken as they "
                "are: leave it out, or name their keys by --question-key and --answer-key"
            )
        return JOINED
    elif task != "causal" and isinstance(made, Chat):
        raise InputError(
            f"{shown} is a chat template, for causal models; a {task} model takes the question as "
            "input and the answer as output: leave it out, or pass text with {question} and "
            "{answer}"
        )
    if isinstance(made, Chat):
        check_installed(f"{made},", "jinja2", install="'imu_fast[text]'")
    return made


def _from_file(path: Path) -> Plain | Chat:
    shown = f"template={str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark before it
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"{shown} cannot be read ({brief(error, 100)}); pass auto, none, tofu or a file"
        ) from error
    if "{{" in text or "{%" in text:
        return Chat(text, str(path))
    parts = re.split(r"\{(question|answer)\}", text.removesuffix("\n"))
    if parts[1::2] != ["question", "answer"]:
        raise InputError(
            f"{shown} has {', '.join(parts[1::2]) or 'no placeholder'}; it must be a chat template "
            "in Jinja, or text with {question} and then {answer}, each once"
        )
    # Spaces belong to the token that follows, as tokenizers make them.
    between = parts[2].rstrip(" ")
    return Plain(parts[0], between, parts[2][len(between) :], parts[4])


@dataclass(frozen=True)
class Encoded:
    """One example for a model.

    Attributes:
        input_ids: what it reads. labels: one per token, -100 where none counts (of a seq2seq model
            the answer alone); or the class.
        cut: tokens that were left out at the end, for want of room.
    """

    input_ids: list[int]
    labels: list[int] | int
    cut: int = 0

    def tokens(self, task: str) -> int:
        """How many labels count; a causal model predicts no first token."""
        if isinstance(self.labels, int):
            return 1
        return sum(label != IGNORED for label in self.labels[task == "causal" :])


@dataclass(frozen=True)
class Encoder:
    """Examples to token ids.

    Args:
        task: ``"causal"``, ``"seq2seq"`` or ``"classifier"``.
        turns: which of a conversation's assistant turns count: ``"all"``, or the ``"last"``.
        max_length: tokens per example (of a seq2seq model, of question and answer each).
        label_ids: the classes of a classifier, by name.
    """

    tokenizer: Any
    task: str
    template: Plain | Chat
    turns: str
    max_length: int | None
    label_ids: Mapping[str, int]

    def encode(self, example: Example, where: str) -> Encoded:
        """One example; ``where`` begins the message.

        Raises:
            InputError: the answer cannot be told from the prompt, or nothing of it is left.
        """
        if self.task == "classifier":
            ids, cut = self._fitted(example.answer)
            return Encoded(ids, self._class(example.label, where), cut)
        if self.task == "seq2seq":
            return self._seq2seq(example, where)
        if example.messages or isinstance(self.template, Chat):
            ids, labels = self._chat(example, where)
        else:
            ids, labels = self._plain(example, where)
        kept = len(ids) if self.max_length is None else min(self.max_length, len(ids))
        made = Encoded(ids[:kept], labels[:kept], len(ids) - kept)
        if not made.tokens(self.task):
            why = f"{kept} tokens (max_length) hold none of the answer" if made.cut else "one token"
            raise InputError(
                f"{where} leaves nothing to be predicted: {why}; shorten the prompt, raise "
                "--max-length or remove the line"
            )
        return made

    def answer(self, example: Example, text: str, where: str) -> list[int]:
        """The tokens of another answer to the same prompt, the ending one included; ``where``: of
        the example.

        Raises:
            InputError: the example has no prompt, or no room behind it.
        """
        if example.messages:
            last = {"role": "assistant", "content": text}
            example = replace(example, messages=(*example.messages[:-1], last))
        elif example.prompt is None:
            raise InputError("a refusing answer follows a prompt, and plain text has none")
        whole = replace(self, turns="last", max_length=None)
        made = whole.encode(replace(example, answer=text), "the refusal")
        assert isinstance(made.labels, list)
        answer = [label for label in made.labels if label != IGNORED]
        long = len(made.input_ids) if self.task == "causal" else len(answer)
        if self.max_length is not None and long > self.max_length:
            raise InputError(
                f"the refusal after the prompt of {where} makes {long} tokens, more than "
                f"max_length={self.max_length}: its end would be cut off; shorten it or the "
                "prompt, raise --max-length or remove the line"
            )
        return answer

    def shown(self, made: Encoded) -> str:
        """What the model reads, and what counts of it."""
        read = self.tokenizer.decode(made.input_ids)
        if isinstance(made.labels, int):
            return f"{read!r}, class {made.labels}"
        counted = self.tokenizer.decode([label for label in made.labels if label != IGNORED])
        return f"{read!r}, of which counts {counted!r}"

    @cached_property
    def _source(self) -> Frame:
        return Frame.of(self.tokenizer, "text")

    @cached_property
    def _target(self) -> Frame:
        return Frame.of(self.tokenizer, "text_target")

    @property
    def endless(self) -> bool:
        """Whether the tokenizer has no token that ends a text."""
        return not self._source.end

    def _plain(self, example: Example, where: str) -> tuple[list[int], list[int]]:
        assert isinstance(self.template, Plain)
        prompt = None if example.prompt is None else self.template.prompt(example.prompt)
        rest = example.answer if prompt is None else self.template.rest(example.answer)
        ids = self._source.ended(self._source.begun((prompt or "") + rest))
        if prompt is None:
            return ids, list(ids)
        head = self._source.begun(prompt)
        why = "prompt and answer share a token; let one end, or the other begin, with a space"
        _check_prefix(head, ids, where, why)
        return ids, [*[IGNORED] * len(head), *ids[len(head) :]]

    def _chat(self, example: Example, where: str) -> tuple[list[int], list[int]]:
        assert isinstance(self.template, Chat)
        messages: Sequence[Message] = example.messages or (
            {"role": "user", "content": str(example.prompt)},
            {"role": "assistant", "content": example.answer},
        )
        jinja = self.template.jinja or self._own_template(where)
        text = self._rendered(messages, where, jinja)
        for k, message in enumerate(messages):
            _check_there(message, k, text, where)
        ids = self._bare(text)
        if _GENERATION.search(jinja) and self.turns == "all" and not example.first:
            mask = self._rendered(messages, where, jinja, mask=True)["assistant_masks"]
            if any(mask):
                return ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]
        labels = [IGNORED] * len(ids)
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        turns = [k for k in turns if k >= example.first]
        for k in turns[-1:] if self.turns == "last" else turns:
            before = self._rendered(messages[:k], where, jinja, prompt=True)
            after = self._rendered(messages[: k + 1], where, jinja)
            head, upto = self._bare(before), self._bare(after)
            why = f"the chat template does not render message {k + 1} as a prompt and its answer; "
            why += _WAY_OUT if len(turns) == 1 else f"--turns last, or {_WAY_OUT}"
            _check_prefix(head, upto, where, why)
            if k + 1 < len(messages):
                _check_prefix(upto, ids, where, why)
            _check_there(messages[k], k, after[len(before) :], where)
            labels[len(head) : len(upto)] = ids[len(head) : len(upto)]
        return ids, labels

    def _bare(self, text: str) -> list[int]:
        """Its tokens alone: a chat template writes the special ones itself."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _own_template(self, where: str) -> str:
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:  # several, none of them the default
            raise InputError(f"template='auto': {brief(error)}; pass a file of one") from error

    def _rendered(
        self,
        messages: Sequence[Message],
        where: str,
        jinja: str,
        *,
        prompt: bool = False,
        mask: bool = False,
    ) -> Any:
        """Text; with ``mask`` tokens, and which of them are the assistant's."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=jinja,
                add_generation_prompt=prompt,
                tokenize=mask,
                return_dict=True,
                return_assistant_tokens_mask=mask,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise InputError(
                f"{where}: {self.template} fails: {brief(error)}; {_WAY_OUT}"
            ) from error

    def _seq2seq(self, example: Example, where: str) -> Encoded:
        if example.prompt is None:
            raise InputError(
                f"{where} is plain text; a seq2seq model needs an input and an output: store "
                "questions and answers"
            )
        assert isinstance(self.template, Plain)
        ids, cut = self._fitted(self.template.prompt(example.prompt))
        rest = self.template.rest(example.answer).strip()
        labels = self._target.ended(self._target.begun(rest))
        kept = labels[: self.max_length]
        return Encoded(ids, kept, cut + len(labels) - len(kept))

    def _fitted(self, text: str) -> tuple[list[int], int]:
        """Token ids with what a tokenizer adds, which stays when the text is cut; and the cut."""
        once = self._source.once
        ids = once(list(self.tokenizer(text, verbose=False)["input_ids"]))
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, 0
        cut = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        kept = once(list(cut))
        return kept, len(ids) - len(kept)

    def _class(self, label: Any, where: str) -> int:
        known = set(self.label_ids.values())
        if isinstance(label, str):
            if label in self.label_ids:
                return self.label_ids[label]
            if label.isascii() and label.isdecimal() and int(label) in known:  # out of a CSV
                return int(label)
        elif isinstance(label, int) and not isinstance(label, bool) and label in known:
            named = self.label_ids.get(str(label), label)
            if named != label:
                raise InputError(
                    f"{where}: the label {label} is the number of a class, and '{label}' the name "
                    f"of class {named}; write names, as text"
                )
            return label
        names = ", ".join(list(self.label_ids)[:5]) + (", ..." if len(self.label_ids) > 5 else "")
        raise InputError(
            f"{where}: the label {label!r} is none of the model's {len(known)} classes; write 0 to "
            f"{len(known) - 1}, or one of {names}"
        )


def _check_there(message: Message, place: int, text: str, where: str) -> None:
    """Raise InputError where a template drops what a message says, but for thoughts."""
    if message["content"].rpartition("</think>")[2].strip() not in text:
        raise InputError(
            f"{where}: the chat template leaves out, or changes, what message {place + 1} says; "
            f"{_WAY_OUT}"
        )


def _check_prefix(head: Sequence[int], whole: Sequence[int], where: str, why: str) -> None:
    head, whole = list(head), list(whole)
    if head and head == whole[: len(head)] and len(head) < len(whole):
        return
    at = next((k for k, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), len(whole))
    raise InputError(f"{where}: where the answer begins cannot be told (token {at}): {why}")
