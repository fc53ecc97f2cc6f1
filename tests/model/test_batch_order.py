"""Samplers, loaders and iterators: scores in the order of the pass that was read."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from batch_data import (
    DAMPING,
    N,
    Net,
    Pairs,
    Stream,
    check,
    data,
    halves,
    oracle,
    scores_of_both_doors,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.model.batches import ForgetSet, as_batches, rereadable


class Order(Sampler):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


class EveryTimeAnother(Order):
    """Counts its own iterations; nothing in its name says that it shuffles."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        shift = self.passes % len(self.rows)
        return iter(self.rows[shift:] + self.rows[:shift])


class ByNumpy(Order):
    def __iter__(self):
        return iter(np.random.permutation(self.rows).tolist())


class AnotherLoader(DataLoader):
    """What it gives is not what its dataset holds."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x * 0.5, y


ROWS = [12, 4, 7, 4, 0, 9]


@pytest.mark.parametrize(
    "make",
    [
        lambda ds: DataLoader(ds, 4, sampler=Order(ROWS)),
        lambda ds: DataLoader(ds, 4, sampler=ROWS),
        lambda ds: DataLoader(ds, 4, sampler=torch.tensor(ROWS)),
        lambda ds: DataLoader(ds, batch_sampler=[ROWS[:1], ROWS[1:]]),
        lambda ds: DataLoader(ds, batch_sampler=BatchSampler(Order(ROWS), 4, False)),
        lambda ds: DataLoader(Subset(ds, ROWS), 4),
        lambda ds: DataLoader(ds, batch_size=None, sampler=Order(ROWS)),
        lambda ds: Subset(ds, ROWS),
    ],
)
def test_order_and_repetitions_are_those_of_the_loader(make, caplog):
    model, (x, y, _) = Net(), data()
    want = oracle(model, x[ROWS], y[ROWS])
    with caplog.at_level(logging.WARNING, "imu_fast"):
        check(model, make(TensorDataset(x, y)), want)
    assert not caplog.text
    forget = ForgetSet(make(TensorDataset(x, y)), 4, model)
    labels = torch.cat([parts.labels for parts in forget])
    assert torch.equal(labels, y[ROWS]) and torch.equal(forget.get(range(6)).labels, y[ROWS])


def test_a_sampler_that_can_be_read_once():
    model, (x, y, _) = Net(), data()
    forget = ForgetSet(DataLoader(TensorDataset(x, y), 4, sampler=iter(ROWS)), 4, model)
    assert forget.dataset_indices == ROWS
    for _ in range(2):
        assert torch.equal(torch.cat([parts.labels for parts in forget]), y[ROWS])


SHUFFLING = {
    "RandomSampler": lambda ds: DataLoader(ds, 4, shuffle=True),
    "RandomSampler, replacement": lambda ds: DataLoader(
        ds, 4, sampler=RandomSampler(ds, replacement=True, num_samples=20)
    ),
    "RandomSampler, generator": lambda ds: DataLoader(
        ds, 4, shuffle=True, generator=torch.Generator().manual_seed(7)
    ),
    "SubsetRandomSampler": lambda ds: DataLoader(ds, 4, sampler=SubsetRandomSampler(ROWS)),
    "WeightedRandomSampler": lambda ds: DataLoader(
        ds, 4, sampler=WeightedRandomSampler(torch.arange(N).float(), 30)
    ),
    "BatchSampler of RandomSampler": lambda ds: DataLoader(
        ds, batch_sampler=BatchSampler(RandomSampler(ds), 4, False)
    ),
    "DistributedSampler": lambda ds: DataLoader(
        ds, 4, sampler=DistributedSampler(ds, num_replicas=1, rank=0)
    ),
    "EveryTimeAnother": lambda ds: DataLoader(ds, 4, sampler=EveryTimeAnother(ROWS)),
    "BatchSampler of EveryTimeAnother": lambda ds: DataLoader(
        ds, batch_sampler=BatchSampler(EveryTimeAnother(ROWS), 4, False)
    ),
    "ByNumpy": lambda ds: DataLoader(ds, 4, sampler=ByNumpy(ROWS)),
    "a Data around it": lambda ds: imu.Data(DataLoader(ds, 4, shuffle=True), labels=1),
}


@pytest.mark.parametrize("name", SHUFFLING)
@pytest.mark.parametrize("door", ["influence_scores", "unlearn"])
def test_a_shuffling_loader_is_reported_and_scored_in_the_order_of_its_pass(name, door, caplog):
    model, (x, y, _) = Net(), data()
    loader = SHUFFLING[name](TensorDataset(x, y))
    seen = []

    def note(module, args, output):
        if len(args[0]) > 1:  # not the sample that is run alone
            seen.append(args[0].clone())

    handle = model.body.register_forward_hook(note)
    with caplog.at_level(logging.WARNING, "imu_fast"):
        if door == "unlearn":
            got = imu.unlearn(model, loader, epochs=1, on_empty="uniform", inplace=False).scores
        else:
            got = imu.influence_scores(model, loader)
    handle.remove()
    assert caplog.text.count("the loader shuffles") == 1
    read = torch.cat(seen)[: len(got)]
    rows = [int((x == row).all(1).nonzero()[0]) for row in read]
    torch.testing.assert_close(got.double(), oracle(model, x[rows], y[rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(SHUFFLING)[:6])
def test_the_next_pass_has_the_order_of_the_scores(name):
    """No generator has moved, so whoever iterates the loader afterwards finds the same samples."""
    model, (x, y, _) = Net(), data()
    loader = SHUFFLING[name](TensorDataset(x, y))
    scored, unlearned = scores_of_both_doors(model, loader)
    torch.testing.assert_close(scored, unlearned, rtol=1e-4, atol=1e-5)
    batches = list(loader)
    inputs, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    torch.testing.assert_close(scored.double(), oracle(model, inputs, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("door", [imu.influence_scores, imu.unlearn])
def test_a_sampler_is_iterated_once(door):
    model, (x, y, _) = Net(), data()
    sampler = EveryTimeAnother(ROWS)
    door(model, DataLoader(TensorDataset(x, y), 4, sampler=sampler))
    assert sampler.passes == 1


def test_a_loader_that_changes_what_it_reads_is_not_read_by_index():
    model, (x, y, _) = Net(), data()
    check(model, AnotherLoader(TensorDataset(x, y), 4), oracle(model, x * 0.5, y))


def test_what_a_loader_leaves_out_is_said_once(caplog):
    model, (x, y, _) = Net(), data()
    ds = TensorDataset(x, y)
    for door in (imu.influence_scores, imu.evaluate):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "imu_fast"):
            door(model, DataLoader(ds, 4, drop_last=True))
        assert caplog.text.count("its last 2 of 14 samples are left out") == 1
    with caplog.at_level(logging.WARNING, "imu_fast"):
        caplog.clear()
        imu.unlearn(model, DataLoader(ds, 4, drop_last=True), epochs=3, on_empty="uniform")
        assert caplog.text.count("left out") == 1
        caplog.clear()
        imu.influence_scores(model, DataLoader(ds, 7, drop_last=True))
        assert not caplog.text
        sampler = DistributedSampler(ds, num_replicas=3, rank=1, shuffle=False)
        imu.influence_scores(model, DataLoader(ds, 4, sampler=sampler))
        assert "share 1 of 3" in caplog.text and "shuffles" not in caplog.text
        caplog.clear()
        list(as_batches(DataLoader(Stream(), 4, num_workers=2), model))
        assert "samples come 2 times" in caplog.text
        caplog.clear()
        imu.influence_scores(model, halves(lambda a, b: {"x": a, "labels": b, "idx": b}))
        assert caplog.text.count("takes no idx") == 1
        caplog.clear()
        imu.influence_scores(model, halves(lambda a, b: (a, b, b)))
        assert caplog.text.count("part 1 (counted from 0) is taken for the labels") == 1
    with pytest.raises(InputError, match="drop_last=True leaves out its only batch"):
        imu.influence_scores(model, DataLoader(ds, 20, drop_last=True))


def test_dataset_indices():
    model, (x, y, _) = Net(), data()
    ds = TensorDataset(x, y)
    indices = lambda loader: ForgetSet(loader, 4, model).dataset_indices  # noqa: E731
    assert indices(DataLoader(ds, 4, sampler=ROWS)) == ROWS
    assert indices(DataLoader(ds, 4, sampler=ROWS, drop_last=True)) == ROWS[:4]
    assert indices(DataLoader(Subset(ds, ROWS), 4)) == list(range(6))
    assert indices(Pairs(lambda a, b, i: (a, b))) == list(range(N))
    assert indices((x, y)) == list(range(N))
    assert indices([(x, y)]) is None
    assert indices(AnotherLoader(ds, 4)) is None
    shuffled = ForgetSet(DataLoader(ds, 4, shuffle=True), 4, model)
    assert sorted(shuffled.dataset_indices) == list(range(N)) != shuffled.dataset_indices
    assert torch.equal(shuffled.get(range(N)).labels, y[shuffled.dataset_indices])
    kept = ForgetSet(DataLoader(ds, 4, shuffle=True), 4, model, dataset_order=True)
    assert kept.dataset_indices == list(range(N))


def test_an_iterator_is_read_once_and_never_silently_empty():
    model, (x, y, _) = Net(), data()
    batches = iter([(x[:9], y[:9]), (x[9:], y[9:])])
    want = oracle(model, x, y)
    got = imu.influence_scores(model, batches, damping=DAMPING)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    for door in (imu.influence_scores, imu.evaluate, imu.unlearn):
        with pytest.raises(InputError, match=r"empty: a list_iterator can be read once"):
            door(model, batches)
    again = rereadable(iter([(x[:9], y[:9]), (x[9:], y[9:])]), model)
    for _ in range(3):
        assert [parts.n for parts in as_batches(again, model)] == [9, 5]
    with pytest.raises(InputError, match="can be read once"):
        rereadable(iter([]), model)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_watched_and_unseen_generators_are_measured_at_every_record(scope):
    model, (x, y, z) = Net(), data()
    result = imu.unlearn(
        model,
        (x, y),
        scope=scope,
        epochs=3,
        on_empty="uniform",
        watch={"other": iter([(z, y)])},
        stop=imu.StopRule(membership_auc=0.0, unseen=iter([(z, y)])),
        inplace=False,
    )
    assert len(result.trajectory) >= 2
    assert all(0 <= entry["other_accuracy"] <= 1 for entry in result.trajectory)
