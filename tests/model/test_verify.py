"""The claim that a layer's output is ``act W^T + b``: kept by rounding, broken by anything more."""

import pytest
import torch
from memory import peak
from torch import nn

from imu_fast.model.head import linear_layers
from imu_fast.model.verify import deviation

WIDTHS = [(1, 1), (3, 2), (40, 16), (64, 17), (64, 1000)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def made(d, classes, dtype=torch.float32, bias=True, rows=33):
    torch.manual_seed(d + classes)
    model = nn.Sequential(nn.Linear(d, classes, bias=bias)).to(dtype)
    act = torch.randn(rows, d).to(dtype)
    return linear_layers(model)["0"], act, model(act).detach()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d, classes", WIDTHS)
def test_rounding_is_no_deviation(d, classes, bias, dtype):
    for scale in (1.0, 1e-3, 100.0):
        layer, act, _ = made(d, classes, dtype, bias)
        act = act * scale
        assert not deviation(layer, act, layer.module(act).detach())


@pytest.mark.parametrize("relative", [1e-4, -1e-4, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("d, classes", WIDTHS)
def test_one_output_that_is_off_is_found_wherever_it_is(d, classes, relative):
    layer, act, out = made(d, classes)
    size = act.norm(dim=1)[:, None] * layer.weight.norm(dim=1)
    for column in {0, classes // 2, classes - 1}:
        off = out.clone()
        off[7, column] += relative * size[7, column]
        said = deviation(layer, act, off)
        if relative == relative and abs(relative) <= 1:
            assert f"output {column} of row 7" in said
        else:  # what is not finite in the logits is told by what reads them
            assert not said or f"output {column} of row 7" in said


@pytest.mark.parametrize("d, classes", [w for w in WIDTHS if w[1] > 1])
def test_what_adds_up_to_nothing_is_found(d, classes):
    """A group of outputs is compared as one sum: errors that cancel in a plain one do not."""
    layer, act, out = made(d, classes)
    size = (act.norm(dim=1)[:, None] * layer.weight.norm(dim=1)).amax()
    opposite = torch.ones(classes)
    opposite[1::2] = -1
    for error in (opposite, torch.ones(classes), torch.eye(classes)[0] - torch.eye(classes)[1]):
        assert "off by" in deviation(layer, act, out + 1e-4 * size * error)


def test_every_output_scaled_is_found():
    layer, act, out = made(64, 1000)
    assert "off by" in deviation(layer, act, out * 1.001)


def test_a_weight_is_not_copied():
    """That of a vocabulary is most of a language model."""
    layer, act, out = made(256, 40_000, bias=False, rows=4)
    assert peak(lambda: deviation(layer, act, out)) < layer.weight.nbytes / 4
