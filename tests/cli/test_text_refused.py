"""``--model``, by tired users: what is refused, by name and before the work."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import text_models as tm
import torch
from per_sample import assert_scores
from text_command import AUTO, edited, labelled, of, read_lines, transformers
from toy_command import run


def test_models_whose_lines_are_not_of_one_class_are_refused(folders, tmp_path):
    path = labelled(tmp_path / "c.jsonl")
    for change in ({"problem_type": "multi_label_classification"}, {"problem_type": "regression"}):
        folder = tmp_path / change["problem_type"]
        shutil.copytree(folders / "bert", folder)
        edited(folder, "config.json", lambda c, change=change: c.update(change))
        text = run("score", "--model", folder, "--data", path, code=2)
        assert f"problem_type='{change['problem_type']}'; lines have one class each" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "model='nowhere' is no folder; nothing is downloaded"),
        (["--model", "."], "model='.' has neither config.json nor adapter_config.json"),
        (["--data", "none.jsonl"], "data='none.jsonl' is no file"),
        (["--out", "scores.txt"], "must end in one of .jsonl, .npz"),
        (["--out", "qa.jsonl"], "out='qa.jsonl' is data='qa.jsonl' too"),
        (["--arch", "a:b"], "arch='a:b': goes with --arch, and --model is given"),
        (["--classes", "a"], "classes='a': goes with --arch"),
        (["--base", "b"], "base='b' is for a PEFT adapter"),
        (["--merge"], "merge is for a PEFT adapter"),
        (["--tokenizer", "."], "tokenizer='.' has no tokenizer"),
        (["--dtype", "int8"], "dtype='int8' is unknown"),
        (["--device", "mars"], "device='mars' is not to be had"),
        (["--curvature", "hessian"], "curvature='hessian' is unknown"),
        (["--layers", "nope"], "nope"),
        (["--layers", ""], "layers='' has an empty name"),
        (["--layers", "q_proj,"], "has an empty name"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--max-length", "0"], "max_length=0"),
        (["--max-length", "500"], "max_length=500 is more than the model's 128 positions"),
        (["--max-length", "3"], "line 1 leaves nothing to be predicted"),
        (["--template", "nope"], "template='nope' cannot be read"),
        (["--text-key", "answr"], "line 1 has no 'answr'"),
        (["--label-key", "index"], "label_key='index'"),
        (["--turns", "last"], "turns='last' is for conversations"),
    ],
)
def test_errors_are_one_line_before_any_work(folders, data, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    text = run("score", "--model", folders / "llama", "--data", "qa.jsonl", *change, code=2)
    assert "error: " in text and message in text and "Traceback" not in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "there"], "out='there' is there already"),
        (["--out", "qa.jsonl"], "out='qa.jsonl' is there already"),
        (["--out", "qa.jsonl/x"], "is no folder"),
        (["--method", "margin_edit"], "method='margin_edit' is for samples of one label"),
        (["--method", "nope"], "method='nope' is unknown"),
        (["--set", "nope=1"], "has no option nope"),
        (["--set", "beta"], "set='beta'; write NAME=VALUE"),
        (["--set", "lr=1"], "it has a flag of its own, --lr"),
        (["--set", "answer=[1]"], "it has a flag of its own, --refusal"),
        (["--set", "top_fraction=2"], "top_fraction=2"),
        (["--optimizer", "Nope"], "optimizer='Nope' is unknown"),
        (["--objective", "refusal"], "needs --refusal"),
        (["--layers", ""], "has an empty name"),
        (["--refusal", "No."], "has no option answer"),
        (["--method", "margin_edit", "--retain", "qa.jsonl"], "has no option retain"),
        (["--retain", "none.jsonl"], "retain='none.jsonl' is no file"),
        (["--retain", "bad.jsonl"], "retain='bad.jsonl': line 1 is no JSON"),
        (["--lora", "rank=3"], "lora='rank=3': 'rank=3' is unknown"),
        (["--lora", "r=x"], "r='x' is no number"),
        (["--lora", "r=0"], "lora: r=0 must be"),
        (["--lora", "target=nope"], "target='nope' ends no linear layer's name"),
        (
            ["--lora", "r=2", "--method", "margin_edit"],
            "method='margin_edit' is for samples of one label",
        ),
        (["--lora", "r=2", "--scope", "head"], "scope='head' trains the model's own"),
        (["--lora", "r=2", "--scope", "layers"], "--layers that say where it is put"),
        (["--stop-accuracy", "2"], "forget_accuracy=2.0 must lie in [0, 1]"),
        (["--checkpoint", "qa.jsonl"], "checkpoint='qa.jsonl' is data="),
    ],
)
def test_unlearn_refuses_before_any_work(folders, data, tmp_path, monkeypatch, change, message):
    if "--lora" in change:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("imu_fast.cli.text_unlearning.measured", None)
    (tmp_path / "bad.jsonl").write_text("no")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    text = run("unlearn", "--model", folders / "llama", "--data", "qa.jsonl", *change, code=2)
    assert "error: " in text and message in text and "Traceback" not in text
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_of_the_two_kinds_do_not_mix(tmp_path, data):
    assert "pass --arch and --weights" in run("score", "--data", data, code=2)
    options = ["--arch", "a:b", "--data", data]
    assert "weights=None" in run("score", *options, code=2)
    options += ["--weights", "w.pt"]
    assert "template='none': goes with --model" in run(
        "score", *options, "--template", "none", code=2
    )
    assert "retain: for texts" in run("unlearn", *options, "--retain", data, code=2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "pass --tokenizer FOLDER"),
        (
            lambda f: edited(f, "config.json", lambda c: c.update(architectures=["LlamaModel"])),
            "architectures=['LlamaModel'], which is no causal",
        ),
        (
            lambda f: edited(f, "config.json", lambda c: c.pop("architectures")),
            "architectures=[]",
        ),
        (
            lambda f: edited(f, "config.json", lambda c: c.update(num_hidden_layers=3)),
            "the weights do not fit the config, and would be random",
        ),
        (
            lambda f: edited(f, "config.json", lambda c: c.update(vocab_size=300)),
            "the weights do not fit the config, and would be random",
        ),
        (
            lambda f: edited(
                f,
                "config.json",
                lambda c: c.update(
                    model_type="own",
                    auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "o.M"},
                ),
            ),
            "it brings code of its own, which is not run unless you trust it: --trust-remote-code",
        ),
    ],
)
def test_broken_folders(folders, data, tmp_path, damage, message):
    broken = tmp_path / "model"
    shutil.copytree(folders / "llama", broken)
    damage(broken)
    text = run("score", "--model", broken, "--data", data, "--out", tmp_path / "s.jsonl", code=2)
    assert text.count("error: ") == 1 and "Traceback" not in text
    assert message in text
    assert not (tmp_path / "s.jsonl").exists()


def test_a_tokenizer_of_another_model(folders, data, tmp_path):
    tm.make("llama", rows=300).save_pretrained(tmp_path / "small")
    options = ["--model", tmp_path / "small", "--tokenizer", folders / "llama", "--data", data]
    text = run("score", *options, code=2)
    assert re.search(r"the tokenizer gives token \d+, the model has 300", text)


def test_lines_that_have_scores_already(folders, data, tmp_path):
    out = tmp_path / "once.jsonl"
    run("score", "--model", folders / "llama", "--data", data, "--out", out)
    twice = ["score", "--model", folders / "llama", "--data", out, "--out"]
    text = run(*twice, tmp_path / "twice.jsonl", code=2)
    assert "line 1 has 'score', 'weight', 'loss', 'tokens' already" in text
    run(*twice, tmp_path / "twice.csv")


def test_a_disk_that_fills_at_the_end_loses_no_model(folders, data, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "full").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    replace = os.replace

    def full(source, target):
        if "full" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    options = ["unlearn", "--model", folders / "llama", "--data", data, "--epochs", 1]
    text = run(*options, "--out", tmp_path / "full" / "m", code=2)
    kept = Path(re.search(r"the result is in '(.*)': move it", text)[1])
    assert kept.parent == tmp_path / "here"
    assert AUTO["llama"].from_pretrained(kept).config.vocab_size == 400
    assert not list((tmp_path / "full").iterdir())


def test_a_disk_that_is_too_small_is_said_before_the_work(folders, data, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    options = ["unlearn", "--model", folders / "llama", "--data", data, "--out", tmp_path / "o"]
    assert "0 MB are free there" in run(*options, code=2)


@pytest.mark.parametrize("kind", ["fnet", "xlnet"])
def test_padding_that_changes_a_sample_is_refused(tmp_path, kind):
    """No mask at all; and the last place of a row, whatever is there."""
    own = {"vocab_size": 400, "pad_token_id": 0, "num_labels": 3}
    if kind == "fnet":
        config = transformers.FNetConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, **own
        )
    else:
        config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=32, **own)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(tmp_path / "model")
    words = tm.tokenizer(ends=True)
    words.save_pretrained(tmp_path / "model")
    rows = [{"text": a, "label": i % 3} for i, (_, a) in enumerate(tm.PAIRS)]
    options = ["--model", tmp_path / "model", "--data", tm.lines(tmp_path / "c.jsonl", rows)]
    out = tmp_path / "scores.jsonl"
    said = run("score", *options, "--out", out, code=2)
    assert "changes with padding" in said and "--batch-size 1" in said and not out.exists()
    run("score", *options, "--out", out, "--batch-size", 1)
    truth = model.double()
    with torch.no_grad():
        losses = [
            truth(
                torch.tensor([words(row["text"])["input_ids"]]), labels=torch.tensor([i % 3])
            ).loss
            for i, row in enumerate(rows)
        ]
    assert_scores(of(read_lines(out), "loss"), torch.stack(losses))


def test_a_refusal_that_does_not_fit_is_refused(folders, tmp_path):
    path = tm.lines(
        tmp_path / "a.jsonl",
        [{"question": "Who?", "answer": "He."}, {"question": tm.PAIRS[0][0] * 4, "answer": "He."}],
    )
    refuse = ["--method", "uniform", "--objective", "refusal", "--refusal", "I do not know. " * 4]
    options = ["--model", folders / "gpt2", "--data", path, "--out", tmp_path / "out"]
    said = run("unlearn", *options, *refuse, code=2)
    assert "line 2 makes" in said and "more than max_length=64" in said


@pytest.mark.parametrize("file", ["template", "tokenizer"])
def test_parts_of_a_checkpoint_are_of_the_tokens_that_were_read(folders, data, tmp_path, file):
    shutil.copytree(folders / "llama", tmp_path / "model")
    template = tmp_path / "t.txt"
    template.write_text("Q: {question}\nA: {answer}")
    options = ["score", "--model", tmp_path / "model", "--data", data, "--force"]
    options += ["--checkpoint", tmp_path / "parts", "--out", tmp_path / "s.jsonl"]
    options += ["--template", template] if file == "template" else []
    run(*options)
    run(*options)
    if file == "template":
        template.write_text("Frage: {question}\nA: {answer}")
    else:
        tm.tokenizer(tm.CHATML).save_pretrained(tmp_path / "model")
    assert "were read in another way" in run(*options, code=2)
