"""Packages and the optional extensions; everything else is in pyproject.toml.

``IMU_FAST_BUILD_EXT``, for ``imu_fast._C``: ``auto`` (default: build it if a compiler is there, and
say so if it is not), ``0`` (skip it), ``1`` (a failure is fatal). ``IMU_FAST_BUILD_CUDA``, for
``imu_fast._C_cuda``: the same, where the compiler is nvcc, in ``$CUDA_HOME/bin`` or on the path.
"""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup


def choice(name):
    """The value of an environment variable that says auto, 0 or 1."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}={value!r} is unknown; use auto, 0 or 1")
    return value


CHOICES = {
    "imu_fast._C": choice("IMU_FAST_BUILD_EXT"),
    "imu_fast._C_cuda": choice("IMU_FAST_BUILD_CUDA"),
}
# A100, H100 and H200; what comes after them compiles the last one's PTX when it is first used.
GPUS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]


def readme():
    """README for a package index, where what leads into the repository needs a whole address."""
    here = Path(__file__).parent
    project = (here / "pyproject.toml").read_text(encoding="utf-8")
    home = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)[1]
    raw = home.replace("github.com", "raw.githubusercontent.com")

    def whole(link):
        target = link[1]
        if re.match(r"\w+:|#", target):
            return link[0]
        base = f"{raw}/main" if target.endswith(".png") else f"{home}/blob/main"
        return f"]({base}/{target})"

    text = (here / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\(([^)]+)\)", whole, text)


def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def nvcc_command(sources, output, nvcc):
    """One command from sources to a module that needs no CUDA library to load."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    return [
        *(nvcc, "-shared", "-cudart=static", "-std=c++17", "-O3", "--expt-relaxed-constexpr"),
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
        *(f"-gencode={gpu}" for gpu in GPUS),
        *(f"-I{include}" for include in includes),
        *("-o", output, *sources),
    ]


def extensions():
    """The extension modules and their build command; no torch headers, so each takes seconds."""
    from pybind11.setup_helpers import Pybind11Extension, build_ext

    class OptionalBuild(build_ext):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if "1" in CHOICES.values():
                    raise
                print(f"imu_fast: extensions not built ({error}); the torch path is used")

        def build_extension(self, ext):
            try:
                if ext.name == "imu_fast._C_cuda":
                    self.build_with_nvcc(ext)
                else:
                    super().build_extension(ext)
            except Exception as error:
                if CHOICES[ext.name] == "1":
                    raise
                print(f"imu_fast: {ext.name} not built ({error}); the torch path is used")

        def build_with_nvcc(self, ext):
            nvcc = find_nvcc()
            if nvcc is None:
                raise RuntimeError("no nvcc in $CUDA_HOME/bin or on the path")
            output = self.get_ext_fullpath(ext.name)
            os.makedirs(os.path.dirname(output), exist_ok=True)
            self.spawn(nvcc_command(ext.sources, output, nvcc))

        def copy_extensions_to_source(self):
            # An editable install copies what was built, and there may be nothing.
            built = [
                e
                for e in self.extensions
                if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(e.name)))
            ]
            self.extensions = built
            super().copy_extensions_to_source()

    cpu = Pybind11Extension(
        "imu_fast._C",
        [
            *("csrc/bindings.cpp", "csrc/cholesky_cpu.cpp", "csrc/cholesky_small.cpp"),
            *("csrc/conjugate_gradient.cpp", "csrc/head_ascent.cpp"),
            *("csrc/softmax_residual.cpp", "csrc/squared_products.cpp"),
        ],
        depends=[
            *("csrc/cholesky_cpu.h", "csrc/cholesky_small.h", "csrc/squared_products.h"),
            *("csrc/conjugate_gradient.h", "csrc/head_ascent.h", "csrc/softmax_residual.h"),
            *("csrc/offsets.h", "csrc/parallel.h", "csrc/versions.h"),
        ],
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra"],
        extra_link_args=["-pthread", "-ldl"],
    )
    cuda = Extension(
        "imu_fast._C_cuda",
        ["csrc/bindings_cuda.cpp", "csrc/cholesky_cuda.cu", "csrc/cusolver.cpp"],
        depends=[
            *("csrc/cholesky_block.h", "csrc/cholesky_cuda.h"),
            *("csrc/cuda_status.h", "csrc/cusolver.h"),
        ],
    )
    modules = [module for module in (cpu, cuda) if CHOICES[module.name] != "0"]
    return {"ext_modules": modules, "cmdclass": {"build_ext": OptionalBuild}}


setup(
    # imu_fast/kernels is a link to kernels/. A source tree that is a plain folder on the path, as
    # package_dir says, is what type checkers find where the package is installed in place.
    packages=find_packages(include=["imu_fast", "imu_fast.*"]),
    package_dir={"": "."},
    package_data={
        "imu_fast": ["py.typed"],
        "imu_fast.study.report": ["report.html.j2"],
        "imu_fast.integrations": ["configs/*.yaml"],
    },
    long_description=readme(),
    long_description_content_type="text/markdown",
    **({} if set(CHOICES.values()) == {"0"} else extensions()),
)
