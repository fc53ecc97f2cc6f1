"""Data in every form people have it: the right scores, in the loader's order, or an InputError."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types

import pytest
import torch
from batch_data import (
    CLASSES,
    DAMPING,
    WIDTH,
    N,
    Net,
    Pairs,
    Stream,
    TwoInputs,
    as_list,
    check,
    data,
    halves,
    oracle,
    scores_of_both_doors,
)
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Subset,
    TensorDataset,
)

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.model.batches import ForgetSet


class Optional(Net):
    """As models of transformers: everything optional, by name."""

    def forward(self, x=None, z=None, labels=None, **kwargs):
        assert labels is None and not kwargs
        return self.logits(x if z is None else x + z)


class TakesDict(Net):
    def forward(self, batch):
        return self.logits(batch["a"])


class Loss(Net):
    """Computes a loss of its own, so it must have the labels."""

    def forward(self, x, labels):
        assert labels.dtype == torch.int64
        return {"loss": 0.0, "logits": self.logits(x)}


Named = collections.namedtuple("Named", "x y")


Anonymous = collections.namedtuple("Anonymous", "first second")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    label: torch.Tensor


class DuckTyped:
    """A dataset that inherits from nothing."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i >= N:
            raise IndexError
        x, y, _ = data()
        return x[i], int(y[i])


class Arrow:
    """What is read of a ``datasets.Dataset``, which gives plain lists; it can be iterated, too."""

    features = ("x", "label")

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y, _ = data()
        return {"x": x[i].tolist(), "label": int(y[i]), "text": "t"}

    def __iter__(self):
        return (self[i] for i in range(N))


Arrow.__module__ = "datasets.arrow_dataset"


class SameMemory:
    """Fills the same tensors again for each batch."""

    def __iter__(self):
        x, y, _ = data()
        held, labels = torch.empty(7, WIDTH), torch.empty(7, dtype=torch.int64)
        for start in (0, 7):
            yield held.copy_(x[start : start + 7]), labels.copy_(y[start : start + 7])


