"""The comparison of methods: settings, runs on a tiny problem, statistics and command."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import imu_fast as imu
from imu_fast.cli.app import app
from imu_fast.errors import InputError
from imu_fast.study import comparison
from imu_fast.study.cache import Cache, Contents, fingerprint
from imu_fast.study.cells import Cell
from imu_fast.study.configuration import TUNING_SEED, Configuration
from imu_fast.study.data.tasks import check_measurable, load_dataset, make_task
from imu_fast.study.entries import (
    AUTO,
    BASELINE,
    ENTRIES,
    FLIPS,
    HEAD_BASELINE,
    HIGHLIGHT,
    ORIGINAL,
    REFERENCES,
    RETRAINED,
    TWIN,
    entries_named,
)
from imu_fast.study.networks import NETWORKS, train
from imu_fast.study.results import at_every_depth, read_results
from imu_fast.study.runs import METRICS, Setting, Shadow

TINY = {
    "archs": "resnet",
    "seeds": 2,
    "epochs": 3,
    "train": 300,
    "max_steps": 30,
    "workers": 1,
    "methods": [AUTO, "imu/head/eval"],
}


@pytest.fixture(scope="module")
def setting():
    """A small trained network, a retrained one, and a random forget set."""
    data = load_dataset("digits", None, 400, 0)
    task = make_task("random-10", data, 0)
    models = [
        train("vgg", samples, 10, seed=seed, epochs=4, lr=0.1)
        for seed, samples in ((0, data.train), (1, task.retain))
    ]
    return Setting(models[0], task, models[1], seed=0)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    config = Configuration.of(TINY)
    return config, out, comparison.run(config, out, progress=False)


@pytest.mark.parametrize("arch", NETWORKS)
def test_networks_learn_and_are_reproducible(arch):
    data = load_dataset("digits", None, None, 0)
    options = dict(seed=1, epochs=8, lr=0.05)
    first, second = (train(arch, data.train, 10, **options) for _ in range(2))
    x, y = data.train
    assert float((first(x).argmax(1) == y).double().mean()) > 0.8
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    mirrored = train(arch, data.train, 10, mirror=True, **options)
    assert not torch.equal(first.fc.weight, mirrored.fc.weight)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_runs(setting, name):
    entry = ENTRIES[name]
    if "random" not in entry.kinds:
        pytest.skip("for classes")
    found, way = setting.run(entry, entry.rates[len(entry.rates) // 2], max_steps=12)
    forget = setting.original.outputs["forget"].accuracy
    lines = {"unseen": setting.unseen_accuracy, "half": forget / 2}
    assert set(found) <= set(lines) == set(setting.milestones())
    for depth, reached in found.items():
        assert 0 <= reached.steps <= 12
        assert reached.seen.outputs["forget"].accuracy <= lines[depth]
    for passed, retain in way:
        assert passed <= (forget + min(forget, setting.unseen_accuracy)) / 2 and 0 <= retain <= 1
    assert entry.describe()["scope"] == entry.scope


def test_measures(setting):
    rows = [setting.measure(seen) for seen in (setting.original, setting.retrained)]
    unbounded = {"forget_loss", "relearn", *(m for m in METRICS if m.startswith("kl"))}
    for row in rows:
        assert set(row) == set(METRICS) - {"lira"}, "there are no shadow models"
        assert all(0 <= row[k] <= 1 for k in row if k not in unbounded)
    assert rows[0]["relearn"] == 0, "what is not forgotten needs no step"
    for on in ("forget", "retain", "test"):
        assert rows[1][f"kl_{on}"] == 0 and rows[1][f"agreement_{on}"] == 1
    assert rows[1]["gap"] == 0 < rows[0]["gap"]
    names = ("forget_accuracy", "retain_accuracy", "test_accuracy", "membership")
    gaps = [abs(rows[0][name] - rows[1][name]) for name in names]
    assert rows[0]["gap"] == pytest.approx(sum(gaps) / 4)
    correlations = setting.correlations()
    assert correlations["ggn_block"] > 0.5 and "ggn" not in correlations
    assert all(-1 <= value <= 1 for value in correlations.values())


def test_random_flips_have_the_depth_and_nothing_else(setting):
    for depth, rule in setting.milestones().items():
        row = setting.measure(setting.flipped(depth))
        assert row["forget_accuracy"] <= rule.accuracy < row["forget_accuracy"] + 0.06
        assert row["retain_accuracy"] == setting.original.outputs["retain"].accuracy
        assert "relearn" not in row and "probe" not in row, "there is no such model"


def test_the_depth_is_measured_on_images_apart_from_the_report(setting):
    assert (
        setting.unseen_accuracy == imu.evaluate(setting.model, setting.task.validation)["accuracy"]
    )
    mine = {image.numpy().tobytes() for image in setting.task.unseen_validation[0]}
    for name, (x, _) in setting.sets.items():
        assert not mine & {image.numpy().tobytes() for image in x}, name


def test_the_likelihood_ratio_attack_leaves_out_models_that_saw_an_image(setting):
    n = len(setting.task.forget[1])
    models = [train("vgg", setting.task.retain, 10, seed=s, epochs=2) for s in range(3)]
    saw = torch.zeros(n, dtype=torch.bool)
    saw[0] = True
    shadows = [Shadow(m, ~saw if i == 0 else ~torch.zeros_like(saw)) for i, m in enumerate(models)]
    found = Setting(setting.model, setting.task, setting.model, 0, shadows=shadows)
    row = found.measure(found.original)
    assert 0 <= row["lira"] <= 1
    assert found._shadow_confidences.isnan().nonzero().tolist() == [[0, 0]]
    assert found._shadow_confidences.shape == (3, n + len(setting.task.unseen_test[1]))


def test_rates_are_chosen_on_validation_images():
    data = load_dataset("digits", None, 400, 7)
    task = make_task("class-7", data, 7)
    tuned = Setting(train("vgg", data.train, 10, seed=7, epochs=4), task, None, 7)
    assert set(tuned.sets) == {"forget", "validation"}
    entry = ENTRIES[HEAD_BASELINE]
    rate = tuned.choose_rate(entry, 60)
    assert rate in entry.rates
    found, _ = tuned.run(entry, rate, 60, depths=1)
    assert found["zero"].steps <= 20, "a third of the budget"


def test_what_a_comparison_holds(compared):
    _, out, results = compared
    methods = {BASELINE, HEAD_BASELINE, AUTO, "imu/head/eval"}
    assert {row["method"] for row in results["rows"]} == methods | set(REFERENCES)
    assert set(results["methods"]) == methods | set(REFERENCES)
    read = read_results(out)
    read.pop("seconds", None)
    assert read == results
    assert results["config"]["seeds"] == 2 and "data_path" not in results["config"]
    reached = [row for row in results["rows"] if row.get("reached") and row["method"] in methods]
    assert reached
    for row in reached:
        assert all(row[metric] is not None for metric in METRICS if metric != "lira")
    gone = [r for r in reached if r["task"] == "class-3"]
    assert {row["forget_accuracy"] for row in gone} == {0.0}
    assert {test["question"] for test in results["tests"]} == {"weights", "freezing", "recipe"}
    assert all(test["n_clusters"] <= 2 for test in results["tests"]), "seeds, not runs"
    assert {c["curvature"] for c in results["correlations"]} >= {"fisher_diag", "kfac", "-loss"}


def test_references_stand_at_every_depth(compared):
    rows = at_every_depth(compared[2]["rows"])
    for method in (ORIGINAL, RETRAINED, TWIN, FLIPS):
        where = [
            (r["arch"], r["seed"], r["task"], r["depth"]) for r in rows if r["method"] == method
        ]
        assert len(where) == len(set(where)) == 2 * 3, "one architecture, two seeds, three depths"


def test_a_second_run_takes_everything_from_the_files(compared, monkeypatch):
    config, out, results = compared

    def never(*args, **kwargs):
        raise AssertionError("this was there already")

    monkeypatch.setattr(comparison, "Setting", never)
    monkeypatch.setattr("imu_fast.study.cache.train", never)
    assert comparison.run(config, out, progress=False) == results


def test_the_cells_go_on_without_the_models(compared, tmp_path, monkeypatch):
    """What is kept with the code is enough: no model is trained for what was measured."""
    config, out, results = compared
    shutil.copytree(out / "cells", tmp_path / "cells")
    monkeypatch.setattr(comparison, "Setting", None)
    monkeypatch.setattr("imu_fast.study.cache.train", None)
    assert comparison.run(config, tmp_path, progress=False) == results


def test_a_cell_of_other_models_is_refused(compared, tmp_path):
    """Another machine may train other weights from the same seed; one cell is of one model."""
    _, out, _ = compared
    shutil.copytree(out, tmp_path / "here")
    path = next(iter((tmp_path / "here" / "cells").glob("resnet-0-class-3-*")))
    cell = json.loads(path.read_text())
    key = Cell(path, cell["cell"])
    value = key.read()["references"]["value"]
    entries = {n: e for n, e in key.read().items() if n != "references"}
    path.write_text(json.dumps({"cell": cell["cell"], "entries": entries}))
    value["weights"]["retrained"] = "0" * 12
    key.made("references", None, lambda: value)
    longer = Configuration.of(TINY | {"max_steps": 31})
    with pytest.raises(InputError, match=f"{path.name}.*other models than this machine trains"):
        comparison.run(longer, tmp_path / "here", progress=False)


def test_results_older_than_their_cells_are_refused(compared, tmp_path):
    _, out, _ = compared
    shutil.copytree(out, tmp_path / "here")
    path = next(iter((tmp_path / "here" / "cells").glob("resnet-1-class-3-*")))
    cell = Cell(path, json.loads(path.read_text())["cell"])
    value = cell.get("correlations", None)
    entries = {n: e for n, e in cell.read().items() if n != "correlations"}
    path.write_text(json.dumps({"cell": cell.key, "entries": entries}))
    cell.made("correlations", None, lambda: value | {"kfac": 0.5})
    with pytest.raises(InputError, match="older than its cell"):
        read_results(tmp_path / "here")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tasks": "class-12"}, "task='class-12': there are classes 0 to 9"),
        ({"tasks": "random-0.1"}, "forgets none of 300"),
        ({"tasks": "random-0.3"}, "has 1 training images to forget, and needs 2"),
        ({"tasks": "random-99.7"}, "has 1 training images that are kept, and needs 2"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused_before_anything_is_trained(
    given, match, tmp_path, monkeypatch
):
    monkeypatch.setattr("imu_fast.study.cache.train", pytest.fail)
    with pytest.raises(InputError, match=match):
        comparison.run(Configuration.of(TINY | given), tmp_path, progress=False)
    with pytest.raises(InputError, match="minutes=nan"):
        comparison.run(Configuration.of(TINY), tmp_path, minutes=math.nan, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_forget_set_without_held_out_images_is_refused():
    data = load_dataset("digits", None, 300, 0)
    for part in ("validation", "test"):
        x, y = getattr(data, part)
        lacking = replace(data, **{part: (x[y != 3], y[y != 3])})
        check_measurable(make_task("class-4", lacking, 0))
        with pytest.raises(InputError, match="task='class-3' has 0 held-out images like"):
            check_measurable(make_task("class-3", lacking, 0))


def test_what_the_likelihood_ratio_attack_rests_on_is_the_same_in_all_cells():
    """Its numbers are of the other seeds' models: of two seeds no others than of three."""
    data, entry = load_dataset("digits", None, 60, 0), ENTRIES[AUTO]
    forget = make_task("random-10", data, 0)
    depends, used = {}, {}
    for seeds in (2, 3, 5, 7):
        config = Configuration.of(TINY | {"seeds": seeds})
        none = Contents("abc", torch.zeros(0, dtype=torch.int64))
        cache = Cache(Path(), config, dict.fromkeys((*range(seeds), TUNING_SEED), none))
        depends[seeds] = json.dumps(comparison._depends(config, entry, {"lr": 1.0}))
        for seed in range(seeds):
            asked = []
            prepared = comparison._Prepared(cache, "resnet", seed, "random-10")
            with pytest.MonkeyPatch.context() as patched:
                model = lambda self, data, arch, seed, asked=asked: asked.append(seed)  # noqa: E731
                patched.setattr(Cache, "model", model)
                list(prepared._shadows(data, forget))
            assert seed not in asked
            used[seeds, seed] = asked
    assert len(set(depends.values())) == 3 and depends[5] == depends[7]
    assert {len(asked) for (seeds, _), asked in used.items() if seeds >= 5} == {5}
    assert all(used[5, seed] == used[7, seed] for seed in range(5))
    assert used[2, 0] == [1, TUNING_SEED]


