"""The page's tables beside bergson and dattri-llm are the rows that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/benchmarks.md").read_text()
LAYERS = {
    "four": "4 (q, k, v, o of one block)",
    "inner": "28 (all of the blocks)",
    "all": "29 (and the head)",
}


def rows(*names: str) -> list[dict]:
    files = [ROOT / f"bench/results/language_peers{name}.json" for name in names]
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def cell(row: dict) -> str:
    if "failed" in row:
        return "out of memory"
    ours = f"{row['milliseconds']:,.0f} ms" if row["tool"] == "imu_fast" else ""
    return f"{ours or format(row['of_ours'], '.2f') + 'x'}, {row['megabytes']:,.0f} MB"


@pytest.mark.parametrize(
    ("quantity", "files"), [("products", ("_products", "_512")), ("gradients", ("", "_512"))]
)
def test_the_tables_are_what_was_measured(quantity, files):
    found: dict = {}
    for row in rows(*files):
        if row["quantity"] == quantity:
            found.setdefault((row["width"], row["layers"]), {})[row["tool"]] = cell(row)
    assert len(found) == 9
    for (width, layers), tools in found.items():
        cells = [
            str(width),
            LAYERS[layers],
            *(tools[t] for t in ("imu_fast", "bergson", "dattri_llm")),
        ]
        assert f"| {' | '.join(cells)} |" in PAGE
