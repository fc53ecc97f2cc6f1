"""Files of texts: what their lines are read as, which tokens count, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import text_models as tm

import imu_fast as imu
from imu_fast.data.text_files import Keys, read_records
from imu_fast.errors import InputError

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
Q, A = tm.PAIRS[0]


def counted(data, place=0):
    """What the model reads of an example, and what of it counts, as text."""
    one = data.loader.dataset[place]
    words = data.encoder.tokenizer
    kept = [i for i, label in zip(one.input_ids, one.labels, strict=True) if label != -100]
    assert kept == [label for label in one.labels if label != -100]
    return words.decode(one.input_ids), words.decode(kept)


def test_question_and_answer(tmp_path):
    data = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), tm.tokenizer())
    assert counted(data) == (f"<s>{Q} {A}</s>", f" {A}</s>")
    assert (
        "7 lines of questions and answers (question, answer), by '{question} {answer}'"
        in (data.remarks[0])
    )
    batch = next(iter(data.loader))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["attention_mask"].sum(dim=1) == (batch["input_ids"] != 0).sum(dim=1)).all()
    assert [int((row[1:] != -100).sum()) for row in batch["labels"]] == data.tokens
    assert "of which counts" in data.first


def test_tokenizers_that_see_a_space_before_every_text(tmp_path):
    """As SentencePiece's, of Llama 2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=tm.SPECIAL, show_progress=False)
    made.train_from_iterator([text for pair in tm.PAIRS for text in pair], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    words = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    data = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), words)
    for one, (question, answer) in zip(data.loader.dataset, tm.PAIRS, strict=True):
        start = one.labels.count(-100)
        assert one.input_ids[:start] == words(question)["input_ids"]
        space = words.convert_tokens_to_ids("\u2581")
        assert words.decode([space, *one.input_ids[start:-1]]).strip() == answer
        assert one.input_ids[-1] == words.eos_token_id
    data = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), words, template="tofu")
    assert len(data.tokens) == 7


@pytest.mark.parametrize(
    ("line", "keys", "read", "kept"),
    [
        ({"q": Q, "answer": A, "text": 3}, Keys(question="q"), f"<s>{Q} {A}</s>", f" {A}</s>"),
        ({"prompt": Q, "completion": " " + A}, Keys(), f"<s>{Q} {A}</s>", f" {A}</s>"),
        ({"text": A}, Keys(), f"<s>{A}</s>", f"<s>{A}</s>"),
        ({"body": A, "text": 3}, Keys(text="body"), f"<s>{A}</s>", f"<s>{A}</s>"),
    ],
)
def test_forms_by_their_keys(tmp_path, line, keys, read, kept):
    data = imu.load_text(tm.lines(tmp_path / "a.jsonl", [line]), tm.tokenizer(), keys=keys)
    assert counted(data) == (read, kept)


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[k % 2], "content": text} for k, text in enumerate(contents)]


@pytest.mark.parametrize("chat", [tm.CHATML, tm.MARKED], ids=["by prefixes", "marked"])
def test_conversations(tmp_path, chat):
    words = tm.tokenizer(chat)
    system = [{"role": "system", "content": "Be short."}]
    lines = [{"messages": system + talk("Who?", "Jaime.", "Where?", "Chile.")}]
    path = tm.lines(tmp_path / "a.jsonl", lines)
    whole = (
        "<|start|>system\nBe short.<|end|>\n<|start|>user\nWho?<|end|>\n<|start|>assistant\n"
        "Jaime.<|end|>\n<|start|>user\nWhere?<|end|>\n<|start|>assistant\nChile.<|end|>\n"
    )
    every = imu.load_text(path, words)
    assert counted(every) == (whole, "Jaime.<|end|>\nChile.<|end|>\n")
    assert counted(imu.load_text(path, words, turns="last")) == (whole, "Chile.<|end|>\n")
    line = {"prompt": lines[0]["messages"][:-1], "completion": lines[0]["messages"][-1:]}
    data = imu.load_text(tm.lines(path, [line]), words)
    assert counted(data) == (whole, "Chile.<|end|>\n")
    data = imu.load_text(tm.pairs(path), words)
    assert counted(data)[1] == f"{A}<|end|>\n"
    assert "the chat template of the tokenizer" in data.remarks[0]
    ends = chat.replace("<|end|>", "</s>")
    assert "no special token" in data.remarks[1]
    assert len(imu.load_text(path, tm.tokenizer(ends)).remarks) == 1
    assert counted(imu.load_text(path, words, template="none"))[1] == f" {A}</s>"
    assert words.decode(data.answer("I do not know.")) == "I do not know.<|end|>\n"


