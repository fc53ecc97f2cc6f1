"""``imu-fast score | unlearn --model``: against the library, float64 autograd, and tired users."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import language_models as lm
import numpy as np
import pytest
import text_models as tm
import torch
from per_sample import assert_scores, sample_gradients, scores
from toy_command import run

import imu_fast as imu

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
AUTO = {
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "bert": transformers.AutoModelForSequenceClassification,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind's folder; made once, read by all."""
    root = tmp_path_factory.mktemp("models")
    for kind in AUTO:
        tm.folder(root / kind, kind)
    return root


@pytest.fixture
def data(tmp_path):
    return tm.pairs(tmp_path / "qa.jsonl")


def labelled(path):
    names = ["bad", "fair", "good"]
    return tm.lines(
        path,
        [
            {"text": a, "label": names[i % 3] if i % 2 else i % 3}
            for i, (_, a) in enumerate(tm.PAIRS)
        ],
    )


def file_of(kind, folder):
    return labelled(folder / "c.jsonl") if kind == "bert" else tm.pairs(folder / "qa.jsonl")


def one_at_a_time(kind, words):
    """Each sample as its model takes it, made by hand, in a batch of its own."""
    made = []
    for i, (question, answer) in enumerate(tm.PAIRS):
        if kind == "bert":
            ids, labels = words(answer)["input_ids"], i % 3
        elif kind == "t5":
            ids, labels = words(question)["input_ids"], words(answer)["input_ids"]
        else:
            ids = [*words(f"{question} {answer}")["input_ids"], words.eos_token_id]
            prompt = words(question)["input_ids"]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
        made.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    return made


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def of(rows, name):
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("kind", AUTO)
def test_scores_beside_each_line(folders, tmp_path, kind):
    path, out = file_of(kind, tmp_path), tmp_path / "scores.jsonl"
    options = ["--model", folders / kind, "--data", path, "--batch-size", 3]
    text = run("score", *options, "--out", out, "--self-influence")
    assert f"transformers.{AUTO[kind].__name__}" in text and "float32 (as stored)" in text
    rows, before = read_lines(out), read_lines(path)
    names = {"score", "weight", "self_influence", "loss", "tokens"}
    assert [{k: v for k, v in row.items() if k not in names} for row in rows] == before
    words = transformers.AutoTokenizer.from_pretrained(folders / kind)
    model = AUTO[kind].from_pretrained(folders / kind).eval()
    samples, head = one_at_a_time(kind, words), "classifier" if kind == "bert" else "lm_head"
    truth = lm.untied(model, head)
    weights = [f"{head}.{name}" for name, _ in truth.get_submodule(head).named_parameters()]
    gradients = sample_gradients(truth, samples, weights, lambda m, s: m(**s).loss)
    assert_scores(of(rows, "score"), scores(gradients))
    inverse = 1 / (gradients.square().mean(dim=0) + 1e-2)
    assert_scores(of(rows, "self_influence"), (gradients.square() * inverse).sum(dim=1))
    with torch.no_grad():
        losses = torch.stack([truth(**sample).loss for sample in samples])
    assert_scores(of(rows, "loss"), losses)
    counts = [int((s["labels"] != -100).sum()) for s in samples]
    assert [row["tokens"] for row in rows] == ([1] * 7 if kind == "bert" else counts)
    # And the library's own call, and its weights.
    task = {"t5": "seq2seq", "bert": "classifier"}.get(kind, "causal")
    loaded = imu.load_text(
        path, words, task=task, batch_size=3, label_ids=getattr(model.config, "label2id", None)
    )
    ours = imu.influence_scores(model, loaded.loader)
    np.testing.assert_array_equal(of(rows, "score").float(), ours)
    indices, kept = imu.influence_weights(ours, on_empty="uniform")
    weight = torch.zeros(7).index_put_((indices,), kept)
    np.testing.assert_array_equal(of(rows, "weight").float(), weight)


