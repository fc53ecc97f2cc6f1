"""The kernels against reference.py.

test_kernels_interpreted.py runs this file on CPU tensors, test_kernels_gpu.py on a GPU's.
Half-precision operands are compared with the reference of the same rounded numbers, so what is left
is the kernel's float32 accumulation and, on a GPU, what its matrix units cut off.
"""

from __future__ import annotations

import importlib

import cases
import pytest
import torch
from cases import (
    ASCENT_RATES,
    CASES,
    IDS,
    Case,
    ascent_arguments,
    check_conjugate_gradient,
    factors_of,
    positive_systems,
)

import imu_fast as imu
from imu_fast import reference
from imu_fast.backend import interpreted, record_backends, use_backend
from imu_fast.kernels.specialisation import dots
from imu_fast.ops.bilinear_scores import bilinear_scores, quadratic_scores
from imu_fast.ops.conjugate_gradient import iterate, start
from imu_fast.ops.fisher_diagonal import fisher_diagonal
from imu_fast.ops.ggn_product import ggn_product
from imu_fast.ops.gram import gram
from imu_fast.ops.head_ascent import head_ascent
from imu_fast.ops.linear_softmax import Head, normaliser, residual
from imu_fast.ops.objective import LABEL_OBJECTIVES
from imu_fast.ops.softmax_residual import softmax_residual
from imu_fast.precision import PRECISIONS, ROUNDING, precision_of, use_precision

# Beside the shared cases: larger than a tile of 16, and than a shipped one, on every axis.
MEDIUM = Case("larger than a small tile on every axis", (1,) * 37, 35, 33)
TOKENS = Case("ragged, larger than a small tile on every axis", (19, 1, 0, 33), 18, 33)
LARGE = Case("larger than a tile on every axis", (1,) * 150, 140, 139)
RAGGED = Case("ragged, larger than a tile on every axis", (70, 1, 0, 33), 75, 67)
ALL = [*CASES, MEDIUM, TOKENS]
every_case = pytest.mark.parametrize("case", ALL, ids=[*IDS, MEDIUM.why, TOKENS.why])
LARGER = Case("several tiles and pieces on every axis", (1,) * 1031, 523, 389)
LARGER_RAGGED = Case("ragged, several tiles and pieces", (257, 1, 0, 130, 65, 3, 200), 301, 263)
# Shipped tiles; the second pair takes no time on a GPU alone.
LARGE_CASES = [LARGE, RAGGED] + ([] if interpreted() else [LARGER, LARGER_RAGGED])
large_cases = pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.why)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _triton():
    device = torch.device("cpu" if interpreted() else "cuda")
    with device, use_backend("triton"), record_backends() as used:
        yield used
        for other in ("mean_gradient", "damped_cholesky_solve"):  # torch's, and a library's
            used.pop(other, None)
        assert set(used.values()) <= {"triton"}, used


# Of those that have tiles of their own; "bf16" has those of TF32.
TILED = ["ieee", "tf32x3", "tf32"] + ([] if interpreted() else ["bf16"])


@pytest.fixture(params=TILED)
def precision(request):
    """The interpreter multiplies exactly in all of them, and reaches the tiles of each."""
    with use_precision(request.param):
        yield request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Set a kernel's configurations so that the shared cases' small shapes cross its tiles.

    A case of many rows crosses tiles of 64 rows as well, in a quarter of the interpreter's time.
    """

    def shrink(kernel: str, case: Case) -> None:
        module = importlib.import_module(f"imu_fast.kernels.{kernel}")
        rows = 64 if sum(case.lengths) > 1000 else 16
        for table in ("CONFIGS", "TOKEN_CONFIGS", "OUT_CONFIGS"):
            configs = getattr(module, table, {})
            for key, entry in configs.items():
                small = {k: 16 if k.startswith("BLOCK_") else v for k, v in entry.items()}
                small |= {"BLOCK_N": rows} if "BLOCK_N" in entry else {}
                monkeypatch.setitem(configs, key, small)

    return shrink


def assert_close(actual, truth, length, scale=None, dtype=torch.float32):
    """cases.assert_close, wider where the kernel's products of ``dtype`` round their operands."""
    rounding = 0.0 if interpreted() else ROUNDING[precision_of([dtype])]
    cases.assert_close(actual, truth, length, scale, rounding)


