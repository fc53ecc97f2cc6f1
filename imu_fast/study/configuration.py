"""What a comparison compares: one frozen record, from flags or a yaml file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from imu_fast.errors import (
    InputError,
    brief,
    check_choice,
    check_count,
    check_installed,
    check_positive,
)
from imu_fast.study.data.tasks import DATASETS, check_task, kind_of
from imu_fast.study.entries import ALL, QUICK
from imu_fast.study.networks import NETWORKS

# The usual number of models per architecture.
SEEDS = 5
# The model that learning rates are chosen on, beyond the seeds of a report.
TUNING_SEED = 100
# Data sets' own defaults; digits fit into three minutes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "tasks": ("class-3", "random-5"),
        "seeds": SEEDS,
        "epochs": 12,
        "train": None,
        "methods": QUICK,
    },
    "cifar10": {
        "tasks": ("class-1", "class-4", "class-8", "random-1", "random-5", "random-10"),
        "seeds": SEEDS,
        "epochs": 12,
        "train": 5_000,
    },
}
_LISTS = ("archs", "tasks", "methods")


def _check_kind(name: str, value: object) -> None:
    """Raise InputError where a setting is no text, no number or no list of names, as it should be.

    What yaml makes of a few lines may be endless (lists of lists of one list): it is not shown.
    """
    if name in _LISTS:
        many = [value] if isinstance(value, str) else value
        good = isinstance(many, list | tuple) and all(isinstance(item, str) for item in many)
        wanted = "a name, or a list of names"
    elif name in ("data", "data_path"):
        good = isinstance(value, str) or (value is None and name == "data_path")
        wanted = "text"
    else:
        good = value is None or isinstance(value, int | float | str)  # what it is will be checked
        wanted = "a number"
    if not good:
        made = "empty" if value is None else f"of type {type(value).__name__}"
        raise InputError(f"{name} is {made}; it must be {wanted}")


@dataclass(frozen=True)
class Configuration:
    """Settings of a comparison.

    Attributes:
        data, data_path: a data set of ``DATASETS``, and where its files are.
        train: training images, drawn by seed; None: all.
        archs: of ``NETWORKS``. seeds: models per architecture, from seed 0.
        tasks: ``class-K``, ``random-P``.
        methods: names of ``entries.ENTRIES``, or "all"; digits have a quick choice of their own.
        epochs, lr: of training.
        max_steps: budget of each unlearning run.
        workers: processes side by side, the cores shared among them.
    """

    data: str = "digits"
    data_path: str | None = None
    train: int | None = None
    archs: tuple[str, ...] = tuple(NETWORKS)
    seeds: int = SEEDS
    tasks: tuple[str, ...] = ("class-3", "random-5")
    methods: tuple[str, ...] = (ALL,)
    epochs: int = 12
    lr: float = 0.1
    max_steps: int = 180
    workers: int = 2

    def __post_init__(self) -> None:
        check_choice("data", self.data, DATASETS)
        for name, value in (("archs", self.archs), ("tasks", self.tasks)):
            if not value:
                raise InputError(f"{name} is empty; name at least one")
        for arch in self.archs:
            check_choice("archs", arch, NETWORKS)
        for task in self.tasks:
            check_task(task)
        alike = [(kind_of(task), float(task.partition("-")[2])) for task in self.tasks]
        for name, those in (("archs", self.archs), ("tasks", alike), ("methods", self.methods)):
            again = [i for i, one in enumerate(those) if one in those[:i]]
            if again:
                twice = getattr(self, name)[again[0]]
                raise InputError(f"{name} has {twice!r} twice; name each once")
        for name in ("seeds", "epochs", "max_steps", "workers"):
            check_count(name, getattr(self, name))
        if self.seeds > TUNING_SEED:
            raise InputError(
                f"seeds={self.seeds} reaches the model that learning rates are chosen on; use at "
                f"most {TUNING_SEED}"
            )
        if self.train is not None:
            check_count("train", self.train)
        check_positive("lr", self.lr)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Configuration:
        """From a mapping (a yaml file, flags); the data set's own defaults fill in the rest.

        Raises:
            InputError: unknown names, or values out of range.
        """
        known = [f.name for f in fields(cls)]
        for name, value in given.items():
            check_choice("setting", name, known)
            _check_kind(name, value)
        values = {**_DEFAULTS.get(given.get("data", "digits"), {}), **given}
        for name in _LISTS:
            if isinstance(values.get(name), str):
                # Names of methods have commas in them.
                between = ";" if name == "methods" else ","
                values[name] = [one.strip() for one in values[name].split(between)]
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)

    @classmethod
    def read(cls, path: Path, given: Mapping[str, Any]) -> Configuration:
        """From a yaml file; ``given`` (flags) wins.

        Raises:
            InputError: no readable yaml mapping, a setting twice in it, or one of the wrong type.
        """
        check_installed(f"config={str(path)!r}", "yaml")
        import yaml

        try:
            text = path.read_text(encoding="utf-8-sig")
            values = yaml.safe_load(text)
            node = yaml.compose(text, yaml.SafeLoader)
        # A ValueError is of an encoding, or a date or number that there is not; a RecursionError of
        # lists in lists in lists.
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise InputError(
                f"config={str(path)!r} cannot be read ({brief(error)}); repair it, as UTF-8"
            ) from error
        if not isinstance(values, dict):
            raise InputError(f"config={str(path)!r} is no mapping of settings to values")
        names = [key.value for key, _ in node.value]  # of which yaml itself keeps the last
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"config={str(path)!r} has {twice[0]!r} twice; remove one")
        return cls.of({**values, **given})

    def training(self) -> dict[str, Any]:
        """The settings that a model's weights depend on."""
        return {name: getattr(self, name) for name in ("data", "train", "epochs", "lr")}

    def as_dict(self) -> dict[str, Any]:
        """For the results; without the path, which is of one machine only."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("data_path", "workers")}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
