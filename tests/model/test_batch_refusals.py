"""Data that cannot be read, or not in the way that is asked for, is refused by name."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import pytest
import torch
from batch_data import CLASSES, DAMPING, N, Net, TwoInputs, data, oracle
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.model.batches import split_batch


def test_labels_that_are_no_class_indices():
    model, (x, y, _) = Net(), data()
    hot = nn.functional.one_hot(y, CLASSES)
    for labels, message in (
        (y.float(), r"dtype torch.float32; pass integer class indices: labels.long\(\)"),
        (y.bool(), r"torch.bool.*labels.long\(\)"),
        (hot, r"labels (have shape \(14, 5\), logits \(14, 5\)|of shape \(5,\)); .*one label per"),
        (y[:, None, None], r"one label per (row|sample)"),
        ([str(v) for v in y.tolist()], "labels are a list of str; pass integer class indices"),
        (y + 1, r"labels\[\d+\]=5 is outside \[0, 5\)"),
    ):
        for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
            with pytest.raises(InputError, match=message):
                door(model, [(x, labels)])
        with pytest.raises(InputError, match=message):
            imu.unlearn(model, [(x, labels)], scope="all")
    soft = r"one-hot or soft labels, which are not supported.*argmax\(-1\)"
    for scope in ("head", "all"):
        with pytest.raises(InputError, match=soft):
            imu.unlearn(model, [(x, hot.float())], scope=scope)
    with pytest.raises(InputError, match=soft):
        imu.evaluate(model, [(x, hot.float())])
    torch.testing.assert_close(
        imu.influence_scores(model, [(x, hot.float())]), imu.influence_scores(model, [(x, y)])
    )


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (3, "pass a DataLoader"),
        ("folder", "is no data"),
        (open, "call it and pass what it returns"),
        (torch.zeros(3, 6), "one array without labels"),
        ({"train": [1], "test": [2]}, "keys .'test', 'train'.*no arrays|must be 'labels'"),
        ({"train": "x"}, "no arrays under them"),
        ((torch.zeros(3, 6), torch.zeros(2, dtype=torch.int64)), r"lengths \[3, 2\]"),
        ({"x": torch.zeros(3, 6), "labels": torch.zeros(2)}, r"lengths \[3, 2\]"),
        ([{"x": torch.zeros(3, 6)}], "one must be 'labels' or 'label'"),
        ([torch.zeros(3, 6)], r"pass \(inputs, labels\)"),
        (["a.png"], r"batch is a str; pass \(inputs, labels\)"),
        ([(torch.zeros(3, 6), {"boxes": torch.zeros(3)})], "second part of a batch has keys"),
        (
            [{"x": torch.zeros(3, 6), "label": torch.zeros(3), "target": torch.zeros(3)}],
            r"'label' and 'target'.*say which: imu_fast.Data\(loader, labels",
        ),
        ([(torch.zeros(3, 6), None)], "labels are a NoneType"),
        ([(torch.zeros(3, 6), (torch.zeros(3), torch.zeros(3)))], "labels are a tuple of Tensor"),
        ([(torch.zeros(3, 6), "a", "b")], "none of them can be the labels"),
        ([(torch.zeros(3, 6), torch.arange(3), 2)], "one sample or a batch"),
        (imu.Data([(torch.zeros(3, 6), torch.arange(3))], labels=2), "labels=2 is not in a batch"),
        (imu.Data([{"x": torch.zeros(3, 6)}], labels="y"), "labels='y' is not in a batch"),
        (imu.Data([(torch.arange(3), torch.zeros(3, 6))], labels=0), "say inputs= as well"),
    ],
)
def test_what_cannot_be_read_is_refused(loader, message):
    for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
        with pytest.raises(InputError, match=message):
            door(Net(), loader)


def test_two_inputs_of_which_one_is_missing():
    x, y, _ = data()
    with pytest.raises(InputError, match=r"takes 2 inputs \(x, z\), a batch has 1"):
        imu.influence_scores(TwoInputs(), (x, y))
    with pytest.raises(InputError, match=r"fits the model in none of 1 ways"):
        imu.influence_scores(Net(), [{"image": x, "mask": x, "label": y}])
    with pytest.raises(InputError, match=r"fits the model in none of 1 ways.*mat1"):
        imu.influence_scores(Net(), [(torch.arange(N), x, y)])
    with pytest.raises(InputError, match=r"keys \['x'\] besides 'label'.*takes \['x', 'z'\]"):
        imu.influence_scores(TwoInputs(), [{"x": x, "label": y}])
    with pytest.raises(InputError, match="none of them can be the labels"):
        imu.influence_scores(TwoInputs(), (x, y, ["f"] * N))


def test_bad_selections():
    with pytest.raises(InputError, match="is a Data already"):
        imu.Data(imu.Data([], labels=1), labels=1)
    with pytest.raises(InputError, match="say where the labels are"):
        imu.Data([], inputs=0)
    with pytest.raises(InputError, match="labels is a function"):
        imu.Data([], labels=len)


def test_batches_that_cannot_be_cut_are_refused_where_they_must_be():
    """Sequences first: the samples are the second axis, which only a dataset can say."""

    class First(Net):
        def forward(self, x):
            return self.logits(x.mean(0))

    model, (x, y, _) = First(), data()
    batches = [(x[None].repeat(3, 1, 1), y)]
    want = oracle(model, x, y)
    torch.testing.assert_close(
        imu.influence_scores(model, batches, damping=DAMPING).double(), want, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match="whose first axis is not the samples'"):
        imu.unlearn(model, batches, scope="all", batch_size=5, on_empty="uniform")
    assert split_batch((x, y), Net()).n == N
    with pytest.raises(InputError, match="model=None"):
        split_batch((x, y))


class Opaque:
    """A batch of another library: no tensor, but it can move itself."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return Opaque(self.x.to(device), self.y)


def test_batches_of_other_libraries():
    class OfOpaque(Net):
        def forward(self, batch):
            return self.logits(batch.x)

    model, (x, y, _) = OfOpaque(), data()
    batches = imu.Data([Opaque(x, y)], inputs=lambda batch: batch, labels=lambda batch: batch.y)
    got = imu.influence_scores(model, batches, damping=DAMPING)
    torch.testing.assert_close(got.double(), oracle(model, x, y), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="a Opaque, which cannot be cut into samples"):
        imu.unlearn(model, batches, scope="all", batch_size=5, on_empty="uniform")


def test_mappings_keep_their_kind():
    class Strict(Net):
        def forward(self, batch):
            assert isinstance(batch, Mapping) and type(batch) is collections.UserDict
            return self.logits(batch["a"])

    model, (x, y, _) = Strict(), data()
    batch = (collections.UserDict(a=x), y)
    got = imu.influence_scores(model, [batch], damping=DAMPING)
    torch.testing.assert_close(got.double(), oracle(model, x, y), rtol=1e-4, atol=1e-5)
    assert torch.equal(batch[0]["a"], x)
