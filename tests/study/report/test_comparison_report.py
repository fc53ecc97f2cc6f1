"""The comparison's table, plots and page, from a small made-up comparison."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from html.parser import HTMLParser

import pytest
from made_comparison import METHODS, NEVER, SOMETIMES, make_results

from imu_fast.errors import InputError
from imu_fast.study import results as results_of
from imu_fast.study.entries import AUTO, BASELINE, ORIGINAL, REFERENCES
from imu_fast.study.report import blocks as arrange
from imu_fast.study.report.blocks import METRICS, blocks, drawn, factorial, points, verdict
from imu_fast.study.runs import METRICS as MEASURED

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from imu_fast.study.report import plots
from imu_fast.study.report.report import comparison_table, write_report

HOSTILE = "<official> & \\| [bold] ![y](u:v) `z` **w** $\\frac{$ {{1}}"


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


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return out, write_report(results, out)


def test_report_is_one_page_with_everything(results, written):
    out, files = written
    assert sorted(p.name for p in out.iterdir()) == sorted(files)
    pictures = [name for name in files if name.endswith(".png")]
    # Of each task a trade-off and a factorial, of each of three depths a ranking; correlations.
    assert len(pictures) == 2 * 2 + 3 + 1
    for name in pictures:
        data = (out / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", data[16:24])) > 200
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text
    page = Page(text)
    titles = [about["title"] for about in results["tasks"].values()]
    for part in (*results["methods"], *titles, "on a model of its own", "(95 %: "):
        assert part in page.text
    assert f"{len(METHODS)} methods" in page.text, "the original and retrained are no methods"
    assert "prefers-color-scheme: dark" in text and not any(t == "table" for t, _ in page.tags)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(pictures) and all(a["alt"] for a in images)
    assert all(a["src"].startswith("data:image/png;base64,") for a in images)
    assert all(
        a["href"].startswith("#") and f'id="{a["href"][1:]}"' in text
        for tag, a in page.tags
        if tag == "a"
    )
    assert "nan" not in page.text.lower()
    markdown = (out / "table.md").read_text(encoding="utf-8")
    assert all(name in markdown for name in results["methods"]) and "nan" not in markdown


def test_results_read_from_json_give_the_same_page(results, written, tmp_path):
    write_report(json.loads(json.dumps(results)), tmp_path)
    for name in ("report.html", "table.md"):
        assert (written[0] / name).read_bytes() == (tmp_path / name).read_bytes()


def test_hostile_names_are_text(tmp_path):
    results = json.loads(json.dumps(make_results()).replace(json.dumps(NEVER), json.dumps(HOSTILE)))
    write_report(results, tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<official>" not in text and HOSTILE in Page(text).text
    rows = [li for li in (tmp_path / "table.md").read_text().splitlines() if "official" in li]
    for line in rows:
        plain = re.sub(r"\\.", "", line)  # what is escaped is text
        assert plain.count("|") == len(METRICS) + 6 and not re.search(r"[<&`]|\*\*w|\]\(", plain)
    assert rows and "<official>" in printed(results) and "[bold]" in printed(results)


def test_blocks_are_sorted_and_mark_the_best(results):
    arranged = blocks(results)
    wanted = [("class-3", "zero"), ("random-5", "unseen"), ("random-5", "half")]
    assert [(b.task, b.depth) for b in arranged] == wanted
    for block in arranged:
        assert {line.method for line in block.references} == set(REFERENCES)
        assert {line.method for line in block.methods} == set(METHODS)
        assert block.methods[-1].method == NEVER and block.methods[-1].reached == 0
        metric = "retain_accuracy" if block.depth == "half" else "gap"
        assert block.ranked_by.name == metric
        means = [line.values[metric].mean for line in block.methods[:-1]]
        assert means == sorted(means, reverse=metric != "gap")
        candidates = [line for line in block.methods if line.forget_only and line.reached == 6]
        assert block.best is candidates[0]
        assert sum(line.best for line in block.lines) == 1
        assert block.line(SOMETIMES).name == f"{SOMETIMES} (5/6)"
        assert block.line("imu/head/eval").lr == "0.01-0.02"


def test_figures_and_tables_have_one_source(results):
    """Every point of a trade-off is the table's own mean, or the one on the way."""
    arranged = blocks(results)
    for task in results["tasks"]:
        names = drawn(results, arranged, task)
        best = {b.best.method for b in arranged if b.task == task}
        assert {AUTO, *best} <= set(names) and not set(names) & set(REFERENCES)
        depths = [b for b in arranged if b.task == task]
        for name in names:
            runs = points(results, task, name)
            found = plots.stages(runs)
            assert len(found) == 2 + len(depths)
            lines = [depths[0].line(ORIGINAL), None, *(b.line(name) for b in depths)]
            for (forget, retain, low, high), line in zip(found, lines, strict=True):
                assert -1e-9 < low - 1e-9 <= retain <= high + 1e-9 < 1 + 2e-9
                if line is None:
                    assert (forget, retain) == pytest.approx((0.6, 0.8))
                else:
                    assert forget == pytest.approx(line.values["forget_accuracy"].mean, rel=1e-3)
                    assert retain == pytest.approx(line.retain.mean, rel=1e-3)


