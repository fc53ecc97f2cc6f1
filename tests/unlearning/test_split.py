"""Data in two: every form gives the same rows, in its own kind; the rest is refused by name."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import imu_fast as imu

X, Y = torch.arange(22.0).reshape(11, 2), torch.arange(11) % 3
Named = namedtuple("Named", "pixels target")


class Samples(Dataset):
    """Says how often it is read."""

    def __init__(self, form=tuple):
        self.form, self.read = form, 0

    def __len__(self):
        return 11

    def __getitem__(self, row):
        self.read += 1
        label = int(Y[row])
        return {"image": X[row], "label": label} if self.form is dict else (X[row], label)


FORMS = {
    "tensors": (X, Y),
    "a list of two": [X, Y],
    "arrays": (X.numpy(), Y.numpy().astype(np.uint8)),
    "a dict": {"image": X, "labels": Y},
    "a namedtuple": Named(X, Y),
    "said": imu.Data((Y, X, X), labels=0, inputs=1),
    "a dataset": TensorDataset(X, Y),
    "a dataset of pairs": Samples(),
    "a dataset of dicts": Samples(dict),
    "a dataset, said": imu.Data(TensorDataset(Y, X, X), labels=0, inputs=1),
    "a subset": Subset(Samples(), range(11)),
}


def inputs(data):
    """The rows [k, 2] of a part, however it is held."""
    data, place = (data.loader, 1) if isinstance(data, imu.Data) else (data, 0)
    if isinstance(data, Subset):
        samples = [data[i] for i in range(len(data))]
        return torch.stack([s["image"] if isinstance(s, dict) else s[place] for s in samples])
    return torch.as_tensor(data["image"] if isinstance(data, dict) else data[place])


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_every_form_is_split_alike_into_its_own_kind(data):
    chosen = torch.isin(Y, torch.tensor([0, 2]))
    drawn, kept = (inputs(part) for part in imu.split((X, Y), fraction=0.3, seed=5))
    wanted = [
        (dict(classes=[0, 2]), X[chosen], X[~chosen]),
        (dict(classes=1), X[Y == 1], X[Y != 1]),
        (dict(indices=[7, 2]), X[[7, 2]], X[[0, 1, 3, 4, 5, 6, 8, 9, 10]]),
        (dict(indices=np.array([3])), X[[3]], X[torch.arange(11) != 3]),
        (dict(fraction=0.3, seed=5), drawn, kept),
    ]
    for how, forget, retain in wanted:
        parts = imu.split(data, **how)
        for part, truth in zip(parts, (forget, retain), strict=True):
            torch.testing.assert_close(inputs(part), truth)
            inner = part.loader if isinstance(part, imu.Data) else part
            own = data.loader if isinstance(data, imu.Data) else data
            assert type(inner) is (Subset if isinstance(own, Dataset) else type(own))
            assert not isinstance(part, imu.Data) or part.labels == data.labels
    assert len(drawn) == 3 and len(kept) == 8
    assert sorted([*drawn[:, 0].tolist(), *kept[:, 0].tolist()]) == X[:, 0].tolist()


def test_what_is_split_is_what_the_library_reads():
    model = nn.Linear(2, 3)
    for data in (FORMS["said"], FORMS["a dataset of pairs"]):
        forget, retain = imu.split(data, classes=1)
        assert imu.evaluate(model, forget)["n"] == 4 and imu.evaluate(model, retain)["n"] == 7


def test_a_draw_is_its_seed_and_no_other_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = imu.split((X, Y), fraction=0.5)[0][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, imu.split((X, Y), fraction=0.5, seed=0)[0][0])
    assert not torch.equal(first, imu.split((X, Y), fraction=0.5, seed=1)[0][0])


def test_a_dataset_is_read_for_its_classes_alone():
    data = Samples()
    imu.split(data, fraction=0.5)
    imu.split(data, indices=[1])
    assert data.read == 0
    imu.split(data, classes=1)
    assert data.read == 11


REFUSED = {
    "none": ((X, Y), {}, "none of classes, fraction and indices; pass exactly one"),
    "two": ((X, Y), dict(classes=1, fraction=0.5), "has classes and fraction; pass exactly one"),
    "seed": ((X, Y), dict(classes=1, seed=0), "seed=0: classes draws nothing"),
    "a seed below 0": ((X, Y), dict(fraction=0.5, seed=-1), "seed=-1"),
    "no such class": ((X, Y), dict(classes=[1, 7]), r"no label is 7; there are \[0, 1, 2\]"),
    "no classes": ((X, Y), dict(classes=[]), r"classes=\[\] must be one class index"),
    "a name": ((X, Y), dict(classes="cat"), "classes='cat' must be"),
    "a flag": ((X, Y), dict(classes=True), "classes=True must be"),
    "all classes": ((X, Y), dict(classes=[0, 1, 2]), "forgets all 11 samples"),
    "all": ((X, Y), dict(fraction=1.0), r"fraction=1.0 must lie in \(0, 1\)"),
    "nearly all": ((X, Y), dict(fraction=0.99), "fraction=0.99 forgets all 11"),
    "less than one": ((X, Y), dict(fraction=0.01), "fraction=0.01 of 11 samples is none"),
    "not finite": ((X, Y), dict(fraction=float("nan")), "fraction=nan"),
    "beyond": ((X, Y), dict(indices=[0, 11]), r"11 is outside \[0, 11\)"),
    "from the end": ((X, Y), dict(indices=[-1]), r"-1 is outside \[0, 11\)"),
    "twice": ((X, Y), dict(indices=[4, 4]), "has 4 twice"),
    "a mask": ((X, Y), dict(indices=Y == 1), "must be integers.*nonzero"),
    "no indices": ((X, Y), dict(indices=[]), "is empty; name what"),
    "a number": ((X, Y), dict(indices=3), "must be integers"),
    "a loader": (DataLoader(TensorDataset(X, Y)), dict(classes=1), r"split\(loader.dataset"),
    "batches": ([(X, Y)], dict(classes=1), "data is a list; pass tensors or arrays"),
    "one array": (X, dict(classes=1), "data is a Tensor"),
    "other lengths": ((X, Y[:4]), dict(classes=1), r"\[11, 4\] rows"),
    "nothing": ((X[:0], Y[:0]), dict(classes=1), "data is empty"),
    "three parts": ((X, X, Y), dict(classes=1), "tuple of 3 parts.*imu_fast.Data"),
    "no label": ({"image": X}, dict(classes=1), r"keys \['image'\], none of a label"),
    "two labels": ({"x": X, "y": Y, "label": Y}, dict(classes=1), "'label' and 'y'"),
    "real labels": ((X, Y.double()), dict(classes=1), "classes needs one integer each"),
    "rows of labels": ((X, X.long()), dict(classes=1), "classes needs one integer each"),
    "a sample's": (TensorDataset(X, X.long()), dict(classes=1), r"label of sample 0 has shape"),
}


@pytest.mark.parametrize(("data", "how", "message"), REFUSED.values(), ids=REFUSED)
def test_the_rest_is_refused_by_name(data, how, message):
    with pytest.raises(imu.InputError, match=message):
        imu.split(data, **how)
