"""``--model`` of adapters, of code of a folder's own, and of parts of a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from per_sample import assert_scores
from text_command import AUTO, edited, labelled, of, read_lines, transformers
from toy_command import run

import imu_fast as imu


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
    command = [*(str(part) for part in command), "--trust-remote-code"]
    said = run("score", "--model", own, "--data", data, "--out", out, code=2)
    assert "--trust-remote-code runs it" in said and not out.exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
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


def test_an_edit_of_the_head_is_no_adapter(folders, tmp_path):
    pytest.importorskip("peft")
    options = ["--model", folders / "bert", "--data", labelled(tmp_path / "c.jsonl")]
    options += ["--lora", "r=2", "--method", "margin_edit", "--out", tmp_path / "out"]
    assert "lora: method='margin_edit' edits the head" in run("unlearn", *options, code=2)


def test_a_merged_adapter_is_a_model_that_trains(folders, data, tmp_path):
    pytest.importorskip("peft")
    base = ["unlearn", "--data", data, "--method", "uniform", "--lr", 0.1, "--epochs", 2]
    run(*base, "--model", folders / "llama", "--lora", "r=2", "--out", tmp_path / "adapter")
    for scope in ("head", "all"):
        whole = ["--model", tmp_path / "adapter", "--merge", "--scope", scope]
        run(*base, *whole, "--out", tmp_path / scope)
        report = json.loads((tmp_path / scope / "imu_fast.json").read_text())
        assert report["after"]["forget"]["loss"] > report["before"]["forget"]["loss"] + 1e-4


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
