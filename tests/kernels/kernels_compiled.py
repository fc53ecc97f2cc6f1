"""Facts from the compiler's output, with no GPU; test_kernels_compile.py runs this file.

For sm_80 and sm_90: the kernel compiles, nothing spills, no local memory, no unreasonable shared
memory, its matrix products run on tensor cores where they should, and what feeds those arrives by
asynchronous copies of 16 bytes.
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
ARCHS = (80, 90)
# Shared memory that one block may use, in bytes.
SHARED = {80: 163 << 10, 90: 227 << 10}


def specialisations():
    for module in pkgutil.iter_modules(imu_fast.kernels.__path__):
        file = importlib.import_module(f"imu_fast.kernels.{module.name}")
        yield from getattr(file, "specialisations", list)()


def resources(cubin: bytes, folder) -> dict[str, int]:
    """Registers, stack and local memory as cuobjdump reports them: bytes per thread."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [os.path.join(TOOLS, "cuobjdump"), "--dump-resource-usage", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("case", list(specialisations()), ids=lambda case: case.name)
def test_compiles(case, arch, tmp_path):
    source = ASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert compiled.metadata.shared <= SHARED[arch], compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    assert ".local" not in ptx
    units = "wgmma.mma_async" if arch == 90 else "mma.sync"
    assert (units in ptx) == case.matrix_units, f"{units} expected: {case.matrix_units}"
    if case.matrix_units:
        assert "cp.async.cg" in ptx, "no asynchronous copies of 16 bytes: loads are not vectors"