def assert_repeats(first, again):
    """Bit for bit; the interpreter runs one program after another and cannot do otherwise."""
    if not interpreted():
        assert torch.equal(first, again())


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, neither contiguous nor starting at the first element."""
    padded = tensor.new_full((2 * tensor.shape[0] + 1, tensor.shape[1] + 3), torch.nan)
    view = padded[1::2, 2:-1]
    view.copy_(tensor)
    return view


@every_case
@every_dtype
def test_softmax_residual(case, dtype):
    p = case.make(torch.float64)
    logits = strided(p.logits.to(dtype))
    scale = p.scale.float()
    delta, loss = softmax_residual(logits, p.labels, scale)
    true_delta, true_loss = reference.softmax_residual(logits, p.labels, scale)
    size = float(logits.abs().max())
    assert_close(delta, true_delta, case.classes + int(size))
    assert_close(loss, true_loss, case.classes + int(size))
    assert delta.dtype == loss.dtype == torch.float32


def test_softmax_residual_over_300_000_classes():
    logits, labels = 5 * torch.randn(2, 300_000), torch.tensor([7, 299_999])
    delta, loss = softmax_residual(logits, labels)
    true_delta, true_loss = reference.softmax_residual(logits, labels, torch.ones(2))
    assert_close(delta, true_delta, 300_000)
    assert_close(loss, true_loss, 100)
    others = delta.clone()
    others[torch.arange(2), labels] = 0
    torch.testing.assert_close(others.sum(1), -delta[torch.arange(2), labels])


def test_residual_of_the_label_keeps_its_digits():
    logits = torch.tensor([[20.0, 0.0], [0.4, 0.0], [-1.0, 3.0], [80.0, 0.0]])
    labels = torch.zeros(4, dtype=torch.int64)
    delta, loss = softmax_residual(logits, labels)
    e = torch.exp(-logits.double().diff(dim=1).flatten().neg())
    torch.testing.assert_close(delta[:, 0].double(), -e / (1 + e), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), torch.log1p(e), rtol=1e-5, atol=0)


def test_ignored_labels_get_zero():
    delta, loss = softmax_residual(torch.randn(3, 5), torch.tensor([1, -100, 2]))
    assert not delta[1].any() and loss[1] == 0 and delta[0].any()


@every_case
@every_dtype
def test_fisher_diagonal(case, dtype, small_tiles):
    small_tiles("fisher_diagonal", case)
    delta, act, offsets, has_bias = factors_of(case, dtype)
    truth = reference.fisher_diagonal(delta, act, offsets, has_bias)
    size = float((delta.abs().max() * (act.abs().max() + 1)) ** 2) * max(case.lengths)
    found = fisher_diagonal(strided(delta), strided(act), offsets, has_bias)
    assert found.dtype == dtype
    assert_close(found, truth, len(delta), size)


@large_cases
def test_fisher_diagonal_in_shipped_tiles(case, precision):
    delta, act, offsets, has_bias = factors_of(case, torch.float32)
    truth = reference.fisher_diagonal(delta, act, offsets, has_bias)
    size = float((delta.abs().max() * act.abs().max()) ** 2) * max(case.lengths)
    found = fisher_diagonal(delta, act, offsets, has_bias)
    assert_close(found, truth, len(delta), size)
    assert_repeats(found, lambda: fisher_diagonal(delta, act, offsets, has_bias))


def scores_arguments(case, dtype, many):
    """Strided operands, and the size of the sums of magnitudes that a score is."""
    delta, act, offsets, has_bias = factors_of(case, dtype)
    x = torch.randn(many, case.classes, case.features + has_bias).to(dtype)
    size = float(delta.abs().sum(1).max() * x.abs().max()) * float(act.abs().max() + 1)
    size *= case.features * max(case.lengths)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return (strided(delta), strided(act), x, offsets, has_bias), max(size, 1e-30)


@every_case
@every_dtype
def test_bilinear_scores(case, dtype, small_tiles):
    small_tiles("bilinear_scores", case)
    args, size = scores_arguments(case, dtype, 3)
    found = bilinear_scores(*args)
    assert found.dtype == dtype
    length = case.classes + case.features
    assert_close(found, reference.bilinear_scores(*args), length, size)
    one = (*args[:2], args[2][1], *args[3:])
    assert_close(bilinear_scores(*one), reference.bilinear_scores(*one), length, size)


@large_cases
def test_bilinear_scores_in_shipped_tiles(case, precision):
    args, size = scores_arguments(case, torch.float32, 2)
    found = bilinear_scores(*args)
    assert_close(found, reference.bilinear_scores(*args), case.classes + case.features, size)
    assert_repeats(found, lambda: bilinear_scores(*args))


@pytest.mark.parametrize("case", [c for c in ALL if set(c.lengths) == {1}], ids=lambda c: c.why)
@every_dtype
def test_quadratic_scores_of_images(case, dtype, small_tiles):
    small_tiles("bilinear_scores", case)
    (delta, act, x, *rest), _ = scores_arguments(case, dtype, 1)
    args = (delta, act, x[0], *rest)
    size = float(delta.square().sum(1).max() * x.abs().max() * (act.abs().max() + 1) ** 2)
    found = quadratic_scores(*args)
    truth = reference.quadratic_scores(*args)
    size = max(size * case.features, 1e-30)
    assert_close(found, truth, case.classes + case.features, size)


def gram_arguments(case, dtype):
    delta, act, offsets, has_bias = factors_of(case, dtype)
    size = float((delta.abs().sum(1).max() * (act.abs().max() + 1)) ** 2) * case.features
    size *= max(case.lengths) ** 2
    return (strided(delta), strided(act), offsets, has_bias), max(size, 1e-30)


@pytest.mark.parametrize("case", [c for c in ALL if len(c.lengths) < 1000], ids=lambda c: c.why)
@every_dtype
def test_gram(case, dtype, small_tiles):
    small_tiles("gram", case)
    args, size = gram_arguments(case, dtype)
    k = gram(*args)
    assert k.dtype == dtype and torch.equal(k, k.T)
    assert_close(k, reference.gram(*args), case.classes + case.features, size)


@large_cases
def test_gram_in_shipped_tiles(case, precision):
    args, size = gram_arguments(case, torch.float32)
    k = gram(*args)
    assert_close(k, reference.gram(*args), case.classes + case.features, size)
    assert torch.equal(k, k.T)
    assert_repeats(k, lambda: gram(*args))


# A signal in float32 beside inputs of half precision, as factors of such a model are.
MIXED = [(case, half, "auto") for case in (MEDIUM, TOKENS, CASES[8]) for half in DTYPES[1:]]
MIXED += [(CASES[1], torch.bfloat16, asked) for asked in PRECISIONS]


@pytest.mark.parametrize("case, half, asked", MIXED, ids=str)
def test_a_float32_signal_beside_half_inputs(case, half, asked, small_tiles):
    """Against the definition of the same numbers; in the precision that is asked for."""
    for kernel in ("fisher_diagonal", "bilinear_scores", "gram", "ggn_product"):
        small_tiles(kernel, case)
    delta, act, offsets, has_bias = factors_of(case, torch.float32)
    act = act.to(half)
    wide = act.float()
    x = torch.randn(2, case.classes, case.features + has_bias)
    length, tokens = case.classes + case.features, max(case.lengths)
    big = float(act.abs().max()) + 1
    size = float(delta.abs().sum(1).max()) * big * case.features * tokens
    p = torch.softmax(torch.randn(len(delta), case.classes), dim=1)
    scale = torch.ones(len(delta))
    rest = (x, len(offsets) - 1, 0.1, has_bias)
    calls = {
        fisher_diagonal: ((delta, act, offsets, has_bias), float(delta.abs().max()) ** 2 * big**2),
        bilinear_scores: ((delta, act, x, offsets, has_bias), size * float(x.abs().max())),
        gram: ((delta, act, offsets, has_bias), size**2),
        ggn_product: ((p, scale, act, *rest), float(x.abs().max()) * big**2 * case.features * 2),
    }
    if set(case.lengths) == {1}:
        args = (delta, act, x[0].abs(), offsets, has_bias)
        calls[quadratic_scores] = args, size**2 * float(x.abs().max())
    by_default = "bf16" if half == torch.bfloat16 else "tf32"
    for operation, (args, bound) in calls.items():
        with use_precision(asked), record_backends() as ran:
            found = operation(*args)
        own = "ieee" if operation is ggn_product else by_default  # as its vectors are
        wanted = own if asked == "auto" else asked
        assert ran.precisions == {operation.name: wanted}
        define = ggn_truth if operation is ggn_product else getattr(reference, operation.name)
        truth = define(*(wide if arg is act else arg for arg in args))
        assert found.dtype == torch.float32
        rounding = 0.0 if interpreted() else ROUNDING[ran.precisions[operation.name]]
        cases.assert_close(found, truth, len(delta) + length, max(bound * tokens, 1e-30), rounding)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "asked, kind, squared",
    [
        *(("ieee", "half", "ieee"), ("tf32x3", "half", "tf32x3"), ("tf32", "half", "tf32")),
        ("bf16", "half", "half or bf16"),
    ],
)
def test_half_operands_are_multiplied_as_they_are_and_their_squares_no_coarser(
    half, asked, kind, squared
):
    squares = squared if asked != "bf16" else {torch.bfloat16: "half"}.get(half, "bf16")
    assert dots(asked, half, half).kind == kind
    assert dots(asked, half, half, squared=True).kind == squares
    wide = dots(asked, torch.float32, half)
    assert wide.kind == asked
    assert wide.dtype == (torch.bfloat16 if asked == "bf16" else torch.float32)


def ggn_arguments(case, dtype, many):
    """p and act in ``dtype``, V [many, C, D] in float32, and the size of the product's terms."""
    p = case.make(torch.float64)
    probabilities = torch.softmax(p.logits, dim=1).to(dtype)
    v = torch.randn(case.classes, many, case.features + p.has_bias).transpose(0, 1)
    act = strided(p.act.to(dtype))
    size = float(v.abs().max() * (act.abs().max() + 1) ** 2) * case.features * 2
    args = (strided(probabilities), p.scale.to(dtype), act, v, len(case.lengths), 0.1, p.has_bias)
    return args, size, len(act) + case.features + case.classes


