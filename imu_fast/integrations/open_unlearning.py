"""open-unlearning: a trainer for its registry, and the configuration that goes with it.

In its ``src/trainer/__init__.py``, after the others::

    from imu_fast.integrations.open_unlearning import register
    register(_register_trainer)

and ``python -m imu_fast.integrations.open_unlearning PATH`` puts ``ImuFast.yaml`` into the
``configs/trainer`` of a checkout. Then ``trainer=ImuFast`` selects it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imu_fast.errors import InputError
from imu_fast.integrations._forgetting import Forgetting, UnlearningMixin
from imu_fast.storage import writable

__all__ = ["CONFIG", "Forgetting", "install_config", "register", "trainer_class"]
CONFIG = Path(__file__).parent / "configs" / "ImuFast.yaml"


def trainer_class(base: type | None = None) -> type:
    """The trainer, ``ImuFast``: its batches are ``{"forget": {...}, "retain": {...}}``.

    Without a retain set the loss is the forget set's alone. Options of :class:`Forgetting` are its
    keywords, so ``method_args`` of the configuration.

    Args:
        base: an ``UnlearnTrainer``; None: open-unlearning's.

    Raises:
        InputError: open-unlearning's ``src`` is not on the path.
    """
    if base is None:
        try:
            from trainer.unlearn.base import UnlearnTrainer
        except ImportError as error:
            raise InputError(
                f"open-unlearning's 'src' folder is not on the path ({error}); call this there, or "
                "pass its UnlearnTrainer as base"
            ) from error
        base = UnlearnTrainer
    assert base is not None
    members = {"__module__": __name__, "__doc__": UnlearningMixin.__doc__}
    return type("ImuFast", (UnlearningMixin, base), members)


def register(into: Callable[[type], Any] | None = None, base: type | None = None) -> type:
    """Put the trainer into open-unlearning's registry, under ``ImuFast``; returns the class.

    Args:
        into: its ``_register_trainer``; None: imported. base: as of :func:`trainer_class`.
    """
    made = trainer_class(base)
    if into is None:
        from trainer import _register_trainer

        into = _register_trainer
    assert into is not None
    into(made)
    return made


def install_config(checkout: str | Path) -> Path:
    """Copy ``ImuFast.yaml`` into the ``configs/trainer`` of a checkout; returns its path there.

    Raises:
        InputError: this is no checkout of open-unlearning.
    """
    folder = Path(checkout) / "configs" / "trainer"
    if not folder.is_dir():
        raise InputError(f"checkout={str(checkout)!r} has no folder configs/trainer")
    target = folder / CONFIG.name
    writable(target, "checkout")
    target.write_text(CONFIG.read_text())
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m imu_fast.integrations.open_unlearning PATH_OF_A_CHECKOUT")
    print(install_config(sys.argv[1]))
