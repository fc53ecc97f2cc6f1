"""The preprocessing of an image folder is the model's own, said in one line, never assumed."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from toy_command import run

import imu_fast as imu
from imu_fast.cli.model_files import build_model
from imu_fast.cli.preprocessing import preprocessing_of
from imu_fast.errors import InputError
from imu_fast.storage import save_tensors


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes, and its images as Pillow opens them."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    opened = []
    for name in ("0", "1"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            path = tmp_path / "photos" / name / f"{i}.png"
            pixels = np.random.default_rng(len(opened)).integers(0, 255, (50, 60, 3), np.uint8)
            image.fromarray(pixels).save(path)
            opened.append(image.fromarray(pixels))
    return tmp_path / "photos", opened


def expected(model, transform, opened):
    x = torch.stack([transform(image) for image in opened])
    return imu.influence_scores(model, (x, torch.tensor([0, 0, 1, 1])), damping=1e-2).numpy()


def check(arch, weights, photos, transform, *more):
    """The scores are those of images prepared by ``transform``; returns what was said."""
    folder, opened = photos
    out = folder.parent / "scores.npz"
    text = run(
        "score",
        "--arch",
        arch,
        "--weights",
        weights,
        "--data",
        folder,
        "--out",
        out,
        "--force",
        *more,
    )
    want = expected(build_model(arch, weights), transform, opened)
    np.testing.assert_allclose(np.load(out)["influence"], want, rtol=1e-4, atol=1e-6)
    return text


def test_torchvision(photos, tmp_path):
    models = pytest.importorskip("torchvision").models
    weights = tmp_path / "model.safetensors"
    save_tensors(weights, models.mobilenet_v3_small(num_classes=2).state_dict(), {})
    own = models.get_model_weights("mobilenet_v3_small").DEFAULT.transforms()
    arch = "torchvision:mobilenet_v3_small"
    text = check(arch, weights, photos, own)
    assert (
        "images: shorter side 256 (bilinear), centre 224, mean 0.485 0.456 0.406, deviation "
        "0.229 0.224 0.225 (torchvision's MobileNet_V3_Small_Weights.IMAGENET1K_V1)" in text
    )
    small = type(own)(crop_size=32, resize_size=32)
    text = check(arch, weights, photos, small, "--image-size", 32)
    assert "centre 32" in text and "the model's own is 224" in text


def test_torchvision_says_which_weights_differ(tmp_path):
    models = pytest.importorskip("torchvision").models
    made = preprocessing_of(tmp_path, "torchvision:vit_b_16", any_model(), tmp_path / "w", None)
    assert "SWAG_E2E_V1" in made.description and "differ" in made.description
    assert made.transform.crop_size == [224]
    assert models.ViT_B_16_Weights.DEFAULT.name in made.description


def any_model():
    return torch.nn.Linear(2, 2)


def test_an_image_size_that_does_not_fit_the_model(photos, tmp_path):
    models = pytest.importorskip("torchvision").models
    weights = tmp_path / "model.safetensors"
    model = models.VisionTransformer(224, 32, 1, 2, 8, 16, num_classes=2)
    save_tensors(weights, model.state_dict(), {})
    (tmp_path / "own_vit.py").write_text(
        "from torchvision import models\n"
        "def make():\n"
        "    return models.VisionTransformer(224, 32, 1, 2, 8, 16, num_classes=2)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        text = run(
            "score", "--arch", "own_vit:make", "--weights", weights, "--data", photos[0],
            "--image-size", 96, code=2,
        )  # fmt: skip
    finally:
        sys.path.remove(str(tmp_path))
    assert "cannot take a sample of shape (3, 96, 96)" in text and "centre 96" in text


def test_timm(photos, tmp_path):
    timm = pytest.importorskip("timm")
    weights = tmp_path / "model.safetensors"
    model = timm.create_model("resnet10t", num_classes=2)
    save_tensors(weights, model.state_dict(), {})
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    text = check("timm:resnet10t", weights, photos, own)
    assert "shorter side 201 (bicubic), centre 176" in text
    text = check(
        "timm:resnet10t",
        weights,
        photos,
        timm.data.create_transform(
            input_size=(3, 64, 64),
            crop_pct=1.0,
            interpolation="bicubic",
            mean=model.pretrained_cfg["mean"],
            std=model.pretrained_cfg["std"],
        ),
        "--image-size",
        64,
    )
    assert "centre 64" in text and "the model's own is 176" in text
    # As timm leaves it beside weights: another mean than the architecture's.
    config = {"pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.1] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = check(
        "timm:resnet10t",
        weights,
        photos,
        timm.data.create_transform(
            **timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
        ),
    )
    assert "mean 0.1 0.1 0.1, deviation 0.2 0.2 0.2" in text and "config.json" in text


def test_transformers(photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=16,
        num_labels=2,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    arch, weights = f"transformers:{folder}", folder / "model.safetensors"
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        preprocessing_of(photos[0], arch, build_model(arch, weights), weights, None)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.3] * 3, image_std=[0.7] * 3
    )
    processor.save_pretrained(folder)

    def transform(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    text = check(arch, weights, photos, transform)
    assert "size height 32 width 32, mean 0.3 0.3 0.3, deviation 0.7 0.7 0.7" in text
    options = ["--arch", arch, "--weights", weights, "--data", photos[0]]
    text = run("score", *options, "--image-size", 64, code=2)
    assert "preprocessor_config.json' says the size" in text
    unlearned = folder / "unlearned.safetensors"
    run("unlearn", *options, "--out", unlearned, "--epochs", 1, "--method", "uniform")
    check(arch, unlearned, photos, transform)
    save_tensors(tmp_path / "other", {"classifier.weight": torch.zeros(2, 16)}, {})
    (tmp_path / "other").rename(tmp_path / "other.safetensors")
    text = run("score", *options, "--weights", tmp_path / "other.safetensors", code=2)
    assert "do not fit arch='transformers" in text and "missing_keys" in text
    (folder / "preprocessor_config.json").write_text("{")
    assert "cannot be read" in run("score", *options, code=2)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}')
    assert "cannot be read" in run("score", *options, code=2)
    (folder / "config.json").unlink()
    assert "has no config.json" in run("score", *options, code=2)


OWN = """
from torch import nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
def prepare(image):
    import torch
    small = image.resize((2, 2))
    pixels = [small.getpixel((i, j)) for i in (0, 1) for j in (0, 1)]
    return torch.tensor(pixels).T.reshape(3, 2, 2) / 100
