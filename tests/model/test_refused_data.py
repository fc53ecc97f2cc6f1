"""What a model cannot take, and what is no logits: refused at every door, with the way out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import imu_fast as imu
from imu_fast.errors import InputError
from imu_fast.evaluation.shallowness import relearning_steps
from imu_fast.model.outputs import outputs_of

N, D, CLASSES = 12, 6, 4


class Net(nn.Module):
    """``last`` is done to the logits."""

    def __init__(self, last=lambda z: z):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.fc, self.last = nn.Linear(D, 9), nn.Linear(9, CLASSES), last

    def forward(self, x):
        return self.last(self.fc(self.body(x).relu()))


def data(n=N):
    torch.manual_seed(1)
    return torch.randn(n, D), torch.arange(n) % CLASSES


def forget(model, d, **reading):
    imu.unlearn(model, d, epochs=1, lr=0.1, **reading)


def forget_all(model, d, **reading):
    imu.unlearn(model, d, epochs=1, lr=0.1, scope="all", weights="uniform", **reading)


def in_turn(model, d, **reading):
    imu.unlearn_in_turn(model, {"A": data(), "B": d}, epochs=1, lr=0.1, **reading)


def tracin(model, d, **reading):
    imu.tracin(model, d, d, checkpoints=[model.state_dict()], learning_rates=0.1, **reading)


def relearn(model, d, **reading):
    relearning_steps(model, d, target=0.5, max_steps=1, **reading)


DOORS = {
    "scores": imu.influence_scores,
    "layers": lambda m, d, **r: imu.influence_scores(m, d, layers=["body"], **r),
    "capture_features": imu.capture_features,
    "evaluate": imu.evaluate,
    "outputs_of": outputs_of,
    "importance": imu.parameter_importance,
    "tracin": tracin,
    "unlearn": forget,
    "unlearn all": forget_all,
    "in turn": in_turn,
    "relearning": relearn,
}
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)

X, Y = data()
# What is given, what the message says of it, and the way out.
UNFIT = {
    "float64": ((X.double(), Y), r"float64 \[12, 6\]", r"x\.float\(\)"),
    "bytes": (((X * 20).to(torch.uint8), Y), r"uint8 \[12, 6\]", r"x\.float\(\)"),
    "complex": ((X.to(torch.complex64), Y), r"complex64 \[12, 6\]", r"x\.float\(\)"),
    "width": ((X[:, :5], Y), r"float32 \[12, 5\]", "the shape that the model was built for"),
    "swapped": ((Y, X), r"int64 \[12\] with labels float32 \[12, 6\]", r"imu_fast\.Data\(loader"),
}


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT)
@every_door
def test_what_the_model_cannot_take(door, case):
    given, said, way_out = case
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=said) as caught:
        door(model, [given])
    text = str(caught.value)
    assert "float32 on cpu" in text
    with pytest.raises(InputError, match=way_out):
        door(model, [given])
    cause = caught.value
    while isinstance(cause, InputError) and cause.__cause__ is not None:
        cause = cause.__cause__
    assert type(cause) is RuntimeError and str(cause).splitlines()[0] in text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@every_door
def test_data_without_values(door):
    with pytest.raises(InputError, match="meta device, which has no values"):
        door(Net(), [(X.to("meta"), Y)])
    with pytest.raises(InputError, match=r"body\.weight is on the meta device"):
        door(Net().to("meta"), [(X, Y)])


@every_door
def test_a_later_batch_says_where_it_begins(door):
    with pytest.raises(InputError, match="samples from 12 on: the model cannot take"):
        door(Net(), [(X, Y), (X[:, :5], Y)])


class Its(Exception):
    """An error of the user's own."""


@pytest.mark.parametrize(
    "error",
    [Its("mine"), RuntimeError("mine"), ValueError("mine"), torch.OutOfMemoryError("mine")],
    ids=lambda error: type(error).__name__,
)
@every_door
def test_what_the_model_raises_itself_passes(door, error):
    def failing(z):
        raise error

    with pytest.raises(type(error), match="^mine$") as caught:
        door(Net(failing), [(X, Y)])
    assert caught.value is error


def test_what_the_models_code_lacks_passes():
    class Incomplete(Net):
        def forward(self, x):
            return self.head(x)

    class Strict(Net):
        def forward(self, x):
            assert x.shape[1] == D + 1, "mine"
            return x

    with pytest.raises(AttributeError, match="has no attribute 'head'"):
        imu.evaluate(Incomplete(), (X, Y))
    with pytest.raises(AssertionError, match="^mine"):
        imu.evaluate(Strict(), (X, Y))