def ggn_truth(p, scale, act, v, *rest):
    return torch.stack([reference.ggn_product(p, scale, act, vj, *rest) for vj in v])


@every_case
@every_dtype
def test_ggn_product(case, dtype, small_tiles):
    small_tiles("ggn_product", case)
    args, size, length = ggn_arguments(case, dtype, 2)
    found = ggn_product(*args)
    assert found.dtype == torch.float32
    assert_close(found, ggn_truth(*args), length, size)
    one = (*args[:3], args[3][0], *args[4:])
    assert_close(ggn_product(*one), reference.ggn_product(*one), length, size)


@large_cases
def test_ggn_product_in_shipped_tiles(case, precision, monkeypatch):
    kernel = importlib.import_module("imu_fast.kernels.ggn_product")
    args, size, length = ggn_arguments(case, torch.float32, 2)
    whole = ggn_product(*args)
    assert_close(whole, ggn_truth(*args), length, size)
    assert_repeats(whole, lambda: ggn_product(*args))
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 70 * 2 * case.classes)
    assert_close(ggn_product(*args), ggn_truth(*args), length, size)


# Within a block; several pieces, the last one short; pieces of several blocks.
@pytest.mark.parametrize("block, pieces", [(64, 4), (16, 4), (4, 2)])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradient(block, pieces, preconditioned, monkeypatch):
    kernel = importlib.import_module("imu_fast.kernels.conjugate_gradient")
    monkeypatch.setattr(kernel, "BLOCK", block)
    monkeypatch.setattr(kernel, "PIECES", pieces)
    check_conjugate_gradient((3, 5, 7), preconditioned, torch.float32)


