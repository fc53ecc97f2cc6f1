"""The compiled module, loaded once: its loops run on the threads that torch's own run on."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("imu_fast")


# Of what the module has: one of another is not used. As in csrc/bindings.cpp.
_VERSION = 3
SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
# Numbers below which a loop is one thread's, as of torch's own loops.
_GRAIN = 1 << 15


def loaded_for(tensor: Tensor) -> Any:
    """The compiled module, for what lies where this tensor does and is of its dtype; else None."""
    return load() if tensor.is_cpu and tensor.dtype in SUFFIX else None


def written(*tensors: Tensor | None) -> None:
    """Tell autograd, and who else counts, of what a loop on raw pointers has changed."""
    for tensor in tensors:
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)


def threads_for(numbers: int) -> int:
    """Of a loop over so many numbers."""
    return torch.get_num_threads() if numbers > _GRAIN else 1


@lru_cache(maxsize=1)
def load() -> Any:
    """``imu_fast._C``; None, and the reason logged, if it is amiss."""
    try:
        from imu_fast import _C
    except ImportError as error:
        logger.info("imu_fast._C does not load (%s); torch does its work instead", error)
        return None
    if getattr(_C, "__version__", 1) != _VERSION:
        logger.info("imu_fast._C was built by another version; torch does its work instead")
        return None
    _C.use_openmp(openmp())
    if hasattr(os, "register_at_fork"):
        # A forked process has none of the threads, and libgomp waits for them for ever.
        os.register_at_fork(after_in_child=partial(_C.use_openmp, 0))
    return _C


def openmp() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP library that torch loaded; 0 if it has none.

    Its threads spin for a while after each of torch's loops, and threads of another kind would wait
    beside them.
    """
    try:
        # A symbol is looked for in what a library needs, too.
        symbol = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError) as error:
        logger.debug("no OpenMP of torch's: %s", error)
        return 0
    return ctypes.cast(symbol, ctypes.c_void_p).value or 0
