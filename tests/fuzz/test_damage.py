"""200 damaged files of each format: an error that names the file, or what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
from damage import FORMATS, outcomes

CASES = 200


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    found, form = outcomes(name, CASES, tmp_path), FORMATS[name]
    assert sum(found.values()) == CASES
    if form.sealed and not form.plain:
        assert found == {"refused": CASES}
