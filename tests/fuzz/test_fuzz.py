"""A few random cases of every public function; ``make fuzz`` runs thousands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from damage import FORMATS
from fuzz import FUNCTIONS, fuzz
from kills import JOBS

CASES = 12
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_few_cases(name: str) -> None:
    found = fuzz(name, CASES)
    assert sum(found.values()) >= 1
    assert set(found) <= {"right", "refused", "told"}


def test_the_page_is_of_these_formats_jobs_and_functions() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+)", page, re.M)
    names = [name.strip("` ") for name, _ in rows]
    assert names == [*FORMATS, *JOBS, *FUNCTIONS]
    total = sum(int(cases) for _, cases in rows[-len(FUNCTIONS) :])
    assert f"The figures below are of {total:,} cases in all" in page.replace("\n", " ")
