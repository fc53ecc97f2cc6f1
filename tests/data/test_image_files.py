"""A user's folder of images: which class is which sub-folder, and the errors when nobody knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imu_fast.data.image_files import class_indices, imagenet_preprocessing, load_data
from imu_fast.errors import InputError


def indices(names, count, classes=None):
    return class_indices(names, count, classes, data="forget")


@pytest.fixture
def images(tmp_path):
    """Make ``forget/<name>/`` with two images per class."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")

    def make(*names):
        for name in names:
            (tmp_path / "forget" / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 255, (9, 8, 3), dtype=np.uint8)
                image.fromarray(pixels).save(tmp_path / "forget" / name / f"{i}.png")
        return tmp_path / "forget"

    return make


def labels_of(folder, count, classes=None):
    loader, names = load_data(
        folder, lambda x: count, preprocessing=imagenet_preprocessing(8), classes=classes
    )
    labels = torch.cat([y for _, y in loader]).tolist()
    return dict(zip(names, labels, strict=True))


def test_a_forget_set_of_one_class_keeps_its_class(tmp_path, images):
    folder = images("dog")
    lines = tmp_path / "classes.txt"
    lines.write_text("zebra\ncat\ndog\n")  # the head's order, not the alphabet's
    assert labels_of(folder, 3, lines) == {"dog/0.png": 2, "dog/1.png": 2}
    train = tmp_path / "train"
    for name in ("cat", "dog", "zebra"):
        (train / name).mkdir(parents=True)
    assert labels_of(folder, 3, train) == {"dog/0.png": 1, "dog/1.png": 1}
    with pytest.raises(InputError, match="1 sub-folders .dog., the model 3 classes.*--classes"):
        labels_of(folder, 3)


def test_whole_numbers_are_class_indices(images):
    assert set(labels_of(images("07"), 10).values()) == {7}
    assert indices(["10", "2"], 12) == [10, 2]
    assert indices(["0", "1"], 2) == [0, 1]


def test_all_classes_are_numbered_alphabetically(images):
    assert set(labels_of(images("cat", "dog"), 2).values()) == {0, 1}


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["cat", "dog"], 3, "2 sub-folders .cat, dog., the model 3 classes"),
        (["cat", "dog"], 1, "the model 1 classes"),
        (["1", "2", "3"], 3, "sub-folders 3; whole numbers .* from 0 to 2"),
        (["07", "7"], 10, "each once"),
        (sorted(map(str, range(11))), 11, "ImageFolder's numbering"),
    ],
)
def test_nobody_knows_which_class(names, count, message):
    with pytest.raises(InputError, match=message):
        indices(names, count)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\n", "has 2 classes, the model 3"),
        (b"cat\ndog\ncat\n", "'cat' is on the lines 1 and 3"),
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"cat\nbird\nfish\n", "sub-folders dog, which are not in"),
        (b"\xff\xfe\x00\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_lists_of_classes(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        indices(["dog"], 3, path)


def test_a_list_of_classes_may_come_from_any_editor(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcafé \r\ndog\r\n\r\n".encode())
    assert indices(["café", "dog"], 2, path) == [0, 1]


def test_classes_are_of_no_use_to_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3), np.float32), y=np.zeros(2, np.int64))
    with pytest.raises(InputError, match="leave it out with an .npz"):
        load_data(tmp_path / "a.npz", lambda x: 3, classes=tmp_path)


def test_an_image_that_cannot_be_read_is_named(images):
    folder = images("0")
    content = (folder / "0" / "1.png").read_bytes()
    for broken in (content[:60], b"no image", b""):
        (folder / "0" / "1.png").write_bytes(broken)
        with pytest.raises(InputError, match="1.png' cannot be read .* repair or remove it"):
            labels_of(folder, 3)


def test_an_empty_class_folder_is_named(images):
    folder = images("cat")
    (folder / "dog").mkdir()
    with pytest.raises(InputError, match="dog.*none empty"):
        labels_of(folder, 2)


def test_a_folder_needs_a_preprocessing_and_arrays_have_none(tmp_path, images):
    folder = images("0")
    with pytest.raises(InputError, match="say its preprocessing"):
        load_data(folder, lambda x: 3)
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3), np.float32), y=np.zeros(2, np.int64))
    with pytest.raises(InputError, match="taken as it is"):
        load_data(tmp_path / "a.npz", lambda x: 3, preprocessing=imagenet_preprocessing(8))
    with pytest.raises(InputError, match="image_size=0"):
        imagenet_preprocessing(0)