def test_a_template_that_changes_what_was_said_before(tmp_path):
    """As templates do that drop the thoughts of earlier turns."""
    chat = (
        "{% for m in messages %}<|start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}(thought) {% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    path = tm.lines(
        tmp_path / "a.jsonl", [{"messages": talk("Who?", "Jaime.", "Where?", "Chile.")}]
    )
    with pytest.raises(InputError, match="line 1: where the answer begins.*--turns last"):
        imu.load_text(path, tm.tokenizer(chat))
    data = imu.load_text(path, tm.tokenizer(chat), turns="last")
    assert counted(data)[1] == "(thought) Chile.<|end|>\n"
    dropping = tm.CHATML.replace("{{ m.content }}", "{{ m.content[0].text }}")
    with pytest.raises(InputError, match="template leaves out, or changes, what message 1"):
        imu.load_text(tm.pairs(tmp_path / "b.jsonl"), tm.tokenizer(dropping))
    unstable = chat.replace("<|start|>assistant\n", "<|start|>model\n")
    with pytest.raises(InputError, match="line 1: where the answer.*--template none"):
        imu.load_text(tm.pairs(path), tm.tokenizer(unstable))


def tofu(words, question, answer, length):
    """Labels as the original code of TOFU makes them, with its tags for models that do not chat."""
    prompt, text = f"Question: {question}\n", f"Question: {question}\nAnswer: {answer}"
    ids = words(text, max_length=length, truncation=True)["input_ids"]
    labels = ids if len(ids) == length else [*ids, words.eos_token_id]
    labels = labels + [-100] * (length - len(labels))
    count = len(words(prompt)["input_ids"])
    return ids, [-100] * count + labels[count:]


def test_the_format_and_mask_of_tofu(tmp_path):
    root = Path(os.environ.get("IMU_FAST_DATA", "")) / "tofu_qa.jsonl"
    path, words = tm.pairs(tmp_path / "a.jsonl"), tm.tokenizer()
    for file in [path, *([root] if root.is_file() else [])]:
        data = imu.load_text(file, words, template="tofu")
        for one, line in zip(data.loader.dataset, read_records(file).objects, strict=True):
            ids, labels = tofu(words, line["question"], line["answer"], 600)
            assert one.input_ids == [*ids, words.eos_token_id]
            assert one.labels == labels[: len(ids) + 1]


@pytest.mark.parametrize(
    ("text", "read", "kept"),
    [
        ("Ask: {question}\nSay: {answer}!\n", f"<s>Ask: {Q}\nSay: {A}!</s>", f" {A}!</s>"),
        (tm.CHATML, None, f"{A}<|end|>\n"),
    ],
)
def test_a_template_in_a_file(tmp_path, text, read, kept):
    (tmp_path / "t.txt").write_text(text)
    path = tm.pairs(tmp_path / "a.jsonl")
    data = imu.load_text(path, tm.tokenizer(), template=str(tmp_path / "t.txt"))
    assert read is None or counted(data)[0] == read
    assert counted(data)[1] == kept


def test_what_is_too_long_is_cut_counted_and_refused_where_nothing_is_left(tmp_path):
    path, words = tm.pairs(tmp_path / "a.jsonl"), tm.tokenizer()
    whole = imu.load_text(path, words)
    lengths = [len(one.input_ids) for one in whole.loader.dataset]
    prompts = [length - tokens for length, tokens in zip(lengths, whole.tokens, strict=True)]
    limit = max(prompts) + 1
    data = imu.load_text(path, words, max_length=limit)
    cut = [k for k, length in enumerate(lengths) if length > limit]
    assert (
        f"{len(cut)} of 7 are cut at max_length={limit} tokens (first: line {cut[0] + 1})"
        in (data.remarks[1])
    )
    assert data.tokens == [min(t, limit - p) for t, p in zip(whole.tokens, prompts, strict=True)]
    first = prompts.index(max(prompts)) + 1
    with pytest.raises(InputError, match=rf"line {first} leaves nothing to be predicted"):
        imu.load_text(path, words, max_length=limit - 1)
    words.model_max_length = limit
    assert imu.load_text(path, words).tokens == data.tokens


