"""The comparison's table, plots and page, from a small made-up comparison."""

from __future__ import annotations

import copy
import io
import json
import math
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from imu_fast.errors import InputError
from imu_fast.study.report.blocks import METRICS, blocks

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from imu_fast.study.report.plots import band, highlighted, on_grid
from imu_fast.study.report.report import comparison_table, write_report

BASELINE = "ascent <official> & all"
NEVER = "label noise"
SOMETIMES = "boundary shrink"
METHODS = {
    BASELINE: ("all", "train", "uniform", True),
    "ascent, head only": ("head", "eval", "uniform", True),
    "IMU (head)": ("head", "eval", "influence", True),
    SOMETIMES: ("all", "eval", "-", True),
    "fine-tuning on the rest": ("all", "train", "-", False),
    NEVER: ("all", "eval", "-", True),
}


def make_results(methods=METHODS, seeds=(0, 1, 2), archs=("resnet", "vgg"), n_tasks=2):
    """A comparison with numbers drawn at random, and with every gap that a real one has."""
    rng = np.random.default_rng(0)
    names = ("class", "random-1", "random-5", "random-10")[:n_tasks]
    titles = ("class 3", "1 % random", "5 % random", "10 % random")
    depths = {
        "accuracy": "forget accuracy is that of the retrained model.",
        "auc": "membership AUC is 0.5.",
        "none": "not changed.",
    }
    tasks = {
        name: {"title": title, "kind": "class" if name == "class" else "random", "n": 100 + i}
        for i, (name, title) in enumerate(zip(names, titles, strict=False))
    }
    every = [m.name for m in METRICS]
    rows, summary, tests = [], [], []
    for task in tasks:
        cells = [("none", name) for name in ("original", "retrained")]
        cells += [(depth, name) for depth in ("accuracy", "auc") for name in methods]
        for order, (depth, method) in enumerate(cells):
            mean = 0.95 - 0.03 * (order % max(len(methods), 3))
            runs = []
            for arch in archs:
                for seed in seeds:
                    reached = depth != "none" and method != NEVER
                    if method == SOMETIMES and seed == seeds[0] and arch == archs[0]:
                        reached = False
                    values = {m: float(np.clip(mean + rng.normal(0, 0.01), 0, 1)) for m in every}
                    values["relearn"] = float(rng.integers(1, 60))
                    if method == NEVER:
                        values = dict.fromkeys(every)
                    if method in ("original", "retrained"):
                        values["relearn"] = None
                    ascends = depth != "none"
                    runs.append(
                        {"arch": arch, "seed": seed, "task": task, "depth": depth}
                        | {"method": method, "reached": reached, "seconds": 1.5}
                        | {"lr": 0.01 * (1 + (arch == "vgg")) if ascends else None}
                        | {"steps": int(rng.integers(20, 90)) if ascends else None}
                        | values
                    )
            rows += runs
            entry = {"task": task, "depth": depth, "method": method, "n": len(runs)}
            for m in every:
                known = [r[m] for r in runs if r[m] is not None]
                entry[f"{m}_mean"] = float(np.mean(known)) if known else None
                entry[f"{m}_std"] = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
            summary.append(entry)
            if depth != "none" and method != BASELINE:
                tests.append(
                    {"metric": "retain_accuracy", "baseline": BASELINE, "task": task}
                    | {"depth": depth, "method": method, "n_pairs": len(runs), "mean": mean}
                    | {"baseline_mean": 0.8, "difference": mean - 0.8, "ratio": mean / 0.8}
                    | {"t_p": 1e-5, "wilcoxon_p": 0.02, "t_p_holm": 1e-4, "wilcoxon_p_holm": 0.2}
                )
    return {
        "config": {"data": "cifar10", "archs": list(archs), "seeds": list(seeds)}
        | {"rule": "the largest learning rate that takes 20 steps.", "baseline": BASELINE},
        "versions": {"imu_fast": "0.1", "torch": "2.14", "python": "3.11", "threads": 2},
        "seconds": 12.3,
        "methods": {
            name: {"summary": f"what {name} does", "scope": scope, "batchnorm": batchnorm}
            | {"weights": weights, "forget_only": forget_only}
            for name, (scope, batchnorm, weights, forget_only) in methods.items()
        },
        "tasks": tasks,
        "depths": depths,
        "rows": rows,
        "summary": summary,
        "tests": tests,
        "factorial": [
            {"task": task, "depth": depth, "trained": trained, "batchnorm": batchnorm}
            | {"weights": weights, "retain_mean": float(rng.uniform(0.6, 0.95))}
            | {"retain_std": 0.01, "n": 6}
            for task in tasks
            for depth in ("accuracy", "auc")
            for trained in ("all", "head")
            for batchnorm in ("train", "eval")
            for weights in ("influence", "permuted", "loss", "uniform")
            if (trained, weights) != ("head", "loss")
        ],
        "correlations": [
            {"task": task, "arch": arch, "curvature": curvature}
            | {"spearman_mean": float(rng.uniform(-0.2, 1)), "spearman_std": 0.02}
            for task in tasks
            for arch in archs
            for curvature in ("identity", "fisher_diag", "fisher", "kfac", "ggn_block")
        ],
    }


