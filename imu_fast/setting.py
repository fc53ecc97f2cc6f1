"""A choice of the process: by argument over environment over what is automatic."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from imu_fast.errors import check_choice


class Setting:
    """One name among some, in force in the context in which it was chosen.

    Args:
        name: as arguments and messages call it. environment: the variable that sets it for every
            thread. choices: "auto", which is in force where nothing was chosen, and the others.
    """

    def __init__(self, name: str, environment: str, choices: Sequence[str]) -> None:
        self.name, self.environment, self.choices = name, environment, choices
        self._chosen: ContextVar[str | None] = ContextVar(f"imu_fast_{name}", default=None)

    def current(self) -> str:
        """The choice in force.

        Raises:
            InputError: the environment variable names none.
        """
        chosen = self._chosen.get()
        if chosen is None:
            chosen = os.environ.get(self.environment)
            if chosen is None:
                return "auto"
            check_choice(self.environment, chosen, self.choices)
        return chosen

    @contextmanager
    def chosen(self, value: str) -> Iterator[None]:
        """In force in the body.

        Raises:
            InputError: it is none of the choices.
        """
        check_choice(self.name, value, self.choices)
        token = self._chosen.set(value)
        try:
            yield
        finally:
            self._chosen.reset(token)
