"""Operands of the head's ascent gradient and of whole steps, and torch's SGD."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from cases import ASCENT_RATES, CASES, Call, ascent_arguments

from imu_fast import reference, use_backend
from imu_fast.errors import InputError
from imu_fast.ops import head_ascent as file
from imu_fast.ops.extension import load
from imu_fast.ops.head_ascent import head_ascent, head_ascent_gradient, head_logits
from imu_fast.ops.objective import LABEL_OBJECTIVES, NEEDS_AUXILIARY, OBJECTIVES

HAS = load() is not None
WAYS = [
    pytest.param("extension", marks=pytest.mark.skipif(not HAS, reason="no compiled module")),
    "torch",
]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(file, "loaded_for", lambda tensor: None)
    return request.param


def operands(case, dtype, name, buffer):
    """A whole step, which changes theta and its buffer; results: the loss, then these two."""
    if case.classes == 1:
        return None
    args, length, size = ascent_arguments(case, dtype, name)
    theta = args[3]
    named = ASCENT_RATES
    if not buffer:
        args, named = (*args[:4], None, *args[5:]), ASCENT_RATES | dict(momentum=0.0)
    sizes = [float(theta.abs().sum()) + size, size, size]
    return Call(args, length, sizes, named, changes=(3, 4))


def gradient_operands(case, dtype, name):
    if case.classes == 1:
        return None
    (features, labels, weights, theta, _, *options), length, size = ascent_arguments(
        case, dtype, "ce"
    )
    auxiliary = None
    if name in NEEDS_AUXILIARY:
        own = torch.nn.functional.cross_entropy(
            features.to(theta.dtype) @ theta[:, : case.features].T, labels, reduction="none"
        )
        auxiliary = (labels + 1) % case.classes if name == "relabel" else own
    args = (features, labels, weights, theta, options[0], name, auxiliary)
    return Call(args, 4 * length, [2 * size, 2 * size * case.features])


OPERANDS = {
    "head_ascent_gradient": {name: partial(gradient_operands, name=name) for name in OBJECTIVES},
    "head_ascent": {
        **{name: partial(operands, name=name, buffer=True) for name in LABEL_OBJECTIVES},
        "ce, no momentum": partial(operands, name="ce", buffer=False),
    },
}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_in_the_dtype_of_theta(dtype, has_bias):
    features, theta = torch.randn(4, 3).to(dtype), torch.randn(5, 3 + has_bias).double()
    truth = reference.augment(features.double(), has_bias) @ theta.T
    torch.testing.assert_close(head_logits(features, theta, has_bias), truth)


def test_the_kernel_updates_float32():
    args, *_ = ascent_arguments(CASES[1], torch.float32, "ce")
    assert head_ascent.limits(*args, **ASCENT_RATES) == ""
    wide = (args[0], args[1], args[2], args[3].double(), *args[4:])
    said = "theta is torch.float64; the kernel updates float32"
    assert head_ascent.limits(*wide, **ASCENT_RATES) == said


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_head_ascent_is_torchs_sgd(way, momentum, alpha):
    args, *_ = ascent_arguments(CASES[1], torch.float64, "ce")
    features, labels, weights, theta, buffer, *options = args
    other = theta.clone()
    optimizer = torch.optim.SGD([other], lr=0.1, momentum=momentum, weight_decay=0.01)
    state = buffer.zero_() if momentum else None
    for _ in range(3):
        other.grad = head_ascent_gradient(features, labels, weights, other, *options)[0]
        other.grad += alpha * other.sign()
        optimizer.step()
        rates = ASCENT_RATES | dict(momentum=momentum, alpha=alpha)
        head_ascent(features, labels, weights, theta, state, *options, **rates)
    if way == "torch":
        assert torch.equal(theta, other)
    else:  # products are added without being rounded first, or after it
        torch.testing.assert_close(theta, other, rtol=1e-14, atol=1e-14)


def problem(n, d, classes, dtype, *, has_bias=True, size=1.0):
    generator = torch.Generator().manual_seed(n + d + classes)
    x, labels = torch.randn(n, d, generator=generator), torch.arange(n) % classes
    theta = size * torch.randn(classes, d + has_bias, generator=generator)
    return x.to(dtype), labels, theta.to(dtype)


def closest(found, exact, dtype, length):
    """Within ``length`` roundings of the largest number of a result.

    Of sums of so many terms; eight, for a logit's rounding is multiplied by the exponential's slope
    and a residual is a product of four numbers that are rounded.
    """
    for one, other in zip(found, exact, strict=True):
        size = float(other.abs().max()) + torch.finfo(dtype).tiny
        off = float((one.double() - other.double()).abs().max())
        assert off <= 8 * length * torch.finfo(dtype).eps * size, (off / size, length)


# n, batch, d, C: one of each; less and more than a vector, a tile, a strip, a block of samples.
SHAPES = [
    (1, 1, 1, 2),
    (9, 5, 3, 2),
    (40, 17, 8, 6),
    (40, 33, 15, 7),
    (70, 31, 33, 13),
    (300, 256, 64, 10),
    (600, 513, 130, 97),
    (300, 300, 271, 5),
    (20, 7, 16, 1025),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_chosen_samples_are_the_gradients(way, shape, dtype, has_bias):
    n, batch, d, classes = shape
    x, labels, theta = problem(n, d, classes, dtype, has_bias=has_bias)
    rows, weights = torch.randperm(n)[:batch], (torch.rand(batch) + 0.1).to(dtype)
    exact = reference.head_ascent_gradient(x[rows], labels[rows], weights, theta, has_bias, "ce")
    plain = file._is_plain(x, labels, weights, theta, rows)
    assert plain == (way == "extension" and classes <= 1024)
    # Rows that lie apart, and a head that does.
    apart = torch.cat([x, x], dim=1)[:, :d]
    wide = torch.cat([theta, theta], dim=1)[:, : d + has_bias]
    for features, head in ((x, theta), (apart, wide), (x.t().contiguous().t(), theta)):
        operands = (features, labels, weights, head, has_bias, "ce")
        found = head_ascent_gradient(*operands, rows=rows)
        closest(found, exact, dtype, batch + classes + d**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_at_once_are_steps_one_by_one(way, dtype, momentum):
    x, labels, theta = problem(90, 13, 6, dtype)
    rows, weights = torch.randperm(90).view(3, 30), torch.rand(3, 30).to(dtype) + 0.1
    rates = ASCENT_RATES | dict(momentum=momentum)
    exact, velocity, wanted = theta.double(), None, []
    for r, w in zip(rows, weights, strict=True):
        operands = (x[r], labels[r], w, exact, velocity, True, "ce")
        exact, velocity, loss = reference.head_ascent(*operands, **rates)
        velocity = velocity if momentum else None
        wanted.append(loss)
    found, buffer = theta.clone(), torch.zeros_like(theta) if momentum else None
    losses = head_ascent(x, labels, weights, found, buffer, True, "ce", rows=rows, **rates)
    assert losses.shape == (3,)
    closest((found, losses), (exact, torch.stack(wanted)), dtype, 60)


@pytest.mark.skipif(not HAS, reason="no compiled module: torch's sums may depend on its threads")
def test_threads_change_no_bit():
    x, labels, theta = problem(600, 513, 40, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(head_ascent_gradient(x, labels, torch.ones(600), theta, True, "ce"))
    finally:
        torch.set_num_threads(before)
    for gradient, loss in found:
        assert torch.equal(gradient, found[0][0]) and torch.equal(loss, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [3.0, 30.0, 100.0, 700.0, 1e4])
def test_a_confident_sample_keeps_its_digits(way, dtype, size):
    """Its residual is 1e-20 or 1e-300 at the label, not ``p_y - 1``."""
    theta = torch.tensor([[size], [0.0], [-size]], dtype=dtype)
    for label in range(3):
        x, labels = torch.ones(1, 1, dtype=dtype), torch.tensor([label])
        operands = (x, labels, torch.ones(1, dtype=dtype), theta, False, "ce")
        gradient, loss = head_ascent_gradient(*operands)
        logits = theta[:, 0].double()
        others = [c for c in range(3) if c != label]
        log_p = torch.log_softmax(logits, dim=0)
        residual = log_p.exp()
        residual[label] = -residual[others].sum()
        spacing = 2.0**-149 if dtype == torch.float32 else 2.0**-1074
        # One exponential, a sum of two, a quotient, a product; the exponents are exact.
        roundings = 8 * torch.finfo(dtype).eps
        off = (gradient[:, 0].double() + residual).abs()
        assert bool((off <= roundings * residual.abs() + 2 * spacing).all())
        wanted = (
            -log_p[label] if label else torch.log1p(residual[others].sum() / log_p[label].exp())
        )
        assert abs(float(loss + wanted)) <= roundings * float(wanted) + 2 * spacing


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(way, bad):
    x, labels, theta = problem(20, 9, 5, torch.float32)
    x[7, 8] = bad
    gradient, loss = head_ascent_gradient(x, labels, torch.ones(20), theta, True, "ce")
    assert not bool(torch.isfinite(loss)) and not bool(torch.isfinite(gradient[:, 8]).any())


@pytest.mark.parametrize("wrong", ["row", "negative row", "label"])
def test_a_sample_that_is_none_is_refused_before_any_step(wrong):
    if not HAS:
        pytest.skip("no compiled module: torch refuses it, in words of its own")
    x, labels, theta = problem(20, 9, 5, torch.float32)
    rows, said = torch.arange(20).view(2, 10), "labels[19]=5 is out of range; classes are 0 to 4"
    if wrong == "label":
        labels[19] = 5
    else:
        rows[1, 9] = 20 if wrong == "row" else -1
        said = f"rows[19]={int(rows[1, 9])} is out of range; there are 20 samples"
    before = theta.clone()
    operands = (x, labels, torch.ones(2, 10), theta, None, True, "ce")
    with pytest.raises(InputError, match=re.escape(said)):
        head_ascent(*operands, rows=rows, **ASCENT_RATES | dict(momentum=0.0))
    assert torch.equal(theta, before)


MISFITS = {
    "narrow features": dict(features=torch.zeros(20, 5)),
    "wide features": dict(features=torch.zeros(20, 12)),
    "features of one": dict(features=torch.zeros(20)),
    "labels": dict(labels=torch.zeros(5, dtype=torch.int64)),
    "weights": dict(weights=torch.ones(1)),
    "theta": dict(theta=torch.zeros(10)),
    "buffer": dict(buffer=torch.zeros(2, 10)),
    "rows": dict(rows=torch.zeros(2, 2, 5, dtype=torch.int64), weights=torch.ones(2, 2, 5)),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_shapes_that_do_not_fit_are_refused(way, backend, misfit):
    x, labels, theta = problem(20, 9, 5, torch.float32)
    operands = dict(features=x, labels=labels, weights=torch.ones(20), theta=theta, buffer=None)
    named = operands | dict(has_bias=True, name="ce") | misfit
    with use_backend(backend):
        with pytest.raises(InputError, match="has shape|must be"):
            head_ascent(**named, **ASCENT_RATES)
        if named.pop("buffer") is None:
            with pytest.raises(InputError, match="has shape|must be"):
                head_ascent_gradient(**named)


def test_memory_that_a_loop_cannot_take_is_torchs(way):
    """A buffer of another dtype; rows of theta that are one."""
    x, labels, theta = problem(20, 9, 5, torch.float32)
    found, wanted = theta.clone(), theta.clone()
    operands = (x, labels, torch.ones(20))
    wide = torch.zeros_like(theta, dtype=torch.float64)
    head_ascent(*operands, found, wide, True, "ce", **ASCENT_RATES)
    head_ascent(*operands, wanted, torch.zeros_like(theta), True, "ce", **ASCENT_RATES)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(RuntimeError, match="single memory location"):
        one = theta[:1].expand(5, 10)
        head_ascent(*operands, one, None, True, "ce", **ASCENT_RATES | dict(momentum=0.0))


def test_a_head_without_any_weight_has_losses(way):
    x, labels, theta = problem(20, 0, 5, torch.float32, has_bias=False)
    gradient, loss = head_ascent_gradient(x, labels, torch.ones(20), theta, False, "ce")
    assert gradient.shape == (5, 0) and float(loss) == pytest.approx(-math.log(5))


def test_what_is_written_in_place_is_counted(way):
    """Autograd refuses a product whose factor has changed; so do factors that read a head late."""
    x, labels, theta = problem(20, 9, 5, torch.float32)
    factor, buffer = torch.ones(5, 10, requires_grad=True), torch.zeros_like(theta)
    product = (factor * theta).sum() + (factor * buffer).sum()
    head_ascent(x, labels, torch.ones(20), theta, buffer, True, "ce", **ASCENT_RATES)
    assert theta._version and buffer._version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
