"""The rooms: who may import whom, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the top of the house to its foundations; a file imports its own floor or lower ones.
FLOORS = [
    ["cli", "study", "integrations"],
    ["unlearning", "evaluation"],
    ["influence"],
    ["curvature", "model"],
    ["factors", "data"],
    ["losses", "solvers"],
    ["ops"],
    ["kernels", "_C", "_C_cuda"],
    ["backend", "storage", "options", "distributed"],
    ["errors"],
]
FLOOR = {room: depth for depth, rooms in enumerate(FLOORS) for room in rooms}
# reference is the oracle: only use_backend("reference") inside ops/ may reach it, lazily.
# backend asks whether the extensions load.
ALLOWED = {
    ("ops", "reference"),
    ("backend", "_C"),
    ("backend", "_C_cuda"),
}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "imu_fast":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("imu_fast."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("imu_fast."))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "imu_fast").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_go_down(path):
    parts = path.relative_to(ROOT / "imu_fast").with_suffix("").parts
    room = parts[0]
    if room in ("__init__", "reference"):
        return
    assert room in FLOOR, f"{room}: say on which floor it is"
    for wanted in imports(path):
        if wanted not in FLOOR and wanted != "reference":
            continue  # a name of imu_fast/__init__.py, such as __version__
        if (room, wanted) in ALLOWED:
            continue
        assert wanted != "reference", f"{path} imports the oracle"
        assert FLOOR[wanted] >= FLOOR[room], f"{path} imports {wanted}, which is above {room}"


def test_kernels_import_nothing_of_ours():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "imu_fast" not in set(imports(path))


BLOCKED = """
import sys
sys.modules["triton"] = None
sys.modules["imu_fast._C"] = sys.modules["imu_fast._C_cuda"] = None
import imu_fast as imu
loaded = [m for m in sys.modules if m.startswith("imu_fast.") and sys.modules[m]]
assert not loaded, "importing is lazy"
import torch
assert not imu.backends()["extension"].available and not imu.backends()["triton"].available
x = imu.damped_cholesky_solve(torch.eye(2), torch.ones(2), 1.0)
assert torch.allclose(x, torch.tensor([0.5, 0.5]))
"""


def test_works_without_triton_and_without_the_extension():
    subprocess.run([sys.executable, "-c", BLOCKED], check=True, timeout=120)


def test_functions_are_not_hidden_by_their_modules():
    code = (
        "import imu_fast.unlearning.unlearn, imu_fast.model.capture, imu_fast as imu;"
        "assert callable(imu.unlearn) and callable(imu.capture);"
        "assert all(hasattr(imu, name) for name in dir(imu))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
