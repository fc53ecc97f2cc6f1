"""README, the site and the files around the code: what they say is there, and so."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

import imu_fast as imu

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings this
    import tomli as tomllib

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def rows_of(page: str) -> list[list[str]]:
    """Cells of all tables of a page."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shown(row: dict) -> list[str]:
    """A row of the demo's results as the full table writes it."""
    numbers = [f"{row[k]:.3f}" for k in ("forget", "retain", "test", "member")]
    optional = [
        "" if row[k] is None else format(row[k], form)
        for k, form in (("lr", "g"), ("steps", "d"), ("seconds", ".2f"))
    ]
    return [
        row["task"],
        row["method"],
        *numbers,
        f"{100 * row['gap']:.1f}",
        f"{row['kl']:.2f}",
        *optional,
    ]


def test_tables_of_the_demo_are_its_results():
    """The page has every row as it is in results.json, README some of one task."""
    results = json.loads((ROOT / "bench/results/demo/results.json").read_text())
    rows = [shown(row) for row in results["rows"]]
    page = rows_of((ROOT / "docs/demo.md").read_text())
    assert [row for row in page if len(row) == len(rows[0])][2:] == rows
    heads = {name: i for i, name in enumerate(page[0])}
    table = rows_of(README)
    task = table[0][0]
    by_method = {row[1]: row for row in rows if row[0] == task}
    assert len(table) > 5
    for method, *cells in table[2:]:
        assert cells == [by_method[method][heads[name]] for name in table[0][1:]]


def test_readme_is_short():
    assert len(README.split()) < 700


def test_links_of_readme_lead_to_what_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if ":" not in link]
    assert len(links) > 10 and [link for link in links if link.endswith(".png")]
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link


def test_a_package_index_gets_whole_addresses():
    home = PROJECT["urls"]["Repository"]
    raw = home.replace("github.com", "raw.githubusercontent.com")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--long-description"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"IMU_FAST_BUILD_EXT": "0", "IMU_FAST_BUILD_CUDA": "0"},
    )
    assert done.returncode == 0, done.stderr
    links = re.findall(r"\]\(([^)]+)\)", done.stdout)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", README))
    for link in links:
        assert link.startswith("https://"), link
        if home.rpartition("/")[2] in link:
            base = f"{raw}/main/" if link.endswith(".png") else f"{home}/blob/main/"
            assert link.startswith(base) and (ROOT / link.removeprefix(base)).exists(), link
    for file in ("mkdocs.yml", "CITATION.cff"):
        assert home in (ROOT / file).read_text()


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [
        page for item in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(item)
    ]


def test_every_page_is_in_the_navigation():
    docs = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    named = pages_of(SITE["nav"])
    assert len(named) == len(set(named))
    assert set(named) - {"changelog.md", "findings.md"} == docs


def test_every_public_name_is_in_the_api_once():
    found = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        found += re.findall(r"^::: imu_fast\.(\w+)$", page.read_text(), re.MULTILINE)
    assert sorted(found) == sorted(set(imu.__all__) - {"__version__"})


def test_the_site_builds_without_a_warning(tmp_path):
    """Where mkdocs and its themes are installed; ``make docs`` does it anywhere."""
    if not all(map(util.find_spec, ("mkdocs", "material", "mkdocstrings"))):
        pytest.skip("mkdocs-material or mkdocstrings is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "findings" / "index.html").exists()


def test_an_install_leaves_torch_as_it_is():
    """Dependencies are floors: none pins, excludes or caps a version that a user may have."""
    asked = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        asked += extra
    for requirement in asked:
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?(>=[\d.]+)?", requirement), requirement
    assert [line for line in asked if re.match(r"torch\b", line)] == ["torch>=2.6"]


def test_versions_agree():
    assert PROJECT["version"] == imu.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == imu.__version__
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"'{line}'" in makefile for line in PROJECT["optional-dependencies"]["docs"])


def test_examples_are_short_and_named():
    for path in (ROOT / "examples").glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text and f"examples/{path.name}" in text, path.name


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_files_for_github_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)