def test_a_sitting_that_is_over_begins_nothing(compared, tmp_path, monkeypatch):
    config, out, results = compared
    with pytest.raises(InputError, match="more minutes"):
        comparison.run(config, tmp_path, minutes=0, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))
    # Cut off in the middle: what is there is reported, and another call goes on.
    calls = []
    made = Cell.made

    def until_the_third(self, name, depends, make):
        calls.append(name)
        if len(calls) > 8:
            monkeypatch.setattr(comparison.Sitting, "over", True)
        return made(self, name, depends, make)

    shutil.copytree(out / "cache", tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(Cell, "made", until_the_third)
        part = comparison.run(config, tmp_path, progress=False)
        monkeypatch.undo()
    assert 0 < len(part["rows"]) < len(results["rows"])
    assert drop_times(comparison.run(config, tmp_path, progress=False)) == drop_times(results)


def drop_times(results):
    """Without what a clock said."""
    text = json.dumps(results)
    return re.sub(r'"seconds(_mean|_std|_n)?": [^,}]+', "", text)


def _names(config, contents="abc"):
    """What a model and what a cell are called."""
    none = Contents(contents, torch.tensor([]))
    cache = Cache(Path(), Configuration.of(config), {0: none})
    return cache._name("vgg", 0, ""), cache.cell("vgg", 0, "class-3").path


def test_another_training_or_data_is_another_model_and_cell():
    model, cell = _names(TINY)
    assert (model, cell) == _names(TINY | {"max_steps": 5}), "of entries, not of models"
    for other in (_names(TINY | {"epochs": 5}), _names(TINY, contents="abd")):
        assert other[0] != model and other[1] != cell


def test_what_an_entry_depends_on(tmp_path):
    cell = Cell(tmp_path / "cell.json", "abc")
    assert cell.made("m", [1, 60], lambda: {"x": 1 / 3, "none": math.nan}) == {
        "x": 0.3333,
        "none": None,
    }
    assert cell.made("m", [1, 60], None) == cell.get("m", [1, 60])
    assert cell.get("m", [1, 61]) is None and cell.get("n", [1, 60]) is None
    assert cell.made("m", [1, 61], lambda: {"x": 2}) == {"x": 2}
    assert cell.made("n", None, lambda: []) == []
    assert len((tmp_path / "cell.json").read_text().splitlines()) == 4, "a line an entry"
    with pytest.raises(InputError, match="of another model or run"):
        Cell(tmp_path / "cell.json", "abd").get("m", None)


def test_the_data_are_known_by_every_image_and_label():
    data = load_dataset("digits", None, 400, 7)
    found = {fingerprint(data), fingerprint(load_dataset("digits", None, 400, 8))}
    for part in (data.train, data.validation, data.test):
        for tensor in part:
            tensor.flatten()[-1] += 1
            found.add(fingerprint(data))
    assert len(found) == 8


@pytest.mark.parametrize("pattern", ["cells/*-class-*.json", "cache/*-original-*.safetensors"])
def test_damaged_and_exchanged_entries_are_refused_by_name(compared, tmp_path, pattern):
    config, out, _ = compared
    shutil.copytree(out, tmp_path / "here")
    path, other, *_ = sorted((tmp_path / "here").glob(pattern))
    if path.parent.name == "cache":  # of whole cells no model is read
        next((tmp_path / "here/cells").glob("*-class-*.json")).unlink()
    whole = path.read_bytes()
    for broken in (other.read_bytes(), whole[: len(whole) // 2], b"", _with_a_digit_off(whole)):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=re.escape(path.name)):
            comparison.run(config, tmp_path / "here", progress=False)
    path.unlink()  # as the message says
    comparison.run(config, tmp_path / "here", progress=False)


def _with_a_digit_off(data):
    """One digit near the end changed: still JSON, or another number in a tensor."""
    at = max(i for i in range(len(data) - 8) if chr(data[i]).isdigit())
    return data[:at] + bytes([48 + (data[at] - 47) % 10]) + data[at + 1 :]


def test_configuration_from_yaml_and_flags(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text("data: digits\nseeds: 3\narchs: [vgg]\nmethods: [margin edit]\n")
    config = Configuration.read(path, {"seeds": 4})
    assert (config.seeds, config.archs, config.methods) == (4, ("vgg",), ("margin edit",))
    assert Configuration.of({"data": "cifar10"}).train == 5_000
    listed = Configuration.of({"methods": "imu, ggn; auto", "tasks": "class-3, random-5"})
    assert (listed.methods, listed.tasks) == (("imu, ggn", "auto"), ("class-3", "random-5"))
    for text, match in (
        ("seeds: many", "seeds='many'"),
        ("seeds: 101", "at most 100"),
        ("color: red", "setting='color' is unknown"),
        ("- a", "no mapping"),
        ("a: [", "cannot be read"),
        ("tasks: [random]", "task='random' is unknown"),
        ("archs: []", "archs is empty"),
        ("tasks: class-3, class-3", "tasks has 'class-3' twice"),
        ("tasks: [random-5, random-5.0]", "tasks has 'random-5.0' twice"),
        ("archs: [vgg, vgg]", "archs has 'vgg' twice"),
        ("methods: auto; auto", "methods has 'auto' twice"),
        ("archs: [lstm]", "archs='lstm' is unknown"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=match):
            Configuration.read(path, {})
    with pytest.raises(InputError, match="methods='magic' is unknown"):
        entries_named(("magic",))
    assert set(HIGHLIGHT) <= set(ENTRIES)


def test_command(compared, tmp_path):
    """On the cache of the run above: table, report and plots."""
    _, out, _ = compared
    flags = ["--archs", "resnet", "--seeds", "2", "--epochs", "3", "--train", "300"]
    flags += ["--max-steps", "30", "--workers", "1", "--methods", f"{AUTO}; imu/head/eval"]
    done = CliRunner().invoke(app, ["compare", "--out", str(out), *flags])
    assert done.exit_code == 0, done.output
    assert "report.html" in done.output and (out / "report.html").is_file()
    failed = CliRunner().invoke(app, ["compare", "--out", str(tmp_path), "--data", "cifar10"])
    assert failed.exit_code == 2 and "data_path" in failed.output
    assert not list(tmp_path.iterdir())