def make_trajectories(results):
    rng = np.random.default_rng(1)
    count = len(results["config"]["archs"]) * len(results["config"]["seeds"])

    def run(slope):
        forget = np.clip(np.linspace(1, rng.uniform(0, 0.2), 30) + rng.normal(0, 0.02, 30), 0, 1)
        retain = 0.95 - slope * (1 - forget) ** 2 + rng.normal(0, 0.004, 30)
        return [(float(f), float(r)) for f, r in zip(forget, retain, strict=True)]

    return {
        task: {
            method: [run(0.05 * (1 + i % 7)) for _ in range(count)]
            for i, method in enumerate(results["methods"])
        }
        for task in results["tasks"]
    }


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on a tag that is closed in the wrong order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def printed(results, width=118):
    from rich.console import Console

    stream = io.StringIO()
    Console(width=width, file=stream).print(comparison_table(results))
    return stream.getvalue()


def test_report_is_one_page_with_everything(tmp_path):
    results = make_results()
    files = write_report(results, make_trajectories(results), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    pictures = [name for name in files if name.endswith(".png")]
    assert len(pictures) == 2 * (1 + 2 + 1) + 1  # trade-off, two depths, factorial; correlations
    for name in pictures:
        data = (tmp_path / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", data[16:24])) > 200
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text
    page = Page(text)
    titles = [about["title"] for about in results["tasks"].values()]
    for part in (*results["methods"], "original", "retrained", *titles, "takes 20 steps."):
        assert part in page.text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(pictures) and all(a["alt"] for a in images)
    assert all(a["src"].startswith("data:image/png;base64,") for a in images)
    assert all(
        a["href"].startswith("#") and f'id="{a["href"][1:]}"' in text
        for tag, a in page.tags
        if tag == "a"
    )
    assert "nan" not in page.text.lower()
    markdown = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert all(name in markdown for name in results["methods"]) and "nan" not in markdown


def test_results_read_from_json_give_the_same_page(tmp_path):
    results = make_results(n_tasks=1)
    trajectories = make_trajectories(results)
    write_report(results, trajectories, tmp_path / "a")
    read = json.loads(json.dumps(results))
    write_report(read, json.loads(json.dumps(trajectories)), tmp_path / "b")
    for name in ("report.html", "table.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_blocks_are_sorted_and_mark_the_best():
    results = make_results()
    arranged = blocks(results)
    assert [(b.task, b.depth) for b in arranged] == [
        (task, depth) for task in ("class", "random-1") for depth in ("accuracy", "auc")
    ]
    for block in arranged:
        assert [line.method for line in block.references] == ["original", "retrained"]
        assert {line.method for line in block.methods} == set(METHODS)
        assert block.methods[-1].method == NEVER and block.methods[-1].reached == 0
        means = [line.retain.mean for line in block.methods[:-1]]
        assert means == sorted(means, reverse=True)
        candidates = [line for line in block.methods if line.forget_only and line.reached == 6]
        assert block.best is candidates[0]
        assert sum(line.best for line in block.lines) == 1
        by_name = {line.method: line for line in block.lines}
        assert by_name[SOMETIMES].name == f"{SOMETIMES} (5/6)"
        assert by_name["IMU (head)"].marks["retain_accuracy"] == "*"
        assert by_name["IMU (head)"].marks["auc"] == by_name[BASELINE].marks["auc"] == ""
        assert by_name[NEVER].marks == {}
        assert by_name["IMU (head)"].lr == "0.01-0.02"


def test_marks_need_a_corrected_p_below_one_percent():
    results = make_results()
    for test in results["tests"]:
        test["wilcoxon_p_holm"] = 0.001
        test["t_p_holm"] = {"IMU (head)": 0.0099, SOMETIMES: 0.01}.get(test["method"])
    line = {line.method: line for line in blocks(results)[0].lines}
    assert line["IMU (head)"].marks["retain_accuracy"] == "**"
    assert line[SOMETIMES].marks["retain_accuracy"] == ""
    assert line["ascent, head only"].marks["retain_accuracy"] == ""


def test_one_seed_without_extras(tmp_path):
    """One run per method has no deviation; tests, factorial and trajectories may be missing."""
    results = make_results(seeds=(0,), archs=("resnet",), n_tasks=1)
    del results["tests"], results["factorial"], results["correlations"], results["config"]["rule"]
    del results["config"]["baseline"]
    files = write_report(results, {}, tmp_path)
    assert files == ["retain-class-accuracy.png", "retain-class-auc.png", "table.md", "report.html"]
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "±" in text and " ± 0" not in text  # explained, but nowhere used
    assert "nan" not in text.lower() + printed(results).lower()


def test_nobody_reached_the_depth(tmp_path):
    results = make_results(methods={NEVER: METHODS[NEVER]}, n_tasks=1)
    files = write_report(results, make_trajectories(results), tmp_path)
    assert "report.html" in files
    assert all(block.best is None for block in blocks(results))


def test_table_fits_118_columns():
    results = make_results()
    text = printed(results)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 118
    assert sum(line.startswith("> ") for line in lines) == 4
    for name in METHODS:
        assert name.split(" (")[0] in text
    assert "…" not in text and "nan" not in text


def test_grid_takes_the_first_arrival():
    run = [(1.0, 0.9), (0.5, 0.8), (0.7, 0.1), (0.25, 0.7), (0.25, 0.2)]
    grid = np.array([0.0, 0.25, 0.375, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(on_grid(run, grid), [np.nan, 0.7, 0.75, 0.8, 0.85, 0.9])
    assert np.isnan(on_grid([], grid)).all()
    assert np.isnan(on_grid([(None, 0.5)], grid)).all()
    np.testing.assert_array_equal(on_grid([(0.5, 0.3)], grid)[3], 0.3)


def test_band_needs_half_of_the_runs():
    runs = [[(1.0, 0.9), (0.0, 0.5)], [(1.0, 0.7), (0.5, 0.6)], [(1.0, 0.8), (0.5, 0.7)]]
    low, middle, high = band(runs, np.array([0.25, 0.5, 1.0]))
    assert np.isnan([low[0], middle[0], high[0]]).all()  # one of three came so far
    np.testing.assert_allclose(middle[1:], [0.7, 0.8])
    assert (low[1:] <= middle[1:]).all() and (middle[1:] <= high[1:]).all()


def test_a_depth_that_is_not_explained_is_refused():
    results = make_results(n_tasks=1)
    del results["depths"]["auc"]
    with pytest.raises(InputError, match="depth='auc'; say in depths"):
        blocks(results)


def test_highlighted_methods():
    results = make_results()
    runs = make_trajectories(results)["class"] | {"seventh": [[(1.0, 1.0)]], "none": []}
    assert highlighted(results, runs) == list(METHODS)
    results["config"]["highlight"] = ["seventh", "none", "unknown"]
    assert highlighted(results, runs) == ["seventh"]


@pytest.mark.parametrize("change", [{"rows": []}, {"summary": None}])
def test_incomplete_results_are_refused(change, tmp_path):
    results = copy.copy(make_results(n_tasks=1))
    for key, value in change.items():
        if value is None:
            del results[key]
        else:
            results[key] = value
    for use in (comparison_table, lambda r: write_report(r, {}, tmp_path / "out")):
        with pytest.raises(InputError, match=next(iter(change))):
            use(results)
    assert not (tmp_path / "out").exists()
