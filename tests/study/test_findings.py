"""What the findings say is what the results hold, number by number."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_comparison import make_results

pytest.importorskip("jinja2")
import findings

from imu_fast.evaluation.statistics import summary
from imu_fast.study.cells import rounded
from imu_fast.study.results import at_every_depth, read_results
from imu_fast.study.runs import METRICS

ROOT = Path(__file__).parents[2]


def test_the_findings_are_made_from_the_results():
    assert findings.FINDINGS.read_text() == findings.render(read_results(findings.RESULTS))


def test_the_summary_is_of_the_cells():
    """So every number of a table is a mean of rows that are kept."""
    results = read_results(findings.RESULTS)
    again = rounded(summary(at_every_depth(results["rows"]), METRICS))
    # A cell keeps its entries in the order in which they were measured.
    by_name = [
        {(line["task"], line["method"], line["depth"]): line for line in lines}
        for lines in (again, results["summary"])
    ]
    assert len(by_name[0]) == len(again) and by_name[0] == by_name[1]


def test_no_number_stands_in_the_template_itself():
    text = (ROOT / "bench" / "findings.md.j2").read_text()
    prose = re.sub(r"\{[{%].*?[}%]\}", "", text, flags=re.S)
    found = set(re.findall(r"\b\d+[.,]\d+|\d{2,}\b|\d+ ?%", prose))
    # A budget of the command, what relearning's bound is, the damping, the data set's name.
    assert found <= {"75", "50", "10", "95"}, found


def test_results_are_small():
    folder = findings.RESULTS
    size = sum(
        p.stat().st_size for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts
    )
    assert size < 2_000_000
    assert all(json.loads(p.read_text())["cell"] for p in (folder / "cells").glob("*.json"))


def test_another_comparison_gives_other_findings():
    text = findings.render(make_results() | {"config": {"train": 5000, "max_steps": 180}})
    assert "nan" not in text.lower().replace("finance", "") and "random flips" in text.lower()
    assert "class 3" in text and "undecided" in text
