"""What is available here, and how to get what is not."""

from __future__ import annotations

import platform
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch

from imu_fast.backend import backends
from imu_fast.errors import brief

_PURPOSES = {
    "triton": ("GPU kernels", "pip install triton"),
    "scipy": ("LAPACK for the extension where torch's is hidden", "pip install scipy"),
    "scikit-learn": ("demo, membership attack", "pip install 'imu_fast[demo]'"),
    "matplotlib": ("plots", "pip install 'imu_fast[demo]'"),
    "pyarrow": (".parquet scores", "pip install 'imu_fast[demo]'"),
    "torchvision": ("image folders, torchvision models", "pip install 'imu_fast[demo]'"),
    "timm": ("timm models", "pip install timm"),
    "transformers": ("transformers models, language models", "pip install transformers"),
    "peft": ("LoRA adapters", "pip install 'imu_fast[text]'"),
}
_MODULES = {"scikit-learn": "sklearn"}


class Component(NamedTuple):
    """One line of what there is.

    Attributes:
        component: its name. here: its version, where it is from, or why it is not there.
        available: whether it can be used. purpose: what it is for.
        remedy: how to get it, whole, to be typed; None: it is there, or cannot be had so.
    """

    component: str
    here: str
    available: bool
    purpose: str
    remedy: str | None = None

    @property
    def row(self) -> tuple[str, str, str]:
        """As the table has it: the remedy where it is needed."""
        last = self.purpose if self.remedy is None else f"{self.purpose}: {self.remedy}"
        return self.component, self.here, last


def report() -> dict[str, Any]:
    """All of it as JSON has it: versions, the machine, and one object per component."""
    from imu_fast import __version__

    return {
        "imu_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "components": [one._asdict() for one in diagnose()],
    }


def diagnose() -> list[Component]:
    """Every component: what is there, and what it is for or how to get it."""
    from imu_fast.ops.extension import openmp
    from imu_fast.solvers.cholesky.cusolver import find_cusolver
    from imu_fast.solvers.cholesky.lapack import find_lapack

    found = [Component("torch", str(torch.__version__), True, "the vectorised path; always there")]
    if torch.cuda.is_available():
        found.append(Component("CUDA", torch.cuda.get_device_name(), True, "GPU"))
    else:
        why = "no NVIDIA GPU, or a CPU build of torch; all runs on the CPU"
        found.append(Component("CUDA", "none", False, why))
    extension, compiled = backends()["extension"], backends()["cuda"]
    threads = "torch's threads" if openmp() else "threads of its own"
    found.append(
        _built(
            "imu_fast._C",
            extension.available,
            f"{extension.reason}, on {threads}",
            "damped Cholesky and squared products on the CPU",
            "install a C++ compiler, then IMU_FAST_BUILD_EXT=1 pip install --no-cache-dir .",
        )
    )
    lapack = find_lapack()
    found.append(
        _built(
            "LAPACK",
            lapack is not None,
            "" if lapack is None else f"from {lapack.name}",
            "for imu_fast._C",
            "pip install scipy",
        )
    )
    found.append(
        _built(
            "imu_fast._C_cuda",
            compiled.reason.startswith("compiled"),
            compiled.reason,
            "damped Cholesky on CUDA",
            "install nvcc, then IMU_FAST_BUILD_CUDA=1 pip install --no-cache-dir .",
        )
    )
    library, where = find_cusolver()
    there = library is not None
    found.append(
        Component(
            "cuSOLVER", where if there else "missing", there, "large matrices of imu_fast._C_cuda"
        )
    )
    for name, (purpose, remedy) in _PURPOSES.items():
        try:
            import_module(_MODULES.get(name, name))
            found.append(Component(name, metadata.version(name), True, purpose))
        except Exception as error:  # a broken binary package raises anything at all
            missing = isinstance(error, ModuleNotFoundError)
            reason = "missing" if missing else f"broken: {brief(error)}"
            found.append(Component(name, reason, False, purpose, remedy))
    return found


def _built(name: str, there: bool, here: str, purpose: str, remedy: str) -> Component:
    if there:
        return Component(name, here, True, purpose)
    return Component(name, "missing", False, purpose, remedy)