def test_a_system_that_has_ended_stands_still():
    """Bit for bit: the second is zero, the third's curvature negative."""
    matrix, v, _ = positive_systems((3, 6), torch.float32)
    v[1] = 0
    sign = torch.tensor([1.0, 1.0, -1.0])[:, None]
    state = start(v, v, tolerance=1e-6)
    for _ in range(3):
        state = iterate(state, sign * (state.p @ matrix))
        assert state.moving.tolist() == [True, False, False]
    assert not state.x[1:].any() and torch.equal(state.p[1:], v[1:])
    assert state.x[0].any()


def check_head_ascent(case, dtype, name, rates=ASCENT_RATES):
    """One step, on a GPU made twice, from operands whose rows are apart."""
    operands, length, size = ascent_arguments(case, dtype, name)
    true_theta, true_buffer, true_loss = reference.head_ascent(*operands, **rates)
    features, labels, weights, theta, buffer, *options = operands
    runs = []
    for _ in range(1 if interpreted() else 2):
        state = strided(theta), strided(buffer) if rates["momentum"] else None
        args = (strided(features), labels, weights, *state, *options)
        runs.append((head_ascent(*args, **rates), *state))
    loss, found, found_buffer = runs[0]
    assert_close(found, true_theta, length, size, dtype)
    if rates["momentum"]:
        assert_close(found_buffer, true_buffer, length, size, dtype)
    assert_close(loss, true_loss, length, float(theta.abs().sum()) + size, dtype)
    for again in runs[1:]:
        assert torch.equal(loss, again[0]) and torch.equal(found, again[1])


