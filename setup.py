"""Packages and the optional extension; everything else is in pyproject.toml.

``IMU_FAST_BUILD_EXT``: ``auto`` (default: build the extension if a compiler is there, and say so if
it is not), ``0`` (skip it), ``1`` (a failure is fatal).
"""

import os
import sys

from setuptools import find_packages, setup

CHOICE = os.environ.get("IMU_FAST_BUILD_EXT", "auto")
if CHOICE not in ("auto", "0", "1"):
    sys.exit(f"IMU_FAST_BUILD_EXT={CHOICE!r} is unknown; use auto, 0 or 1")


def extension():
    """The extension module and its build command; no torch headers, so it takes seconds."""
    from pybind11.setup_helpers import Pybind11Extension, build_ext

    class OptionalBuild(build_ext):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if CHOICE == "1":
                    raise
                print(f"imu_fast: extension not built ({error}); the torch path is used")

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                if CHOICE == "1":
                    raise
                print(f"imu_fast: extension not built ({error}); the torch path is used")

        def copy_extensions_to_source(self):
            # An editable install copies what was built, and there may be nothing.
            built = [
                e
                for e in self.extensions
                if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(e.name)))
            ]
            self.extensions = built
            super().copy_extensions_to_source()

    module = Pybind11Extension(
        "imu_fast._C",
        ["csrc/bindings.cpp", "csrc/cholesky_cpu.cpp", "csrc/cholesky_small.cpp"],
        depends=["csrc/cholesky_cpu.h", "csrc/cholesky_small.h", "csrc/parallel.h"],
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra"],
        extra_link_args=["-pthread", "-ldl"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


setup(
    packages=[*find_packages(include=["imu_fast", "imu_fast.*"]), "imu_fast.kernels"],
    package_dir={"imu_fast": "imu_fast", "imu_fast.kernels": "kernels"},
    package_data={"imu_fast": ["py.typed"], "imu_fast.evaluation": ["report.html.j2"]},
    **({} if CHOICE == "0" else extension()),
)
