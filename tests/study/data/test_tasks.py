"""Data sets and forget tasks: disjoint parts, the right labels, clear errors."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from imu_fast.errors import InputError
from imu_fast.study.data.cifar import MEAN, STD
from imu_fast.study.data.tasks import check_task, load_dataset, make_task


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", None, None, 0)


def rows(samples):
    return {x.numpy().tobytes() for x in samples[0]}


def test_parts_are_disjoint_and_drawn_by_seed(digits):
    sizes = [len(part[1]) for part in (digits.train, digits.validation, digits.test)]
    assert sum(sizes) == 1797 and min(sizes) > 100
    assert not rows(digits.validation) & rows(digits.test)
    again, other = (load_dataset("digits", None, 500, seed) for seed in (0, 1))
    assert len(again.train[1]) == 500
    assert torch.equal(again.train[0], digits.train[0][:500])
    assert not torch.equal(again.train[1], other.train[1])


@pytest.mark.parametrize("seed", [0, 3])
def test_a_class(digits, seed):
    task = make_task(f"class-{seed}", digits, 0)
    assert task.kind == "class" and set(task.forget[1].tolist()) == {seed}
    for kept in (task.retain, task.validation, task.test):
        assert seed not in kept[1].tolist()
    for alike in (task.unseen_validation, task.unseen_test):
        assert set(alike[1].tolist()) == {seed}
    assert len(task.forget[1]) + len(task.retain[1]) == len(digits.train[1])


@pytest.mark.parametrize(("name", "count"), [("random-1", 13), ("random-5", 63), ("random-0.5", 6)])
def test_random_samples(digits, name, count):
    task = make_task(name, digits, 0)
    assert task.kind == "random" and len(task.forget[1]) == count
    assert len(task.retain[1]) == len(digits.train[1]) - count
    assert task.unseen_test[0] is task.test[0], "one forward pass serves both"
    other = make_task(name, digits, 1)
    assert not torch.equal(task.forget[0], other.forget[0])


def test_unknown_names_and_missing_files(digits, tmp_path):
    for name in ("class", "class--1", "random-0", "random-100", "random-x", "random"):
        with pytest.raises(InputError, match="use 'class-3' for .* or 'random-5'"):
            check_task(name)
    with pytest.raises(InputError, match="task='class-10': there are classes 0 to 9"):
        make_task("class-10", digits, 0)
    with pytest.raises(InputError, match="forgets none"):
        make_task("random-0.01", digits, 0)
    with pytest.raises(InputError, match="data='mnist' is unknown"):
        load_dataset("mnist", None, None, 0)
    for name in ("cifar10", "folder"):
        with pytest.raises(InputError, match="data_path"):
            load_dataset(name, None, None, 0)
    with pytest.raises(InputError, match="data_path=.* goes with data='cifar10' or 'folder'"):
        load_dataset("digits", tmp_path, None, 0)
    with pytest.raises(InputError, match="holds no CIFAR-10"):
        load_dataset("cifar10", tmp_path, None, 0)
    with pytest.raises(InputError, match="does not exist"):
        load_dataset("cifar10", tmp_path / "absent.npz", None, 0)


def test_torchvisions_cifar_files(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = {}
    cifar10 = torchvision.datasets.CIFAR10
    for name in [n for n, _ in cifar10.train_list + cifar10.test_list]:
        pixels[name] = generator.integers(0, 256, (12, 3072), dtype=np.uint8)
        entry = {"data": pixels[name], "labels": [i % 10 for i in range(12)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(cifar10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    data = load_dataset("cifar10", tmp_path, 40, 0)
    assert data.train[0].shape == (40, 3, 32, 32) and data.classes == 10 and data.mirror
    first = data.validation[0][0] * torch.tensor(STD).view(3, 1, 1)
    first = (first + torch.tensor(MEAN).view(3, 1, 1)) * 255
    expected = torch.tensor(pixels["test_batch"][0]).view(3, 32, 32).float()
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-3)


def test_image_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 5)):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{i}.png")
    data = load_dataset("folder", tmp_path, 10, 0)
    assert data.train[0].shape == (10, 3, 32, 32) and data.classes == 2
    assert (len(data.validation[1]), len(data.test[1])) == (2, 8)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(InputError, match="must be the same sub-folders"):
        load_dataset("folder", tmp_path, None, 0)


def test_more_training_images_than_there_are_are_refused():
    everything = len(load_dataset("digits", None, None, 0).train[1])
    assert len(load_dataset("digits", None, everything, 0).train[1]) == everything
    with pytest.raises(InputError, match=f"train={everything + 1}: there are {everything}"):
        load_dataset("digits", None, everything + 1, 0)