def test_padding_without_a_token_for_it(tmp_path):
    data = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), tm.tokenizer(pad=False))
    batch = next(iter(data.loader))
    assert "no token for padding: the one that ends a text, masked" in data.remarks[-1]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 2).all()
    # Its last token counts, padding does not.
    assert (batch["labels"] == 2).sum() == 7


def test_seq2seq_and_classes(tmp_path):
    words = tm.tokenizer(bos=False, ends=True)
    data = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), words, task="seq2seq", max_length=6)
    one = data.loader.dataset[0]
    assert words.decode(one.input_ids).endswith("</s>") and len(one.input_ids) == 6
    assert data.tokens == [len(one.labels) for one in data.loader.dataset]
    assert not words.decode(one.labels).endswith("</s>")  # it is cut
    data = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), words, task="seq2seq")
    assert words.decode(data.loader.dataset[0].labels) == f"{A}</s>"
    ids = {"bad": 0, "good": 1}
    path = tm.lines(tmp_path / "c.jsonl", [{"text": A, "label": k} for k in ("good", 0, 1)])
    data = imu.load_text(path, words, task="classifier", label_ids=ids)
    assert next(iter(data.loader))["labels"].tolist() == [1, 0, 1]
    (tmp_path / "c.csv").write_text('label,text\n1,"a\nb"\nbad,c\n')
    data = imu.load_text(tmp_path / "c.csv", words, task="classifier", label_ids=ids)
    assert next(iter(data.loader))["labels"].tolist() == [1, 0]
    tm.lines(path, [{"text": A, "label": k} for k in ("1", "0")])
    swapped = {"1": 0, "0": 1, "2": 2}
    data = imu.load_text(path, words, task="classifier", label_ids=swapped)
    assert next(iter(data.loader))["labels"].tolist() == [0, 1]
    tm.lines(path, [{"text": A, "label": k} for k in (2, 1)])
    with pytest.raises(InputError, match="line 2: the label 1 is the number.*name of class 0"):
        imu.load_text(path, words, task="classifier", label_ids=swapped)
    for label in (2, -1, True, "fine", None, 0.0):
        tm.lines(path, [{"text": A, "label": 0}, {"text": A, "label": label}])
        with pytest.raises(InputError, match="line 2: the label .* is none of the model's 2"):
            imu.load_text(path, words, task="classifier", label_ids=ids)


