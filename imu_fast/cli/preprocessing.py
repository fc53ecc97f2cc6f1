"""What a model needs done to an image, from those who know: its library or its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imu_fast.data.image_files import Preprocessing, described, imagenet_preprocessing
from imu_fast.errors import InputError, brief, check_count, check_installed

# What transformers' image processors are saved as.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def preprocessing_of(
    data: Path, arch: str, model: nn.Module, weights: Path, image_size: int | None
) -> Preprocessing | None:
    """The preprocessing of an image folder; None for other data, which is taken as it is.

    In this order: what the user's function returned beside the model; an image processor's file,
    or timm's ``config.json``, beside the weights (or in the folder of ``transformers:FOLDER``);
    timm's configuration of the model; torchvision's default weights of the architecture.

    Args:
        image_size: the user's own; the model's mean, deviation and interpolation stay.

    Raises:
        InputError: nothing says it and no ``image_size`` is given; or ``image_size`` has no
            meaning here.
    """
    if image_size is not None:
        check_count("image_size", image_size)
    if not data.is_dir():
        if image_size is not None:
            raise InputError(
                f"image_size={image_size} is for image folders; data={str(data)!r} is taken as it "
                "is, leave image_size out"
            )
        return None
    own = vars(model).get("preprocess")
    if callable(own):
        _refuse_size(image_size, f"arch={arch!r} brings its own preprocessing")
        return Preprocessing(own, f"images: by the preprocessing that {arch} returned")
    source, _, name = arch.partition(":")
    folders = [weights.parent, *([Path(name)] if source == "transformers" else [])]
    for folder in folders:
        for file in _PROCESSOR_FILES:
            if (folder / file).is_file() and _is_of_images(folder / file):
                return _by_processor(folder, folder / file, image_size)
    for folder in folders:
        try:
            config = _json(folder / "config.json").get("pretrained_cfg")
        except InputError:  # another program's, which nobody has asked for
            continue
        if isinstance(config, dict):
            return _by_timm(config, f"{folder / 'config.json'}", image_size)
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict):
        return _by_timm(config, f"timm's {config.get('architecture', name)}", image_size)
    if source == "torchvision":
        return _by_torchvision(name, image_size)
    if image_size is None:
        raise InputError(
            f"arch={arch!r} does not say how its images are prepared; pass --image-size (with "
            "ImageNet's mean and deviation), or let the function return (model, preprocess), or "
            "put the model's inputs into an .npz"
        )
    return imagenet_preprocessing(image_size)


def _refuse_size(image_size: int | None, why: str) -> None:
    if image_size is not None:
        raise InputError(f"image_size={image_size}: {why}; change it there, or leave it out")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); repair or remove it") from error
    return found if isinstance(found, dict) else {}


def _is_of_images(path: Path) -> bool:
    found = _json(path)
    return "image_mean" in found or "image_processor_type" in found or "image_processor" in found


def _by_processor(folder: Path, file: Path, image_size: int | None) -> Preprocessing:
    _refuse_size(image_size, f"{str(file)!r} says the size of the images")
    check_installed(f"{str(file)!r}", "transformers", "torchvision", install="transformers")
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
    # What the library raises on files of another kind or version.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {brief(error)}") from error

    def transform(image: Any) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    parts = [f"size {_plain(getattr(processor, 'size', None))}"]
    if getattr(processor, "do_center_crop", False):
        parts.append(f"centre {_plain(getattr(processor, 'crop_size', None))}")
    if getattr(processor, "do_normalize", False):
        for word, values in (("mean", processor.image_mean), ("deviation", processor.image_std)):
            parts.append(f"{word} {' '.join(f'{value:.4g}' for value in values)}")
    return Preprocessing(transform, f"images: {', '.join(parts)} ({file})")


def _plain(size: Any) -> str:
    items = {k: v for k, v in dict(size or {}).items() if v is not None}
    return " ".join(f"{key} {value}" for key, value in items.items()) or "as it is"


def _by_timm(config: dict[str, Any], of: str, image_size: int | None) -> Preprocessing:
    check_installed(of, "timm", "torchvision", install="timm")
    from timm.data import create_transform, resolve_data_config

    known = resolve_data_config(pretrained_cfg=config)
    side = known["input_size"][-1]
    if image_size is not None:
        known |= {"input_size": (*known["input_size"][:1], image_size, image_size), "crop_pct": 1.0}
        of += _unlike(image_size, side)
    if known["crop_mode"] != "center":
        of += f", crop mode {known['crop_mode']}"
    crop = known["input_size"][-1]
    return Preprocessing(
        create_transform(**known, is_training=False),
        described(
            int(crop / known["crop_pct"]),
            crop,
            known["interpolation"],
            known["mean"],
            known["std"],
            of,
        ),
    )


def _by_torchvision(name: str, image_size: int | None) -> Preprocessing:
    check_installed(f"arch='torchvision:{name}'", "torchvision")
    from torchvision import models

    weights = models.get_model_weights(name)
    preset = weights.DEFAULT.transforms()
    side = preset.crop_size[0]
    of = f"torchvision's {weights.DEFAULT}"
    if image_size is not None:
        preset = type(preset)(
            crop_size=image_size,
            resize_size=image_size,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=preset.interpolation,
            antialias=preset.antialias,
        )
        of += _unlike(image_size, side)
    else:
        others = [w.name for w in weights if _seen(w.transforms()) != _seen(preset)]
        if others:
            of += f"; {', '.join(others)} differ: --image-size sets the size"
    return Preprocessing(
        preset,
        described(
            preset.resize_size[0],
            preset.crop_size[0],
            preset.interpolation.value,
            preset.mean,
            preset.std,
            of,
        ),
    )


def _seen(preset: Any) -> tuple[Any, ...]:
    return preset.crop_size, preset.resize_size, preset.mean, preset.std, preset.interpolation


def _unlike(image_size: int, own: int) -> str:
    return f", but for --image-size: the model's own is {own}" if image_size != own else ""