FORMS = {
    "tensors": lambda x, y: (x, y),
    "a list of tensors": lambda x, y: [x, y],
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "numpy of float64": lambda x, y: (x.double().numpy(), y.numpy().astype("int16")),
    "a list of labels": lambda x, y: (x, y.tolist()),
    "labels [n, 1]": lambda x, y: (x, y[:, None]),
    "lists of tensors": lambda x, y: (list(x), list(y)),
    "a list of single labels": lambda x, y: (x, list(y)),
    "uint8 labels": lambda x, y: (x, y.to(torch.uint8)),
    "int8 labels": lambda x, y: (x, y.to(torch.int8)),
    "int32 labels": lambda x, y: (x, y.to(torch.int32)),
    "a dict of columns": lambda x, y: {"x": x, "labels": y},
    "a UserDict of columns": lambda x, y: collections.UserDict(x=x, label=y),
    "batches": lambda x, y: halves(lambda a, b: (a, b)),
    "list batches": lambda x, y: halves(lambda a, b: [a, b]),
    "dict batches": lambda x, y: halves(lambda a, b: {"x": a, "target": b}),
    "dict batches, y": lambda x, y: halves(lambda a, b: {"x": a, "y": b}),
    "dict batches, one input of another name": lambda x, y: halves(
        lambda a, b: {"image": a, "label": b}
    ),
    "dict batches with metadata": lambda x, y: halves(
        lambda a, b: {"x": a, "labels": b, "idx": torch.arange(len(a)), "name": ["f"] * len(a)}
    ),
    "mapping proxies": lambda x, y: halves(
        lambda a, b: types.MappingProxyType({"x": a, "labels": b})
    ),
    "namedtuples": lambda x, y: halves(Named),
    "namedtuples of other names": lambda x, y: halves(Anonymous),
    "dataclasses": lambda x, y: halves(Record),
    "(x, {'labels': y})": lambda x, y: halves(lambda a, b: (a, {"labels": b})),
    "({'x': x}, y)": lambda x, y: halves(lambda a, b: ({"x": a}, b)),
    "({'x': x}, y) in whole": lambda x, y: ({"x": x}, y),
    "nested columns": lambda x, y: {"x": x, "labels": y, "more": {"idx": torch.arange(len(x))}},
    "(x, y, index)": lambda x, y: halves(lambda a, b: (a, b, torch.arange(len(a)))),
    "(x, y, names)": lambda x, y: halves(lambda a, b: (a, b, ["f"] * len(a))),
    "(x, names, y)": lambda x, y: halves(lambda a, b: (a, ["f"] * len(a), b)),
    "(x, y, weights, index)": lambda x, y: halves(
        lambda a, b: (a, b, torch.rand(len(a)), torch.arange(len(a)))
    ),
    "a generator of batches": lambda x, y: iter(halves(lambda a, b: (a, b))),
    "batches in the same memory": lambda x, y: SameMemory(),
    "a tuple of batches": lambda x, y: tuple(halves(lambda a, b: (a, b))),
    "samples": lambda x, y: list(zip(x, y, strict=True)),
    "samples with plain labels": lambda x, y: list(zip(x, y.tolist(), strict=True)),
    "samples of numpy": lambda x, y: list(zip(x.numpy(), y.numpy(), strict=True)),
    "samples of lists": lambda x, y: list(zip(x.tolist(), y.tolist(), strict=True)),
    "dict samples": lambda x, y: [
        {"x": a, "label": b, "name": "f"} for a, b in zip(x, y.tolist(), strict=True)
    ],
    "samples with an index": lambda x, y: [
        (a, b, i) for i, (a, b) in enumerate(zip(x, y.tolist(), strict=True))
    ],
    "a generator of samples": lambda x, y: zip(x, y, strict=True),
    "a TensorDataset": lambda x, y: TensorDataset(x, y),
    "a Subset": lambda x, y: Subset(TensorDataset(x.flip(0), y.flip(0)), range(N - 1, -1, -1)),
    "a ConcatDataset": lambda x, y: ConcatDataset(
        [TensorDataset(x[:3], y[:3]), TensorDataset(x[3:], y[3:])]
    ),
    "a dataset": lambda x, y: Pairs(lambda a, b, i: (a, int(b))),
    "a dataset of dicts": lambda x, y: Pairs(lambda a, b, i: {"x": a, "label": int(b), "n": "f"}),
    "a dataset of (x, y, index)": lambda x, y: Pairs(lambda a, b, i: (a, b, i)),
    "a dataset without a base": lambda x, y: DuckTyped(),
    "an IterableDataset": lambda x, y: Stream(),
    "an IterableDataset of batches": lambda x, y: Stream(batched=True),
    "a dataset of the datasets library": lambda x, y: Arrow(),
    "a loader": lambda x, y: DataLoader(TensorDataset(x, y), 4),
    "a loader of a dataset of dicts": lambda x, y: DataLoader(
        Pairs(lambda a, b, i: {"x": a, "label": b, "name": str(i)}), 4
    ),
    "a loader of (x, y, index)": lambda x, y: DataLoader(Pairs(lambda a, b, i: (a, b, i)), 4),
    "a loader of an IterableDataset": lambda x, y: DataLoader(Stream(), 4),
    "a loader without batches of an IterableDataset": lambda x, y: DataLoader(
        Stream(batched=True), batch_size=None
    ),
    "a loader without batches": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=None),
    "a loader whose items are batches": lambda x, y: DataLoader(
        halves(lambda a, b: (a, b)), batch_size=None
    ),
    "a loader that does not collate": lambda x, y: DataLoader(
        TensorDataset(x, y), 4, collate_fn=as_list
    ),
    "a loader of workers": lambda x, y: DataLoader(TensorDataset(x, y), 4, num_workers=1),
    "a batch sampler": lambda x, y: DataLoader(
        TensorDataset(x, y), batch_sampler=[[0, 1, 2], list(range(3, N))]
    ),
    "Data by index": lambda x, y: imu.Data(
        halves(lambda a, b: (torch.arange(len(a)), b, a)), inputs=2, labels=1
    ),
    "Data by key": lambda x, y: imu.Data(
        halves(lambda a, b: {"pixels": a, "fine": b, "coarse": b // 2}),
        inputs="pixels",
        labels="fine",
    ),
    "Data by keyword": lambda x, y: imu.Data(
        halves(lambda a, b: (torch.arange(len(a)), b, a)), inputs={"x": -1}, labels=1
    ),
    "Data by functions": lambda x, y: imu.Data(
        halves(lambda a, b: types.SimpleNamespace(x=a, y=b)),
        inputs=lambda batch: batch.x,
        labels=lambda batch: batch.y,
    ),
    "Data, labels alone, by key": lambda x, y: imu.Data(
        halves(lambda a, b: {"x": a, "fine": b, "label": b // 2}), labels="fine"
    ),
    "Data, labels alone, by index": lambda x, y: imu.Data(
        halves(lambda a, b: (a, b, torch.arange(len(a)))), labels=1
    ),
    "Data of a dataset": lambda x, y: imu.Data(
        Pairs(lambda a, b, i: (i, a, int(b))), inputs=1, labels=2
    ),
    "Data of a loader": lambda x, y: imu.Data(
        DataLoader(Pairs(lambda a, b, i: (i, a, int(b))), 4), inputs=1, labels=2
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_scores_of_the_oracle(form):
    model, (x, y, _) = Net(), data()
    want = oracle(model, x, y)
    make = FORMS[form]
    got = imu.influence_scores(model, make(x, y), damping=DAMPING)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    result = imu.unlearn(
        model, make(x, y), epochs=1, damping=DAMPING, on_empty="uniform", inplace=False
    )
    torch.testing.assert_close(result.scores.double(), want, rtol=1e-4, atol=1e-5)
    # Sample by sample, as ascent reads them.
    forget, rows = ForgetSet(make(x, y), 4, model), [11, 0, 5, 5, 9]
    parts = forget.get(rows)
    torch.testing.assert_close(parts.labels.flatten(), y[rows])
    torch.testing.assert_close(model(*parts.args, **parts.kwargs), model(x[rows]))
    found = imu.evaluate(model, make(x, y))
    logits = model(x).detach()
    assert found["n"] == N
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))


TWO = {
    "tensors": (TwoInputs, lambda x, y, z: (x, z, y)),
    "batches": (TwoInputs, lambda x, y, z: [(x, z, y)]),
    "metadata after the labels": (TwoInputs, lambda x, y, z: [(x, z, y, torch.arange(N))]),
    "a list of inputs": (TwoInputs, lambda x, y, z: [([x, z], y)]),
    "a dict": (TwoInputs, lambda x, y, z: [{"z": z, "x": x, "label": y}]),
    "a dict and labels": (TwoInputs, lambda x, y, z: [({"z": z, "x": x}, y)]),
    "a dict and a dict": (TwoInputs, lambda x, y, z: [({"x": x, "z": z}, {"labels": y})]),
    "labels beside an input": (TwoInputs, lambda x, y, z: [(x, {"labels": y, "z": z})]),
    "optional inputs": (Optional, lambda x, y, z: (x, z, y)),
    "optional inputs, a dict": (Optional, lambda x, y, z: [{"x": x, "z": z, "label": y}]),
    "optional inputs, a dict and labels": (Optional, lambda x, y, z: [({"x": x, "z": z}, y)]),
    "a namedtuple": (
        TwoInputs,
        lambda x, y, z: [collections.namedtuple("B", "one two label")(x, z, y)],
    ),
    "samples": (TwoInputs, lambda x, y, z: list(zip(x, z, y, strict=True))),
    "Data": (TwoInputs, lambda x, y, z: imu.Data([(y, z, x)], inputs=[2, 1], labels=0)),
}


@pytest.mark.parametrize("form", TWO)
def test_several_inputs(form):
    kind, make = TWO[form]
    model, (x, y, z) = kind(), data()
    check(model, make(x, y, z), oracle(model, x, y, z))


def test_the_model_is_asked_where_its_signature_does_not_say():
    """One input and an index, or two inputs? Only one of the two has labels that fit."""
    model, (x, y, _) = Optional(), data()
    index = torch.arange(100, 100 + N)
    check(model, [(x, y, index)], oracle(model, x, y))
    with pytest.raises(InputError, match=r"can be read in 2 ways.*imu_fast\.Data\(loader"):
        # One label per sample either way, and the model takes both.
        both = nn.Linear(WIDTH, CLASSES)
        both.forward = lambda x, z=None: nn.functional.linear(x, both.weight, both.bias)
        imu.capture(both, [(x, y, y % 2)])
    check(model, imu.Data([(x, y, y % 2)], inputs=0, labels=1), oracle(model, x, y))


def test_labels_are_no_input_of_a_model_that_may_have_them():
    class MayHaveLabels(Net):
        def forward(self, x, labels=None):
            return self.logits(x)

    model, (x, y, _) = MayHaveLabels(), data()
    check(model, [(x, y, y % 2)], oracle(model, x, y))


def test_a_model_that_takes_the_whole_batch():
    model, (x, y, _) = TakesDict(), data()
    want = oracle(model, x, y)
    check(model, [({"a": x}, y)], want)
    check(model, [{"a": x, "labels": y}], want)
    check(model, [{"a": x, "b": y, "labels": y}], want)


def test_a_model_that_must_have_the_labels_gets_them():
    model, (x, y, _) = Loss(), data()
    want = oracle(model, x, y)
    check(model, (x, y.int()), want)
    check(model, [{"x": x, "labels": y.int()}], want)
    check(model, [(x, y, torch.arange(100, 100 + N))], want)


def test_a_mask_is_never_left_out():
    """Tokens, labels and mask: a causal model runs on the first alone, but should not."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc = nn.Embedding(30, 8), nn.Linear(8, 30)

        def forward(self, ids, mask=None):
            return self.fc(self.emb(ids) if mask is None else self.emb(ids) * mask[..., None])

    ids = torch.randint(0, 30, (4, 7))
    mask = (torch.arange(7) < 5).long().expand(4, 7)
    labels = ids.masked_fill(mask == 0, -100)
    for batch in ((ids, labels, mask), (ids, labels, mask, torch.arange(4))):
        with pytest.raises(InputError, match=r"can be read in 2 ways|may be a mask"):
            imu.influence_scores(Tagger(), [batch])
    data = imu.Data([(ids, labels, mask)], inputs={"ids": 0, "mask": 2}, labels=1)
    assert imu.influence_scores(Tagger(), data).shape == (4,)
    one = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))
    with pytest.raises(InputError, match="part 2, of its inputs' shape, may be a mask"):
        imu.influence_scores(one, [(ids, labels, mask)])


def test_wrapped_models_have_the_signature_of_what_they_wrap():
    model, (x, y, z) = TwoInputs(), data()
    want = oracle(model, x, y, z)
    assert torch.allclose(
        imu.influence_scores(nn.DataParallel(model), [(x, z, y, y)], damping=DAMPING).double(),
        want,
        rtol=1e-4,
        atol=1e-5,
    )


def test_batch_encodings():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        num_labels=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(1, 40, (6, 7))
    mask = (torch.arange(7) < torch.tensor([3, 7, 5, 2, 6, 4])[:, None]).long()
    y = torch.tensor([0, 4, 2, 1, 3, 0])
    want = imu.influence_scores(model, [{"input_ids": ids, "attention_mask": mask, "labels": y}])
    unmasked = imu.influence_scores(model, [{"input_ids": ids, "labels": y}])
    assert not torch.allclose(want, unmasked)
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    rows = [
        {"input_ids": i, "attention_mask": m, "label": int(c)}
        for i, m, c in zip(ids, mask, y, strict=True)
    ]
    for loader in (
        (ids, mask, y),
        DataLoader(TensorDataset(ids, mask, y), 4),
        [(ids, mask, y, torch.arange(6))],
        [transformers.BatchEncoding({**encoding, "labels": y})],
        transformers.BatchEncoding({**encoding, "label": y}),
        [(encoding, y)],
        rows,
        [{k: v.tolist() if torch.is_tensor(v) else v for k, v in row.items()} for row in rows],
        DataLoader(rows, 2, collate_fn=transformers.default_data_collator),
        imu.Data([(y, ids, mask)], inputs={"input_ids": 1, "attention_mask": 2}, labels=0),
    ):
        for got in scores_of_both_doors(model, loader):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


class Padded(nn.Module):
    """Takes tokens of any number, 0 being none."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(30, 8, padding_idx=0), nn.Linear(8, 4)

    def forward(self, input_ids):
        mask = (input_ids != 0)[..., None]
        return self.fc((self.emb(input_ids) * mask).sum(1) / mask.sum(1))


def ragged():
    """Batches of different widths, and the same samples padded to one."""
    batches = [
        {"input_ids": torch.randint(1, 30, (n, t)), "labels": torch.randint(0, 4, (n,))}
        for n, t in ((5, 3), (4, 9), (3, 3), (2, 6))
    ]
    wide = torch.cat(
        [nn.functional.pad(b["input_ids"], (0, 9 - b["input_ids"].shape[1])) for b in batches]
    )
    return batches, (wide, torch.cat([b["labels"] for b in batches]))


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("reweight", ["once", "batch"])
def test_batches_of_different_widths(scope, reweight):
    """Each batch, and each list of samples, padded to a length of its own, or not at all."""
    model, (batches, whole) = Padded(), ragged()
    options = dict(
        scope=scope, reweight=reweight, epochs=2, batch_size=5, lr=0.1, on_empty="uniform"
    )
    want = imu.unlearn(copy.deepcopy(model), whole, **options)
    samples = [
        {"input_ids": ids, "labels": int(label)}
        for b in batches
        for ids, label in zip(b["input_ids"], b["labels"], strict=True)
    ]
    for loader in (batches, samples, DataLoader(samples, 5, collate_fn=as_list)):
        trained = copy.deepcopy(model)
        got = imu.unlearn(trained, loader, **options)
        torch.testing.assert_close(got.scores, want.scores, rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(trained.parameters(), want.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_pieces_and_order_of_different_widths():
    model, (batches, (wide, labels)) = Padded(), ragged()
    forget = ForgetSet(batches, 5, model)
    assert forget.n == 14 and len(forget) == 4
    rows = [13, 0, 6, 10, 4, 1]
    pieces = forget.pieces(rows)
    assert sorted(at for _, places in pieces for at in places) == list(range(6))
    assert len(pieces) == 3  # widths 6, 3 (of two batches) and 9
    for parts, places in pieces:
        for k, place in enumerate(places):
            ids = parts.kwargs["input_ids"][k]
            assert torch.equal(ids, wide[rows[place], : len(ids)])
            assert parts.labels[k] == labels[rows[place]]
    in_order = torch.cat([parts.labels for parts in forget.subset(rows)])
    assert torch.equal(in_order, labels[rows])
    with pytest.raises(InputError, match="3 different shapes"):
        forget.get(rows)