def test_a_depth_that_some_runs_missed_is_not_drawn(results):
    runs = points(results, "random-5", SOMETIMES)
    assert len(runs) == 6 and all(len(run) == 1 for run in runs), "the start alone"


def test_the_factorial_is_of_the_methods_in_the_table(results):
    block = blocks(results)[0]
    cells = {(c.weights, c.trained, c.batchnorm): c.line for c in factorial(block)}
    assert set(cells) == {tuple(m.split("/")) for m in METHODS if m.count("/") == 2}
    assert all(line is block.line("/".join(name)) for name, line in cells.items())


def test_what_a_test_says_in_words():
    test = {"metric": "gap", "difference": -0.031, "low": -0.05, "high": -0.012, "t_p_holm": 0.011}
    test |= {"equivalent": False, "margin": 0.01}
    assert verdict(test) == "-3.10 points (95 %: -5.00 to -1.20): significant, p = 0.011"
    assert "not shown to be equal" in verdict(test | {"t_p_holm": 0.2})
    assert verdict(test | {"t_p_holm": 0.2, "equivalent": True}).endswith("equal within 1 point")
    assert "nats" in verdict(test | {"metric": "kl_forget"})
    assert "too few seeds" in verdict(test | {"low": None, "high": None, "t_p_holm": None})
    assert verdict(test | {"difference": None, "low": None, "high": None}) == "no run in common"


def test_a_method_that_ran_on_few_models_says_so_and_is_not_the_best(tmp_path):
    """Its mean is not over the models that the others', and the floors', are over."""
    results = make_results(late=(BASELINE,))
    block = blocks(results)[0]
    line = block.line(BASELINE)
    assert line is block.methods[0], "by its numbers it comes first"
    assert line.name == f"{BASELINE} [1 of 6]" and line.partial and not line.best
    assert block.best.runs == 6 and block.best.gap.mean > line.gap.mean
    write_report(results, tmp_path)
    for file in ("table.md", "report.html"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert f"{BASELINE} [1 of 6]" in text and "[k of m]" in text
    tests = results["tests"]
    assert any(t["question"] == "freezing" for t in tests)
    assert all(t["n_pairs"] for t in tests), "what has no run in common is no test"
    other = blocks(make_results())
    assert not any(line.partial for b in other for line in b.lines)


def test_one_run_without_extras(tmp_path):
    """One run per method has no deviation, and one seed allows no test."""
    results = make_results(seeds=1, archs=("resnet",), tasks=("class-3",))
    results["correlations"] = []
    write_report(results, tmp_path)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert " ± 0" not in text and "too few seeds to say more" in text
    assert "nan" not in text.lower() + printed(results).lower()


def test_nobody_reached_the_depth(tmp_path):
    results = make_results(methods=(NEVER,))
    results["rows"] = [r for r in results["rows"] if r["method"] in (NEVER, *REFERENCES)]
    results["summary"] = [r for r in results["summary"] if r["method"] in (NEVER, *REFERENCES)]
    assert "report.html" in write_report(results, tmp_path)
    assert all(block.best is None for block in blocks(results))


def test_an_unfinished_comparison_says_so(results, tmp_path):
    part = {**results, "planned": {"models": 6, "cells": 40}}
    write_report(part, tmp_path)
    for name in ("report.html", "table.md"):
        assert "12 of 40 models and tasks" in (tmp_path / name).read_text()


def test_table_fits_118_columns(results):
    text = printed(results)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 118
    assert sum(line.startswith("> ") for line in lines) == 3
    for name in METHODS:
        assert name.split(" (")[0] in text
    assert "…" not in text and "nan" not in text


def test_columns_are_what_is_measured():
    assert [m.name for m in METRICS] == list(MEASURED)
    assert math.isnan(arrange.number(None))


def test_a_depth_that_is_not_explained_is_refused():
    results = make_results(seeds=1)
    del results["depths"]["half"]
    with pytest.raises(InputError, match="depth='half'; say in depths"):
        blocks(results)


@pytest.mark.parametrize("change", [{"rows": []}, {"summary": None}])
def test_incomplete_results_are_refused(results, change, tmp_path):
    broken = {k: v for k, v in {**results, **change}.items() if v is not None}
    for use in (comparison_table, lambda r: write_report(r, tmp_path / "out")):
        with pytest.raises(InputError, match=next(iter(change))):
            use(broken)
    assert not (tmp_path / "out").exists()


def test_scores_that_are_in_no_order_have_no_correlation(tmp_path):
    """A forget set of samples that score alike: a correlation of NaN, and None in its cell."""
    kept = {"identity": None, "kfac": 0.5}
    cells = [
        ({"arch": "vgg", "seed": seed, "task": "class-3"}, {"correlations": values})
        for seed, values in enumerate((kept, kept | {"identity": None, "kfac": 0.7}))
    ]
    found = results_of._correlations([w | e for w, e in cells])
    means = {line["curvature"]: line["spearman_mean"] for line in found}
    assert math.isnan(means["identity"]) and means["kfac"] == pytest.approx(0.6)
    results = make_results()
    results["correlations"][0]["spearman_mean"] = None
    assert "correlations.png" in write_report(results, tmp_path)