def both():
    return make(), prepare
def wrong():
    return make(), 3
"""


def test_ones_own(photos, tmp_path, monkeypatch):
    (tmp_path / "own_images.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = tmp_path / "model.pt"
    torch.save(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).state_dict(), weights
    )
    monkeypatch.chdir(tmp_path)
    options = ["--weights", weights, "--data", photos[0]]
    text = run("score", "--arch", "own_images:make", *options, code=2)
    assert "does not say how its images are prepared; pass --image-size" in text
    text = run(
        "score", "--arch", "own_images:make", *options, "--image-size", 2, "--out", "once.csv"
    )
    assert "centre 2" in text and "ImageNet's, for want of others" in text
    import own_images

    text = check("own_images:both", weights, photos, own_images.prepare)
    assert "by the preprocessing that own_images:both returned" in text
    text = run("score", "--arch", "own_images:both", *options, "--image-size", 2, code=2)
    assert "brings its own preprocessing" in text
    text = run("score", "--arch", "own_images:wrong", *options, code=2)
    assert "returned a pair of Sequential and int" in text


def test_a_size_is_of_no_use_to_arrays(tmp_path):
    with pytest.raises(InputError, match="image_size=32 is for image folders"):
        preprocessing_of(tmp_path / "a.npz", "x:y", any_model(), tmp_path, 32)
    assert preprocessing_of(tmp_path / "a.npz", "x:y", any_model(), tmp_path, None) is None
