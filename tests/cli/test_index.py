"""``imu-fast index | query``: the library's numbers, of images and of text, and refusals."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import text_models as tm
import torch
from toy_command import run, toy_model

import imu_fast as imu


@pytest.fixture
def paths(toy):
    folder, options, (x, y) = toy
    np.savez(folder / "asked.npz", x=x[:3].numpy() + 0.1, y=y[:3].numpy())
    return folder, options[:4], (x, y), (x[:3] + 0.1, y[:3])


def built(folder, options, *more):
    given = [*options, "--data", folder / "forget.npz", "--out", folder / "index", *more]
    return run("index", *given, "--batch-size", 4)


def asked(folder, options, out, *more, code=0):
    given = [*options, "--data", folder / "asked.npz", "--index", folder / "index"]
    return run("query", *given, "--out", folder / out, *more, code=code)


@pytest.mark.parametrize("curvature", [None, "identity"])
@pytest.mark.parametrize("how", [[], ["--layers", "1,3"], ["--projection", "5", "--seed", "3"]])
def test_of_images(paths, how, curvature):
    folder, options, data, queries = paths
    assert "20 samples at" in built(folder, options, *how)
    layers = ["1", "3"] if "--layers" in how else "head"
    drawn = {"projection": 5, "seed": 3} if "--seed" in how else {}
    index = imu.build_index(toy_model(), data, folder / "own", layers=layers, **drawn)
    found = index.capture(toy_model(), queries)
    spec = [] if curvature is None else ["--curvature", curvature]
    assert "3 queries against 20 samples" in asked(folder, options, "all.npz", *spec)
    whole = np.load(folder / "all.npz")
    truth = index.scores(found, curvature=curvature)
    np.testing.assert_allclose(whole["influence"], truth, rtol=1e-4, atol=1e-6)
    assert list(whole["sample"]) == [str(i) for i in range(20)] and len(whole["query"]) == 3
    values, places = index.top(found, 4, by="harmful", curvature=curvature)
    asked(folder, options, "top.csv", *spec, "--top", 4, "--by", "harmful")
    with open(folder / "top.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["sample"]) for row in rows] == places.flatten().tolist()
    assert [int(row["rank"]) for row in rows] == [1, 2, 3, 4] * 3
    found = torch.tensor([float(row["influence"]) for row in rows])
    torch.testing.assert_close(found, values.flatten().float(), rtol=1e-4, atol=1e-6)


def test_of_inner_layers_every_curvature_has_a_way(paths):
    """The way out that the refusal names is one of this command."""
    folder, options, data, queries = paths
    built(folder, options, "--layers", "1")
    kfac = ["--curvature", "kfac", "--damping", 0.1]
    assert "fisher='empirical'" in asked(folder, options, "all.npz", *kfac, code=2)
    asked(folder, options, "all.npz", *kfac, "--fisher", "empirical")
    index = imu.build_index(toy_model(), data, folder / "own", layers=["1"])
    spec = imu.KFAC(damping=0.1, fisher="empirical")
    truth = index.scores(index.capture(toy_model(), queries), curvature=spec)
    found = np.load(folder / "all.npz")["influence"]
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-6)


def test_a_folder_is_gone_on_in_and_nothing_is_replaced(paths):
    folder, options, _, _ = paths
    first = built(folder, options)
    chunk = folder / "index" / "chunk-000000.safetensors"
    time = chunk.stat().st_mtime_ns
    assert built(folder, options) == first and chunk.stat().st_mtime_ns == time
    given = [*options, "--data", folder / "forget.npz", "--out", folder / "index"]
    assert "projection" in run("index", *given, "--batch-size", 4, "--projection", 3, code=2)
    assert "other files" in run("index", *given[:-1], folder, code=2)
    asked(folder, options, "top.csv")
    before = (folder / "top.csv").read_bytes()
    assert "--force" in asked(folder, options, "top.csv", code=2)
    assert (folder / "top.csv").read_bytes() == before
    asked(folder, options, "top.csv", "--force", "--top", 1)
    assert (folder / "top.csv").read_bytes() != before


REFUSED = {
    "no index": (["--index", "nowhere"], "holds no index"),
    "too many": (["--top", "21"], "top=21 is more than the 20 samples"),
    "none": (["--top", "0"], "top=0"),
    "by": (["--by", "nothing"], "by='nothing'"),
    "damping alone": (["--damping", "0.1"], "without a curvature"),
    "curvature": (["--curvature", "nothing"], "curvature='nothing'"),
    "damping": (["--curvature", "ggn", "--damping", "-1"], "damping=-1"),
    "fisher alone": (["--fisher", "empirical"], "without a curvature"),
    "fisher of none": (["--curvature", "identity", "--fisher", "exact"], "no option fisher"),
    "fisher": (["--curvature", "ggn", "--fisher", "nothing"], "fisher='nothing'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_queries(name, paths):
    folder, options, _, _ = paths
    built(folder, options)
    more, says = REFUSED[name]
    assert says in asked(folder, options, "top.csv", *more, code=2)
    assert not (folder / "top.csv").exists()


def test_other_refusals(paths):
    folder, options, _, _ = paths
    built(folder, options)
    assert "a .npz has all" in asked(folder, options, "a.npz", "--top", 3, code=2)
    assert "must end in" in asked(folder, options, "a.jsonl", code=2)  # of images
    data = ["--data", folder / "forget.npz", "--out", folder / "x"]
    assert "seed=1 without --projection" in run("index", *options, *data, "--seed", 1, code=2)
    assert "index_dtype" in run("index", *options, *data, "--index-dtype", "float16", code=2)
    assert "projection=0" in run("index", *options, *data, "--projection", 0, code=2)
    other = toy_model()
    other[1].bias.data += 1
    torch.save(other.state_dict(), folder / "weights.pt")
    assert "other weights: '1.bias'" in asked(folder, options, "top.csv", code=2)
    names = folder / "index" / "samples.json"
    names.write_text(json.dumps({"samples": ["a"]}))
    assert "samples.json' is damaged" in asked(folder, options, "top.csv", code=2)


def test_an_index_of_the_library_has_places_for_names(paths, caplog):
    folder, options, data, _ = paths
    imu.build_index(toy_model(), data, folder / "index")
    said = asked(folder, options, "top.csv", "--top", 1)
    assert "samples are named by their places" in said + caplog.text
    assert len((folder / "top.csv").read_text().splitlines()) == 4


def test_of_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    tm.folder(folder, "llama")
    data = tm.pairs(tmp_path / "qa.jsonl")
    layer = "model.layers.0.mlp.down_proj"
    given = ["--model", folder, "--batch-size", 3]
    out = tmp_path / "index"
    text = run("index", *given, "--data", data, "--out", out, "--layers", layer)
    assert f"{len(tm.PAIRS)} samples at {layer}" in text
    asked = tm.lines(tmp_path / "asked.jsonl", [json.loads(data.read_text().splitlines()[2])])
    answer = tmp_path / "top.jsonl"
    more = ["--index", out, "--curvature", "identity", "--top", 2]
    run("query", *given, "--data", asked, *more, "--out", answer)
    (line,) = [json.loads(row) for row in answer.read_text("utf-8").splitlines()]
    top = line.pop("top")
    assert line == json.loads(asked.read_text())
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    train, one = (
        imu.capture(model, imu.load_text(path, words, batch_size=3).loader, layers=layer)
        for path in (data, asked)
    )
    values, places = imu.top_influences(train, one, 2, curvature="identity")
    assert [entry["sample"] for entry in top] == [str(i + 1) for i in places[0].tolist()]
    found = torch.tensor([entry["influence"] for entry in top])
    torch.testing.assert_close(found, values[0], rtol=1e-4, atol=1e-7)
    # A line that has the name already, and an answer that would replace the index.
    again = ["query", *given, "--data", answer, *more]
    assert "has 'top' already" in run(*again, "--out", tmp_path / "b.jsonl", code=2)
