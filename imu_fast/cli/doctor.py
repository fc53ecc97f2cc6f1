"""What is available here, and how to get what is not."""

from __future__ import annotations

from importlib import import_module, metadata

import torch

from imu_fast.backend import backends

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


def diagnose() -> list[tuple[str, str, str]]:
    """One row per component: name, what is there, what it is for or how to get it."""
    from imu_fast.solvers.cholesky.cusolver import find_cusolver
    from imu_fast.solvers.cholesky.lapack import find_lapack

    rows = [("torch", str(torch.__version__), "the vectorised path; always there")]
    if torch.cuda.is_available():
        rows.append(("CUDA", torch.cuda.get_device_name(), "GPU"))
    else:
        rows.append(("CUDA", "none", "no NVIDIA GPU, or a CPU build of torch; all runs on the CPU"))
    extension = backends()["extension"]
    remedy = "damped Cholesky on the CPU"
    if not extension.available:
        remedy = "install a C++ compiler, then IMU_FAST_BUILD_EXT=1 pip install --no-cache-dir ."
    rows.append(("imu_fast._C", extension.reason if extension.available else "missing", remedy))
    lapack = find_lapack()
    rows.append(
        (
            "LAPACK",
            "missing" if lapack is None else f"from {lapack.name}",
            "for imu_fast._C" if lapack else "pip install scipy",
        )
    )
    compiled = backends()["cuda"]
    built = compiled.reason.startswith("compiled")
    remedy = "damped Cholesky on CUDA"
    if not built:
        remedy = "install nvcc, then IMU_FAST_BUILD_CUDA=1 pip install --no-cache-dir ."
    rows.append(("imu_fast._C_cuda", compiled.reason if built else "missing", remedy))
    library, found = find_cusolver()
    rows.append(
        ("cuSOLVER", "missing" if library is None else found, "large matrices of imu_fast._C_cuda")
    )
    for name, (purpose, remedy) in _PURPOSES.items():
        try:
            import_module(_MODULES.get(name, name))
            rows.append((name, metadata.version(name), purpose))
        except Exception as error:  # a broken binary package raises anything at all
            reason = "missing" if isinstance(error, ModuleNotFoundError) else f"broken: {error}"
            rows.append((name, reason, f"{purpose}: {remedy}"))
    return rows
