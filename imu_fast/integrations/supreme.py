"""supreme-unlearning: ``imu_fast`` among its unlearning methods.

``register()`` before its pipeline runs, or in a plugin of yours; then ``-method imu_fast``. Its
registry takes what is imported by name, so options are bound in a function of yours::

    def gentle(**given):
        return imu_fast(**given, method="margin_edit", margin=0.5)

    supreme.register_unlearning_method("gentle", gentle)

Its batches are ``(images, subclasses, classes)``, the second empty where a data set has none: what
is forgotten, kept and measured are the classes, which come last.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from imu_fast.errors import InputError
from imu_fast.model.parts import Data
from imu_fast.unlearning.unlearn import unlearn

logger = logging.getLogger("imu_fast")

# What supreme hands to every method that it does not know, and this one does not need.
_HANDLES = frozenset(
    {
        *("wandb_logging_flag", "type_of_unlearning_strategy", "model_name", "num_labels"),
        *("distributed_strategy_name", "forget_label_id", "retain_train_dataloader"),
        *("retain_test_dataloader", "forget_test_dataloader", "train_dataloader"),
        *("test_dataloader", "full_train_dataloader", "retain_train_augmented_dataloader"),
        *("unlearning_teacher", "dataset_name"),
    }
)

_TASKS = {"fullclass": "class", "subclass": "samples", "random_": "samples"}


def imu_fast(
    fabric: Any,
    num_gpus: int,
    model: nn.Module,
    forget_train_dataloader: Any,
    method: Any = "auto",
    **options: Any,
) -> nn.Module:
    """Unlearn the forget set; the model is changed in place and returned.

    Args:
        fabric, num_gpus: supreme's. One process alone: the forget set is small, and shared out it
            would be unlearned in parts.
        model: or a wrapper that Fabric made of it.
        options: of supreme's, ``type_of_unlearning_strategy`` tells ``auto`` whether the forget set
            is a ``"fullclass"``; other samples are forgotten until they are predicted no better
            than those of ``test_dataloader``, and left alone where they are not.
        method: and further options, as of :func:`imu_fast.unlearn`; what else supreme passes is not
            needed, but its loaders may be given as ``retain``, ``unseen`` or in ``watch``.

    Raises:
        InputError: several processes, or an option that the method does not have.
    """
    if getattr(fabric, "world_size", 1) > 1:
        raise InputError(
            f"fabric has {fabric.world_size} processes, each with a part of the forget set; run "
            "this method with one"
        )
    loaders = [v for k, v in options.items() if k in _HANDLES and k.endswith("dataloader")]
    own = {name: value for name, value in options.items() if name not in _HANDLES}
    if method == "auto":
        own.setdefault("task", _TASKS.get(str(options.get("type_of_unlearning_strategy"))))
        if own["task"] != "class" and not {"stop", "milestones", "unseen"} & own.keys():
            own["unseen"] = options.get("test_dataloader")
    own = {name: _read(value, loaders) for name, value in own.items()}
    inner = getattr(model, "module", model)
    result = unlearn(inner, _by_class(forget_train_dataloader), method, **own)
    logger.info("%s", result)
    return model


def _by_class(loader: Any) -> Any:
    """A loader of supreme's with its classes for labels."""
    return loader if isinstance(loader, Data) else Data(loader, inputs=0, labels=-1)


def _read(value: Any, loaders: Sequence[Any]) -> Any:
    """An option in which those of supreme's loaders that it holds are read by class."""
    if isinstance(value, Mapping):
        return {name: _read(inner, loaders) for name, inner in value.items()}
    theirs = any(value is loader for loader in loaders if loader is not None)
    return _by_class(value) if theirs else value


def register(name: str = "imu_fast") -> None:
    """Register :func:`imu_fast` under this name, which ``-method`` then takes.

    Raises:
        InputError: supreme-unlearning is not installed.
    """
    try:
        import supreme
    except ImportError as error:
        raise InputError(
            f"supreme-unlearning does not load ({error}); pip install supreme-unlearning"
        ) from error
    supreme.register_unlearning_method(name, f"{__name__}:imu_fast")