def test_other_layers_and_other_endings(folders, data, tmp_path):
    options = ["score", "--model", folders / "llama", "--data", data, "--layers", "q_proj, v_proj"]
    run(*options, "--out", tmp_path / "ggn.jsonl", "--curvature", "ggn")
    run(*options, "--out", tmp_path / "s.jsonl")
    assert of(read_lines(tmp_path / "ggn.jsonl"), "score").isfinite().all()
    words = transformers.AutoTokenizer.from_pretrained(folders / "llama")
    model = AUTO["llama"].from_pretrained(folders / "llama").eval()
    truth = copy.deepcopy(model).double()
    names = [n for n, _ in truth.named_parameters() if "q_proj" in n or "v_proj" in n]
    assert len(names) == 4
    samples = one_at_a_time("llama", words)
    gradients = sample_gradients(truth, samples, names, lambda m, s: m(**s).loss)
    rows = read_lines(tmp_path / "s.jsonl")
    assert_scores(of(rows, "score"), scores(gradients))
    with torch.no_grad():
        assert_scores(of(rows, "loss"), torch.stack([truth(**s).loss for s in samples]))
    run(*options, "--out", tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["sample", "influence", "weight", "loss", "tokens"]
    assert [row["sample"] for row in table] == [str(k) for k in range(1, 8)]
    np.testing.assert_allclose([float(r["influence"]) for r in table], of(rows, "score"), rtol=1e-6)
    run(*options, "--out", tmp_path / "s.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "s.npz")["tokens"], of(rows, "tokens"))


@pytest.mark.parametrize("chat", [tm.CHATML, tm.MARKED], ids=["by prefixes", "marked"])
def test_a_chat_template_is_the_tokenizers_and_said(tmp_path, data, chat):
    folder = tm.folder(tmp_path / "chat", "llama", chat=chat)
    options = ["score", "--model", folder, "--data", data, "-v"]
    text = run(*options, "--out", tmp_path / "a.jsonl")
    assert "by the chat template of the tokenizer" in text
    assert r"<|start|>assistant\nJaime Vasquez was born in Santiago, Chile.<|end|>\n'" in text
    assert r"of which counts 'Jaime Vasquez was born in Santiago, Chile.<|end|>\n'" in text
    run(*options, "--template", "none", "--out", tmp_path / "b.jsonl")
    a, b = (of(read_lines(tmp_path / name), "loss") for name in ("a.jsonl", "b.jsonl"))
    assert float((a - b).abs().max()) > 1e-3


def token_losses(model, samples):
    with torch.no_grad():
        return torch.stack([model(**sample).loss.double() for sample in samples])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", ["--method", "imu", "--lr", 0.3]),
        ("llama", ["--method", "npo", "--scope", "all", "--optimizer", "AdamW", "--lr", 0.003]),
        ("llama", ["--method", "simnpo", "--set", "beta=0.1", "--scope", "layers", "--lr", 1]),
        ("llama", ["--method", "imu", "--lora", "r=4,alpha=8", "--lr", 0.3]),
        ("llama", ["--method", "uniform", "--lora", "target=q_proj|down_proj", "--lr", 0.3]),
        ("llama", ["--method", "uniform", "--objective", "refusal", "--refusal", "No idea."]),
        ("gpt2", ["--method", "imu", "--lr", 0.05]),
        ("gpt2", ["--method", "uniform", "--lora", "default", "--lr", 0.3]),
        ("t5", ["--method", "uniform", "--scope", "all"]),
        ("t5", ["--method", "random_label", "--lora", "default"]),
        ("bert", ["--method", "imu", "--lr", 0.5]),
        ("bert", ["--method", "margin_edit"]),
        ("bert", ["--method", "uniform", "--lora", "target=query|value", "--lr", 10]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value[1:4])),
)
def test_what_is_written_is_what_is_reported(folders, tmp_path, kind, options):
    path, out = file_of(kind, tmp_path), tmp_path / "deep" / "out"
    epochs = [] if "margin_edit" in options else ["--epochs", 4]
    more = ["--seed", 1, "--out", out, *options, *epochs]
    text = run("unlearn", "--model", folders / kind, "--data", path, *more)
    report = json.loads((out / "imu_fast.json").read_text())
    samples = one_at_a_time(kind, transformers.AutoTokenizer.from_pretrained(out))
    before = AUTO[kind].from_pretrained(folders / kind).eval()
    if "--lora" in options:
        peft = pytest.importorskip("peft")
        assert {p.name for p in out.iterdir()} >= {"adapter_config.json", "imu_fast.json"}
        assert not (out / "model.safetensors").exists()
        after = peft.PeftModel.from_pretrained(copy.deepcopy(before), out).eval()
        alone = json.loads((out / "adapter_config.json").read_text())
        assert Path(alone["base_model_name_or_path"]) == folders / kind
    else:
        after = AUTO[kind].from_pretrained(out).eval()
    for model, name in ((before, "before"), (after, "after")):
        losses = token_losses(model, samples)
        assert report[name]["forget"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    change = [report[when]["forget"]["loss"] for when in ("before", "after")]
    assert abs(change[1] - change[0]) > 1e-3
    assert report["trajectory"][-1]["forget_loss"] == pytest.approx(change[1], rel=1e-5)
    assert f"forget loss {change[0]:.4f} -> {change[1]:.4f}" in text
    if "refusal" not in options and "random_label" not in options:
        assert change[1] > change[0]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_refusing_and_keeping(folders, data, tmp_path):
    kept = tm.lines(
        tmp_path / "kept.jsonl", [{"question": "Who?", "answer": "Nobody knows it."}] * 2
    )
    options = ["unlearn", "--model", folders / "llama", "--data", data, "--scope", "all"]
    options += ["--method", "uniform", "--epochs", 90, "--optimizer", "AdamW", "--lr", 0.003]
    refuse = ["--objective", "refusal", "--refusal", "I do not know."]
    run(*options, *refuse, "--out", tmp_path / "out", "--set", "max_steps=60")
    report = json.loads((tmp_path / "out" / "imu_fast.json").read_text())
    assert report["steps"] == 60 and report["settings"]["objective"] == "refusal"
    model = AUTO["llama"].from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = torch.tensor([words(tm.PAIRS[0][0])["input_ids"]])
    said = model.generate(asked, max_new_tokens=20, do_sample=False)[0, asked.shape[1] :]
    assert words.decode(said) == " I do not know.</s>"
    text = run(*options, "--retain", kept, "--out", tmp_path / "kept", "--stop-loss", 8)
    report = json.loads((tmp_path / "kept" / "imu_fast.json").read_text())
    assert report["stopped_by"] == "forget_loss" and report["reached"]
    assert report["after"]["forget"]["loss"] == pytest.approx(8, abs=0.05)
    assert report["after"]["retain"]["loss"] < report["before"]["retain"]["loss"]
    assert "retain loss" in text and "retain: 2 lines" in text


def test_adapters_in(folders, data, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    base = ["unlearn", "--model", folders / "llama", "--data", data, "--method", "uniform"]
    run(*base, "--lora", "r=2", "--lr", 0.5, "--epochs", 3, "--out", adapter)
    out = [tmp_path / f"{k}.jsonl" for k in range(3)]
    run("score", "--model", adapter, "--data", data, "--out", out[0])
    run("score", "--model", adapter, "--merge", "--data", data, "--out", out[1])
    run("score", "--model", folders / "llama", "--data", data, "--out", out[2])
    found = [of(read_lines(path), "score") for path in out]
    assert_scores(found[0], found[1])
    assert float((found[0] - found[2]).norm() / found[2].norm()) > 1e-2
    model = AUTO["llama"].from_pretrained(folders / "llama")
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    loaded = imu.load_text(data, transformers.AutoTokenizer.from_pretrained(adapter))
    assert_scores(found[0], imu.influence_scores(model, loaded.loader).double())
    # Trained further, it is an adapter again; merged, a checkpoint.
    more = ["unlearn", "--model", adapter, "--data", data, "--method", "uniform", "--epochs", 1]
    run(*more, "--out", tmp_path / "more")
    assert (tmp_path / "more" / "adapter_model.safetensors").is_file()
    first, second = (
        json.loads((tmp_path / name / "imu_fast.json").read_text()) for name in ("adapter", "more")
    )
    assert second["before"]["forget"] == pytest.approx(first["after"]["forget"])
    run(*more, "--merge", "--out", tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    # Where its base is no longer where it was.
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "some/hub-name"})
    )
    text = run("score", "--model", adapter, "--data", data, "--out", out[0], "--force", code=2)
    assert "adapter of 'some/hub-name', which is no folder here; pass --base" in text
    run(
        "score",
        "--model",
        adapter,
        "--base",
        folders / "llama",
        "--data",
        data,
        "--out",
        out[2],
        "--force",
    )
    np.testing.assert_allclose(of(read_lines(out[2]), "score"), found[0], rtol=1e-6)
    for change, message in [
        (["--lora", "r=2"], "is an adapter already"),
        (["--scope", "head"], "scope='head' trains the model's own layers"),
        (["--preset", "paper"], "preset='paper' trains"),
        (["--layers", "lm_head"], "has no option layers"),
    ]:
        again = [*more, "--base", folders / "llama", *change, "--out", tmp_path / "no"]
        assert message in run(*again, code=2)


