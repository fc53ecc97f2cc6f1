"""Facts from the compiler's output, with no GPU; test_kernels_compile.py runs this file.

For sm_80 and sm_90 (``IMU_FAST_ARCHS=80,86,90,100``: for all of these) the kernel compiles,
nothing spills, no local memory, no unreasonable shared memory, its matrix products run on tensor
cores where they should, and what feeds those arrives by asynchronous copies of 16 bytes.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess

import pytest
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import imu_fast.kernels

TOOLS = os.path.join(os.path.dirname(nvidia.__file__), "bin")
DEFAULT = "80,90"
ARCHS = [int(arch) for arch in os.environ.get("IMU_FAST_ARCHS", DEFAULT).split(",")]
# Shared memory that one block may use, in bytes, and what runs on the matrix units.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
UNITS = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def specialisations():
    for module in pkgutil.iter_modules(imu_fast.kernels.__path__):
        file = importlib.import_module(f"imu_fast.kernels.{module.name}")
        yield from getattr(file, "specialisations", list)()


def compiled_forms():
    """Each form and architecture; narrower inputs, of the same tiles, on all that are asked for."""
    every = "IMU_FAST_ARCHS" in os.environ
    for case in specialisations():
        for arch in ARCHS:
            if every or arch == 90 or " mixed" not in case.name:
                yield pytest.param(case, arch, id=f"{case.name}-sm_{arch}")


def resources(cubin: bytes, folder) -> dict[str, int]:
    """Registers, stack and local memory as cuobjdump reports them: bytes per thread."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [os.path.join(TOOLS, "cuobjdump"), "--dump-resource-usage", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("case, arch", list(compiled_forms()))
def test_compiles(case, arch, tmp_path):
    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert compiled.metadata.shared <= SHARED[arch], compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    assert ".local" not in ptx
    units = UNITS[arch]
    assert (units in ptx) == case.matrix_units, f"{units} expected: {case.matrix_units}"
    if case.matrix_units:
        assert "cp.async.cg" in ptx, "no asynchronous copies of 16 bytes: loads are not vectors"
