"""Checkpoints of a run: what they hold, and whether they can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

from imu_fast.errors import InputError, brief
from imu_fast.storage import load_tensors


def check_resumable(path: Path) -> None:
    """Raise InputError if ``path`` exists and is no checkpoint of a run of ``unlearn``."""
    if not path.exists():
        return
    try:
        metadata = load_tensors(path)[1]
        json.loads(metadata["imu_fast"])
    except (InputError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"checkpoint={str(path)!r} is no checkpoint of unlearn, or is broken "
            f"({brief(error)}); delete it or choose another name"
        ) from error
