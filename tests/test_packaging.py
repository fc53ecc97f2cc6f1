"""What the wheel and the source distribution carry, and that a wheel works from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import imu_fast as imu

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "imu_fast/study/report/report.html.j2"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    # That nvcc builds the CUDA extension is shown by the environment that tests run in.
    env = {**os.environ, "IMU_FAST_BUILD_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=400,
        env=env,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_source_distribution_carries_what_a_build_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").iterdir()}
    tracked |= {str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("*.cpp")}
    others = {"setup.py", "kernels/__init__.py", "LICENSE", "constraints.txt", TEMPLATE}
    assert tracked | others <= names


def test_wheel_carries_the_package_and_works_from_another_directory(built, tmp_path):
    wheel = next(built.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "imu_fast").rglob("*.py")}
    assert ours | {"imu_fast/py.typed", "imu_fast/kernels/__init__.py", TEMPLATE} <= names
    if imu.backends()["extension"].available:  # what built it here builds it from the sources there
        assert any(name.startswith("imu_fast/_C.") for name in names)
    assert not [n for n in names if n.startswith(("tests", "bench", "kernels", "csrc"))]
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import imu_fast, imu_fast.kernels, torch;"
        "print(imu_fast.__file__, imu_fast.backends()['extension'].reason);"
        "print(imu_fast.damped_cholesky_solve(torch.eye(2), torch.ones(2), 1.0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