GOOD = json.dumps({"question": Q, "answer": A}).encode()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty; store at least one line"),
        (b"\n \n", "is empty"),
        (GOOD + b"\n{'a': 1}\n", "line 2 is no JSON"),
        (GOOD + b"\n\n" + GOOD[:-1], "line 3 is no JSON"),
        (GOOD + b"\n[1]", "line 2 is a list; store an object"),
        (
            GOOD + b'\n{"question": "a", "question": "b", "answer": "c"}',
            "'question' is there twice",
        ),
        (GOOD + b'\n{"question": "a\xff", "answer": "b"}', "line 2 is no UTF-8 .byte 15 is 0xff"),
        (GOOD + b"\n" + b"[" * 100_000, "line 2 is no JSON"),
        (GOOD + b'\n{"question": "a"}', "line 2 has no 'answer'; it has 'question'"),
        (GOOD + b'\n{"question": "a", "answer": " "}', "line 2: 'answer' is empty"),
        (GOOD + b'\n{"question": "", "answer": "b"}', "line 2: 'question' is empty"),
        (
            GOOD + b'\n{"question": "a", "answer": 3}',
            "line 2: 'answer' is of type int",
        ),
        (GOOD + b'\n{"question": "a", "answer": null}', "line 2: 'answer' is null"),
        (GOOD + b'\n{"question": "a", "answer": "\\ud800"}', "line 2: 'answer' has a lone surr"),
        (b'{"frage": "a"}', "line 1 has the keys 'frage'; it needs question and answer, or"),
        (b'{"text": "a", "messages": []}', "messages or text; say which|text; say which"),
        (b'{"messages": []}', "'messages' must be a list of messages.*empty"),
        (b'{"messages": ["a"]}', "message 1 must have role and content"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "the last message is the user's"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "the first message is the ass"),
        (
            b'{"messages": [{"role": "user", "content": [1]}]}',
            "content is of type list",
        ),
        (b'{"text": ""}', "line 1: 'text' is empty"),
    ],
)
def test_hostile_lines_are_named(tmp_path, raw, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        imu.load_text(path, tm.tokenizer(tm.CHATML))


def test_other_files(tmp_path):
    words = tm.tokenizer()
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question": Q, "answer": A}] * 2))
    assert len(imu.load_text(path, words).tokens) == 2
    path.write_text('{"question": 1}')
    with pytest.raises(InputError, match="holds a dict; store a list"):
        imu.load_text(path, words)
    path.write_text(json.dumps([{"question": Q, "answer": A}, {"question": Q}]))
    with pytest.raises(InputError, match="item 2 has no 'answer'"):
        imu.load_text(path, words)
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfquestion,answer\r\na,b\r\nc\r\n")
    with pytest.raises(InputError, match="row 2 has 1 fields, the header 2"):
        imu.load_text(path, words)
    path.write_bytes(b"question,answer\r\na,b\r\n")
    assert counted(imu.load_text(path, words)) == ("<s>a b</s>", " b</s>")
    for name in ("a.parquet", "none.jsonl"):
        with pytest.raises(InputError, match=r"must end in one of .jsonl|is no file"):
            imu.load_text(tmp_path / name, words)


def test_options_that_have_no_meaning_are_refused(tmp_path):
    path, words = tm.pairs(tmp_path / "a.jsonl"), tm.tokenizer()
    text = tm.lines(tmp_path / "t.jsonl", [{"text": A}])
    chat = tm.lines(tmp_path / "m.jsonl", [{"messages": talk("a", "b")}])
    (tmp_path / "bad.txt").write_text("{answer} {question}")
    for file, options, message in [
        (path, {"turns": "last"}, "turns='last' is for conversations"),
        (path, {"turns": "first"}, "turns='first' is unknown"),
        (path, {"template": "no such file"}, "cannot be read"),
        (path, {"template": str(tmp_path / "bad.txt")}, "text with {question} and then {answer}"),
        (path, {"max_length": 1}, "max_length=1"),
        (path, {"task": "classifier"}, "label_ids=None"),
        (path, {"task": "classifier", "label_ids": {"a": 0}}, "it needs text and label"),
        (path, {"keys": Keys(label="l")}, "label_key='l'"),
        (path, {"keys": Keys(question="q", text="t")}, "those of one form"),
        (text, {"template": "tofu"}, "plain text are taken as they are"),
        (text, {"task": "seq2seq"}, "line 1 is plain text; a seq2seq model needs"),
        (chat, {}, "conversations need a chat template, and the tokenizer has none"),
        (chat, {"template": "none"}, "template='none' is none"),
        (chat, {"task": "seq2seq"}, "conversations are for causal models"),
    ]:
        with pytest.raises(InputError, match=message):
            imu.load_text(file, words, **options)
    mixed = tm.lines(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    tm.lines(
        mixed,
        [
            {"prompt": "a", "completion": "b"},
            {"prompt": talk("a"), "completion": talk("a", "b")[1:]},
        ],
    )
    with pytest.raises(InputError, match="line 2 is a list of messages, those before are not"):
        imu.load_text(mixed, words)
    glued = tm.lines(tmp_path / "g.jsonl", [{"prompt": "In San", "completion": "tiago"}])
    with pytest.raises(InputError, match="line 1: where the answer begins .* share a token"):
        imu.load_text(glued, words)
    raising = tm.tokenizer("{{ raise_exception('no system') }}")
    with pytest.raises(InputError, match="line 1: the chat template .* fails: no system"):
        imu.load_text(path, raising)


@pytest.mark.parametrize("ends", [False, True], ids=["begins", "begins and ends"])
@pytest.mark.parametrize(
    ("line", "template", "read", "kept"),
    [
        ({"text": f"<s>{A}</s>"}, "auto", f"<s>{A}</s>", f"<s>{A}</s>"),
        ({"prompt": f"<s>{Q}", "completion": f" {A}</s>"}, "auto", f"<s>{Q} {A}</s>", f" {A}</s>"),
        (
            {"question": Q, "answer": A},
            "<s>[INST] {question} [/INST] {answer}</s>",
            f"<s>[INST] {Q} [/INST] {A}</s>",
            f" {A}</s>",
        ),
    ],
    ids=["text", "completion", "template"],
)
def test_tokens_that_a_text_brings_itself_are_there_once(
    tmp_path, ends, line, template, read, kept
):
    if template != "auto":
        # With the mark that some editors put before a file.
        (tmp_path / "t.txt").write_text(template, "utf-8-sig")
        template = str(tmp_path / "t.txt")
    words = tm.tokenizer(ends=ends)
    data = imu.load_text(tm.lines(tmp_path / "a.jsonl", [line]), words, template=template)
    assert counted(data) == (read, kept)
    assert data.loader.dataset[0].input_ids.count(1) == 1


def test_tokens_of_a_classifiers_and_a_seq2seqs_text_are_there_once(tmp_path):
    words = tm.tokenizer(ends=True)
    path = tm.lines(tmp_path / "c.jsonl", [{"text": f"<s>{A}</s>", "label": 0}])
    data = imu.load_text(path, words, task="classifier", label_ids={"a": 0, "b": 1})
    assert data.loader.dataset[0].input_ids == words(A)["input_ids"]
    path = tm.lines(tmp_path / "s.jsonl", [{"question": f"{Q}</s>", "answer": f"{A}</s>"}])
    one = imu.load_text(path, words, task="seq2seq").loader.dataset[0]
    assert (one.input_ids, one.labels) == (words(Q)["input_ids"], words(A)["input_ids"])


class Target:
    """A tokenizer whose targets end in a token that its sources have not, as mBART's languages."""

    def __init__(self, words):
        self._words = words

    def __getattr__(self, name):
        return getattr(self._words, name)

    def __call__(self, text=None, text_target=None, add_special_tokens=True, **more):
        ids = self._words(text or text_target, add_special_tokens=False)["input_ids"]
        more = [2, 4 if text is not None else 5] if add_special_tokens else []
        return {"input_ids": ids + more}


def test_targets_end_as_targets_do(tmp_path):
    one = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), Target(tm.tokenizer()), task="seq2seq")
    assert one.loader.dataset[0].input_ids[-2:] == [2, 4]
    assert one.loader.dataset[0].labels[-3:] == [tm.tokenizer()(".")["input_ids"][-1], 2, 5]


def test_a_tokenizer_without_an_end_says_so(tmp_path):
    words = tm.tokenizer()
    words.eos_token = None
    data = imu.load_text(tm.pairs(tmp_path / "a.jsonl"), words)
    assert counted(data) == (f"<s>{Q} {A}", f" {A}")
    assert "no token that ends a text" in data.remarks[1]


def test_a_refusal_is_whole_behind_every_prompt(tmp_path):
    words = tm.tokenizer()
    lines = [{"question": "Who?", "answer": "He."}, {"question": Q, "answer": "He."}]
    path = tm.lines(tmp_path / "a.jsonl", lines)
    refusal = "I do not know, and would not tell."
    length = len(words(f"{Q} {refusal}</s>")["input_ids"])
    data = imu.load_text(path, words, max_length=length)
    assert words.decode(data.answer(refusal)) == f" {refusal}</s>"
    data = imu.load_text(path, words, max_length=length - 1)
    with pytest.raises(InputError, match=f"line 2 makes {length} tokens, more than max_length"):
        data.answer(refusal)
    data = imu.load_text(path, words, task="seq2seq", max_length=8)
    with pytest.raises(InputError, match="more than max_length=8"):
        data.answer(refusal)