def test_memory_that_ran_out_passes():
    def failing(z):
        return torch.empty(1 << 60)

    with pytest.raises(RuntimeError, match="allocate") as caught:
        imu.evaluate(Net(failing), (X, Y))
    assert type(caught.value) is RuntimeError


class WithoutLength(torch.utils.data.Dataset):
    """Of the old kind: ended by IndexError."""

    def __getitem__(self, i):
        if i >= N:
            raise IndexError
        return X[i], int(Y[i])


@every_door
def test_a_dataset_without_a_length(door):
    with pytest.raises(InputError, match=r"WithoutLength, .*give it a __len__, or pass \[dataset"):
        door(Net(), WithoutLength())
    door(Net(), [WithoutLength()[i] for i in range(N)])


def undefined(o):
    return o["logits"]


NO_LOGITS = {
    "raises": (undefined, r"output=undefined raised IndexError: .*float32 tensor of shape"),
    "scalar": (lambda o: o.sum(), r"output=.* gives a torch.float32 tensor of shape \(\)"),
    "nothing": (lambda o: None, "output=.* gives a NoneType"),
    "an array": (lambda o: o.detach().numpy(), "output=.* gives a ndarray"),
    "classes": (lambda o: o.argmax(1), r"output=.* gives a torch.int64 tensor of shape \(12,\)"),
    "one": (lambda o: o[:, 0], r"output=.* gives .*shape \(12,\).*output=lambda o: o\[:, None\]"),
}


@pytest.mark.parametrize("case", NO_LOGITS.values(), ids=NO_LOGITS)
@every_door
def test_output_that_is_no_logits(door, case):
    output, said = case
    with pytest.raises(InputError, match=said):
        door(Net(), (X, Y), output=output)


@pytest.mark.parametrize("last", [torch.sum, lambda z: z.argmax(1), lambda z: z[:, 0]])
@every_door
def test_a_model_whose_output_is_no_logits(door, last):
    with pytest.raises(InputError, match="the model's output is a torch.*it must be the logits"):
        door(Net(last), (X, Y))


@every_door
def test_labels_of_which_none_counts(door):
    with pytest.raises(InputError, match=r"ignore_index|\(-100\)"):
        door(Net(), (X, torch.full_like(Y, -100)))


# What becomes of the logits [n, C], and what the message tells to pass.
LAYOUTS = {
    "[n, 1, C]": (lambda z: z[:, None], "o.flatten(1)"),
    "[n, C, 1, 1]": (lambda z: z[:, :, None, None], "o.flatten(1)"),
    "[C, n]": (lambda z: z.T, "o.T"),
    "[n, 3, C]": (lambda z: torch.stack([z, 2 * z, z], 1), "o[:, 0]"),
    "[n, 3, C], their mean": (lambda z: torch.stack([z] * 3, 1), "o.flatten(1, -2).mean(1)"),
    "[n, C, T]": (lambda z: torch.stack([z] * 3, 2), "o.flatten(2).mean(2)"),
    "[n, C, H, W]": (lambda z: z[:, :, None, None].repeat(1, 1, 2, 3), "o.flatten(2).mean(2)"),
}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_one_label_a_sample_and_logits_of_another_layout(case):
    last, way_out = case
    model, plain = Net(last).eval(), Net().eval()
    told = False
    for door in (imu.influence_scores, imu.evaluate, forget, DOORS["layers"]):
        with pytest.raises(InputError, match="output=") as caught:
            door(model, (X, Y))
        told |= f"output=lambda o: {way_out}" in str(caught.value) or way_out in str(caught.value)
    assert told
    output = eval(f"lambda o: {way_out}")
    scores = imu.influence_scores(model, (X, Y), output=output)
    torch.testing.assert_close(scores, imu.influence_scores(plain, (X, Y)), rtol=1e-4, atol=1e-6)
    here, there = (imu.evaluate(model, (X, Y), output=output), imu.evaluate(plain, (X, Y)))
    assert here["loss"] == pytest.approx(there["loss"])
    forget(model, (X, Y), output=output)


def test_labels_at_positions_and_logits_of_another_layout():
    x, y = torch.randn(5, 7, D), torch.randint(0, CLASSES, (5, 7))
    want = imu.influence_scores(Net(), (x, y))
    for last, way_out in (
        (lambda z: z.movedim(-1, 1), "o.movedim(1, -1)"),
        (lambda z: z.transpose(0, 1), "o.transpose(0, 1)"),
    ):
        with pytest.raises(InputError) as caught:
            imu.evaluate(Net(last), (x, y))
        assert f"output=lambda o: {way_out}" in str(caught.value)
        found = imu.influence_scores(Net(last), (x, y), output=eval(f"lambda o: {way_out}"))
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