@pytest.mark.parametrize("name", LABEL_OBJECTIVES)
@pytest.mark.parametrize("case", [c for c in ALL if c.classes > 1], ids=lambda c: c.why)
@every_dtype
def test_head_ascent(case, dtype, name, small_tiles):
    small_tiles("head_ascent", case)
    check_head_ascent(case, dtype, name)


@pytest.mark.parametrize("name", LABEL_OBJECTIVES)
def test_head_ascent_in_shipped_tiles(name, precision):
    check_head_ascent(LARGE, torch.float32, name)


def test_head_ascent_without_momentum_and_of_one_class():
    check_head_ascent(MEDIUM, torch.float32, "ce", ASCENT_RATES | dict(momentum=0.0, alpha=0.0))
    check_head_ascent(CASES[3], torch.float32, "ce")


def linear_softmax_case(case, dtype):
    """A head whose operands are strided, its float64 truth, and the length of its sums."""
    p = case.make(torch.float64)
    head = Head(
        strided(p.act.to(dtype)),
        strided(p.weight.to(dtype)),
        None if p.bias is None else p.bias.to(dtype),
        p.labels,
        p.scale.float(),
    )
    bias = 0 if head.bias is None else head.bias.double()
    logits = head.features.double() @ head.weight.double().T + bias
    truth = reference.softmax_residual(logits, head.labels, head.scale)
    size = float(logits.abs().max())
    return head, p.offsets, truth, case.classes + int((case.features + 3) * size), size


def in_slabs(head, known, slab):
    """The residual of all classes, so many at a time."""
    classes = len(head.weight)
    cuts = [slice(c, min(c + slab, classes)) for c in range(0, classes, slab)]
    return torch.cat([residual(head, known, cut) for cut in cuts], dim=1)


@every_case
@every_dtype
def test_linear_softmax_residual(case, dtype, small_tiles):
    small_tiles("linear_softmax", case)
    head, _, (delta, loss), length, size = linear_softmax_case(case, dtype)
    known = normaliser(head)
    found = in_slabs(head, known, 20)
    assert_close(found, delta, length)
    assert_close(known.loss, loss, length, max(size, 1.0))


@large_cases
def test_linear_softmax_residual_in_shipped_tiles(case, precision):
    head, _, (delta, loss), length, size = linear_softmax_case(case, torch.float32)
    known = normaliser(head)
    found = in_slabs(head, known, 100)
    # Of rounded operands the error is that of a logit, a sum of d products.
    scale = case.features**0.5 if precision != "ieee" else None
    assert_close(found, delta, length, scale)
    assert_close(known.loss, loss, length, max(size, 1.0))
    for i, first in enumerate(known):
        assert_repeats(first, lambda i=i: normaliser(head)[i])


@pytest.mark.parametrize("case", [MEDIUM, TOKENS], ids=[MEDIUM.why, TOKENS.why])
def test_linear_softmax_scores(case):
    """All kernels together."""
    head, offsets, *_ = linear_softmax_case(case, torch.float32)
    factors = imu.GradientFactors.from_head(*head[:4], offsets, implicit=True)
    scores = imu.influence_scores(factors, damping=0.1)
    truth, true_loss = reference.linear_softmax_scores(head, offsets, 0.1, "add")
    torch.testing.assert_close(scores.double(), truth, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(factors.known.loss.double(), true_loss, rtol=1e-4, atol=1e-6)


def test_what_a_kernel_cannot_take_is_in_pytorch_and_recorded(_triton):
    with record_backends() as ran:
        f = factors_of(MEDIUM, torch.float64)
        assert_close(fisher_diagonal(*f), reference.fisher_diagonal(*f), len(f[0]))
        delta, act, offsets, has_bias = factors_of(TOKENS, torch.float32)
        quadratic_scores(delta, act, torch.ones(18, 34), offsets, has_bias)
    assert ran == {"fisher_diagonal": "torch", "quadratic_scores": "torch"}
    assert "torch.float64" in ran.reasons["fisher_diagonal"]
    assert "square of a sum" in ran.reasons["quadratic_scores"]
    _triton.clear()
