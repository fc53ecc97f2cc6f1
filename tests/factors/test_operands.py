"""Arrays, mapped files and lists where tensors are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES, head_factors

import imu_fast as imu
from imu_fast.errors import InputError


def test_factors_of_arrays_and_of_a_mapped_file(tmp_path):
    p, whole = CASES[7].make(torch.float64), head_factors(CASES[7])
    mapped = np.memmap(tmp_path / "x", np.float64, "w+", shape=tuple(p.act.shape))
    mapped[:] = p.act.numpy()
    mapped.flush()
    mapped = np.memmap(tmp_path / "x", np.float64, "r", shape=tuple(p.act.shape))
    rest = p.weight.numpy()[:, ::-1][:, ::-1], p.bias.tolist(), p.labels.numpy()
    factors = imu.GradientFactors.from_head(mapped, *rest, p.offsets.tolist(), implicit=False)
    assert factors.act.data_ptr() == torch.from_numpy(np.asarray(mapped)).data_ptr()
    assert torch.equal(factors.delta, whole.delta)
    given = imu.GradientFactors(whole.delta.numpy(), mapped, whole.offsets.numpy(), True)
    assert torch.equal(imu.influence_scores(given), imu.influence_scores(whole))
    big = p.act.numpy().astype(">f8")
    assert torch.equal(imu.GradientFactors.from_head(big, *rest, p.offsets).delta, whole.delta)


def test_weights_of_arrays_and_lists():
    scores = torch.tensor([-1.0, 2.0, -3.0], dtype=torch.float64)
    for given in (scores.numpy(), scores.tolist()):
        for found, truth in zip(
            imu.influence_weights(given), imu.influence_weights(scores), strict=True
        ):
            assert torch.equal(found, truth)


@pytest.mark.parametrize("value", ["text", None, {"x": 1}, np.array(["a"]), [["a"]]])
def test_what_is_no_numbers_is_refused(value):
    with pytest.raises(InputError, match="features"):
        imu.GradientFactors.from_head(value, torch.ones(2, 2), None, torch.tensor([0]))


def test_masked_entries_are_refused():
    scores = np.ma.masked_array([-1.0, 2.0], mask=[True, False])
    with pytest.raises(InputError, match="scores has masked entries"):
        imu.influence_weights(scores)