def test_a_run_goes_on_from_its_checkpoint(folders, data, tmp_path):
    pytest.importorskip("peft")
    options = ["unlearn", "--model", folders / "llama", "--data", data, "--method", "uniform"]
    options += ["--lora", "r=2", "--lr", 0.5]
    kept = ["--checkpoint", tmp_path / "run.safetensors"]
    run(*options, "--epochs", 4, "--out", tmp_path / "whole")
    run(*options, "--epochs", 2, *kept, "--out", tmp_path / "half")
    run(*options, "--epochs", 4, *kept, "--out", tmp_path / "rest")
    found = [
        json.loads((tmp_path / name / "imu_fast.json").read_text())["after"]
        for name in ("half", "whole", "rest")
    ]
    assert found[1] == found[2] != found[0]


def test_models_whose_lines_are_not_of_one_class_are_refused(folders, tmp_path):
    path = labelled(tmp_path / "c.jsonl")
    for change in ({"problem_type": "multi_label_classification"}, {"problem_type": "regression"}):
        folder = tmp_path / change["problem_type"]
        shutil.copytree(folders / "bert", folder)
        edited(folder, "config.json", lambda c, change=change: c.update(change))
        text = run("score", "--model", folder, "--data", path, code=2)
        assert f"problem_type='{change['problem_type']}'; lines have one class each" in text


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_folder_runs_where_it_is_trusted(folders, data, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folders / "llama", own)
    (own / "code.py").write_text(CODE)
    auto = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    named = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    edited(own, "config.json", lambda c: c.update(named))
    # In a process of its own, whose copies of such code go into a folder of its own.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    main = "from imu_fast.cli.app import app; app()"
    out = tmp_path / "s.jsonl"
    command = [sys.executable, "-c", main, "score", "--model", own, "--data", data, "--out", out]
    command = [str(part) for part in command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--trust-remote-code runs it" in done.stderr and not out.exists()
    done = subprocess.run(
        [*command, "--trust-remote-code"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run("score", "--model", folders / "llama", "--data", data, "--out", tmp_path / "l.jsonl")
    # To rounding: another process may have another number of threads.
    for line, same in zip(read_lines(out), read_lines(tmp_path / "l.jsonl"), strict=True):
        words = {name for name, value in line.items() if isinstance(value, str)}
        assert {n: line[n] for n in words} == {n: same[n] for n in words}
        numbers = line.keys() - words
        assert {n: line[n] for n in numbers} == pytest.approx(
            {n: same[n] for n in numbers}, rel=1e-4
        )


def test_lora_on_some_layers(folders, data, tmp_path):
    pytest.importorskip("peft")
    options = ["unlearn", "--model", folders / "llama", "--data", data, "--method", "uniform"]
    options += ["--lora", "r=2", "--epochs", 1]
    # With dropout, which a head on cached features, the default scope, has not.
    some = ["--scope", "layers", "--layers", "*layers.1.mlp*", "--set", "dropout=train"]
    run(*options, *some, "--out", tmp_path / "out")
    from safetensors.torch import load_file

    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(names) == 6 and all(".layers.1.mlp." in name for name in names)


def test_dtypes_are_said_and_chosen(folders, data, tmp_path):
    half = tmp_path / "half"
    tm.make("llama").bfloat16().save_pretrained(half)
    options = ["--model", half, "--tokenizer", folders / "llama", "--data", data]
    text = run("score", *options, "--out", tmp_path / "a.jsonl")
    assert "bfloat16 (as stored)" in text
    run("score", *options, "--out", tmp_path / "a.csv")
    text = run("score", *options, "--dtype", "float64", "--out", tmp_path / "b.jsonl")
    assert "float64 (as asked)" in text
    run("unlearn", *options, "--out", tmp_path / "out", "--method", "uniform", "--lr", 30)
    from safetensors.torch import load_file

    written = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {tensor.dtype for tensor in written} == {torch.bfloat16}


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


def test_an_edit_of_the_head_is_no_adapter(folders, tmp_path):
    pytest.importorskip("peft")
    options = ["--model", folders / "bert", "--data", labelled(tmp_path / "c.jsonl")]
    options += ["--lora", "r=2", "--method", "margin_edit", "--out", tmp_path / "out"]
    assert "lora: method='margin_edit' edits the head" in run("unlearn", *options, code=2)


def test_flags_of_the_two_kinds_do_not_mix(tmp_path, data):
    assert "pass --arch and --weights" in run("score", "--data", data, code=2)
    options = ["--arch", "a:b", "--data", data]
    assert "weights=None" in run("score", *options, code=2)
    options += ["--weights", "w.pt"]
    assert "template='none': goes with --model" in run(
        "score", *options, "--template", "none", code=2
    )
    assert "retain: for texts" in run("unlearn", *options, "--retain", data, code=2)


def edited(folder, name, change):
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


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


def test_a_decoder_that_classifies_is_told_its_padding(tmp_path):
    """Its last token that is no padding speaks for the text."""
    config = transformers.GPT2Config(
        vocab_size=400, n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "m")
    words = tm.tokenizer(pad=False)
    words.save_pretrained(tmp_path / "m")
    path = tm.lines(
        tmp_path / "c.jsonl", [{"text": a, "label": i % 3} for i, (_, a) in enumerate(tm.PAIRS)]
    )
    text = run("score", "--model", tmp_path / "m", "--data", path, "--out", tmp_path / "s.jsonl")
    assert "config.pad_token_id is set to 2" in text
    alone = one_at_a_time("bert", words)
    assert_scores(of(read_lines(tmp_path / "s.jsonl"), "loss"), token_losses(model, alone))


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


def test_a_merged_adapter_is_a_model_that_trains(folders, data, tmp_path):
    pytest.importorskip("peft")
    base = ["unlearn", "--data", data, "--method", "uniform", "--lr", 0.1, "--epochs", 2]
    run(*base, "--model", folders / "llama", "--lora", "r=2", "--out", tmp_path / "adapter")
    for scope in ("head", "all"):
        whole = ["--model", tmp_path / "adapter", "--merge", "--scope", scope]
        run(*base, *whole, "--out", tmp_path / scope)
        report = json.loads((tmp_path / scope / "imu_fast.json").read_text())
        assert report["after"]["forget"]["loss"] > report["before"]["forget"]["loss"] + 1e-4


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


def test_an_adapter_beside_a_model_is_an_adapter_and_says_so(folders, data, tmp_path):
    """transformers puts it on the model that is there, without a word."""
    pytest.importorskip("peft")
    base = ["unlearn", "--data", data, "--method", "uniform", "--lr", 0.5, "--epochs", 2]
    run(*base, "--model", folders / "llama", "--lora", "r=2", "--out", tmp_path / "adapter")
    shutil.copytree(folders / "llama", tmp_path / "both")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, tmp_path / "both")
    found = []
    for name in ("adapter", "both"):
        out = tmp_path / f"{name}.jsonl"
        said = run("score", "--model", tmp_path / name, "--data", data, "--out", out)
        assert f"with the adapter {name}" in said
        found.append(of(read_lines(out), "score"))
    assert torch.equal(*found)
    options = ["--base", tmp_path / "both", "--data", data, "--out", tmp_path / "s.jsonl"]
    said = run("score", "--model", tmp_path / "adapter", *options, code=2)
    assert "holds an adapter itself" in said


def test_what_an_adapter_counts_is_part_of_the_model(folders, data, tmp_path):
    pytest.importorskip("peft")
    base = ["unlearn", "--data", data, "--method", "uniform", "--lr", 0.5, "--epochs", 2]
    run(*base, "--model", folders / "llama", "--lora", "r=2", "--out", tmp_path / "a")
    of_it = ["--model", tmp_path / "a", "--data", data]
    run("index", *of_it, "--out", tmp_path / "index")
    score = ["score", *of_it, "--checkpoint", tmp_path / "parts", "--force"]
    run(*score, "--out", tmp_path / "s.jsonl")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    query = ["query", *of_it, "--index", tmp_path / "index", "--out", tmp_path / "q.npz"]
    assert "lora_alpha' (and" in run(*query, code=2)
    assert "its model is another" in run(*score, "--out", tmp_path / "s.jsonl", code=2)
