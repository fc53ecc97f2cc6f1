"""Language experiments by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imu_fast.errors import InputError, check_choice
from imu_fast.study.language.experiment import Experiment
from imu_fast.study.language.markov import Markov
from imu_fast.study.language.tofu import Tofu

EXPERIMENTS = (Markov.name, Tofu.name)
# Seconds for a first look; the numbers say nothing.
_QUICK: dict[str, dict[str, Any]] = {
    Markov.name: {
        **{"kept": 128, "forget": 48, "test": 32, "length": 10},
        **{"layers": 1, "width": 16, "epochs": 8, "max_steps": 12},
    },
    Tofu.name: {
        **{"forget": 1, "kept": 1, "unseen": 1, "measured": 4, "relearned": 2, "vocabulary": 300},
        **{"layers": 1, "width": 16, "epochs": 2, "max_steps": 3},
    },
}


def experiment_named(name: str, path: Path | None = None, *, quick: bool = False) -> Experiment:
    """The experiment with its own sizes, or tiny ones.

    Args:
        path: of the questions, for "tofu".

    Raises:
        InputError: unknown name; a path that is missing, cannot be read or is not asked for.
    """
    check_choice("data", name, EXPERIMENTS)
    sizes = _QUICK[name] if quick else {}
    if name == Markov.name:
        if path is not None:
            raise InputError(
                f"data_path={str(path)!r} goes with data='tofu'; the chains are drawn here"
            )
        return Markov(**sizes)
    if path is None:
        raise InputError(
            "data_path=None: data='tofu' needs a .jsonl of TOFU's questions, lines with split, "
            "index, question and answer"
        )
    return Tofu(path=str(path), **sizes)
