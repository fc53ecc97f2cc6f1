"""Every operation, by name."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from imu_fast.ops.operation import Operation


def operations() -> dict[str, Operation[..., Any]]:
    """Those of this folder's files, by the name of their definition in ``reference.py``."""
    found = {}
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = import_module(f"imu_fast.ops.{file.name}")
        for value in vars(module).values():
            if isinstance(value, Operation) and value.body.__module__ == module.__name__:
                found[value.name] = value
    return found
