"""The comparison of methods: settings, runs on a tiny problem, statistics and command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from imu_fast.cli.app import app
from imu_fast.errors import InputError
from imu_fast.study import comparison
from imu_fast.study.cache import Cache, fingerprint
from imu_fast.study.configuration import Configuration
from imu_fast.study.data.tasks import load_dataset, make_task
from imu_fast.study.entries import AUTO, BASELINE, ENTRIES, HEAD_BASELINE, HIGHLIGHT, entries_named
from imu_fast.study.networks import NETWORKS, train
from imu_fast.study.runs import METRICS, Setting

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
    assert way[0][0] == pytest.approx(forget)
    for depth, reached in found.items():
        outputs = reached.seen.outputs
        assert 0 <= reached.steps <= 12
        if depth == "accuracy":
            assert outputs["forget"].accuracy <= forget / 2
    assert entry.describe()["scope"] == entry.scope


def test_measures(setting):
    rows = [setting.measure(seen) for seen in (setting.original, setting.retrained)]
    for row in rows:
        assert set(row) == set(METRICS)
        assert all(0 <= row[k] <= 1 for k in METRICS if k not in ("forget_loss", "kl", "relearn"))
    assert rows[0]["relearn"] == 0, "what is not forgotten needs no step"
    assert rows[1]["kl"] == 0 and rows[1]["agreement"] == 1, "the reference is itself"
    correlations = setting.correlations()
    assert correlations["ggn_block"] > 0.5 and "ggn" not in correlations
    assert all(-1 <= value <= 1 for value in correlations.values())


def test_rates_are_chosen_on_validation_images():
    data = load_dataset("digits", None, 400, 7)
    task = make_task("class", data, 7)
    tuned = Setting(train("vgg", data.train, 10, seed=7, epochs=4), task, None, 7)
    assert "test" not in tuned.sets and "unseen" not in tuned.sets
    entry = ENTRIES[HEAD_BASELINE]
    rate = tuned.choose_rate(entry, 60)
    assert rate in entry.rates
    found, _ = tuned.run(entry, rate, 60)
    assert found["accuracy"].steps <= 20, "a third of the budget"


def test_what_a_comparison_holds(compared):
    _, out, (results, trajectories) = compared
    methods = {BASELINE, HEAD_BASELINE, AUTO, "imu/head/eval", "original", "retrained"}
    assert {row["method"] for row in results["rows"]} == methods == set(results["methods"])
    assert json.loads((out / "results.json").read_text()) == results
    assert results["config"]["seeds"] == [0, 1] and "data_path" not in results["config"]
    for task, runs in trajectories.items():
        assert {len(ways) for ways in runs.values()} == {2}, task
    reached = [row for row in results["rows"] if row.get("reached")]
    assert reached
    for row in reached:
        assert all(row[metric] is not None for metric in METRICS)
    # A class at depth "accuracy" is gone; head-only ascent of it loses less than all's.
    gone = [r for r in reached if r["task"] == "class"]
    assert {row["forget_accuracy"] for row in gone} == {0.0}
    planned = [t for t in results["planned"] if t["n_pairs"] == 2]
    assert {t["method"] for t in planned} == {AUTO}
    assert {c["weights"] for c in results["factorial"]} == {"imu", "uniform"}
    assert {c["curvature"] for c in results["correlations"]} >= {"fisher_diag", "kfac", "-loss"}


def test_a_second_run_takes_everything_from_the_cache(compared, monkeypatch):
    config, out, (results, trajectories) = compared

    def never(*args, **kwargs):
        raise AssertionError("this was there already")

    monkeypatch.setattr(comparison, "Setting", never)
    monkeypatch.setattr("imu_fast.study.cache.train", never)
    again, same = comparison.run(config, out, progress=False)
    assert same == trajectories
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


def _names(config, contents="abc"):
    """What the entries of a model and of a run are called."""
    cache = Cache(Path(), Configuration.of(config), {0: contents})
    return cache._name("vgg", 0, ""), cache._name("vgg", 0, "class", cache.config.max_steps, "m", 1)


def test_another_budget_training_or_data_is_another_entry():
    model, run = _names(TINY)
    longer_model, longer_run = _names(TINY | {"max_steps": 5})
    assert model == longer_model and run != longer_run
    for other in (_names(TINY | {"epochs": 5}), _names(TINY, contents="abd")):
        assert other[0] != model and other[1] != run


def test_the_data_are_known_by_every_image_and_label():
    data = load_dataset("digits", None, 400, 7)
    found = {fingerprint(data), fingerprint(load_dataset("digits", None, 400, 8))}
    for part in (data.train, data.validation, data.test):
        for tensor in part:
            tensor.flatten()[-1] += 1
            found.add(fingerprint(data))
    assert len(found) == 8


@pytest.mark.parametrize("pattern", ["runs/*-0-class-*.json", "*-original-*.safetensors"])
def test_damaged_and_exchanged_entries_are_refused_by_name(compared, tmp_path, pattern):
    config, out, _ = compared
    shutil.copytree(out, tmp_path / "here")
    path, other, *_ = sorted((tmp_path / "here" / "cache").glob(pattern))
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
    assert Configuration.of({"data": "cifar10"}).train == 10_000
    for text, match in (
        ("seeds: many", "seeds='many'"),
        ("seeds: 101", "at most 100"),
        ("color: red", "setting='color' is unknown"),
        ("- a", "no mapping"),
        ("a: [", "cannot be read"),
        ("tasks: [random]", "task='random' is unknown"),
        ("archs: []", "archs is empty"),
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
