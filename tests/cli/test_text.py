"""``imu-fast score | unlearn --model``: against the library and float64 autograd."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import language_models as lm
import numpy as np
import pytest
import text_models as tm
import torch
from per_sample import assert_scores, sample_gradients, scores
from text_command import AUTO, file_of, of, one_at_a_time, read_lines, token_losses, transformers
from toy_command import run

import imu_fast as imu


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
