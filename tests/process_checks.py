"""What processes of one group check, and how samples are shared among them."""

from __future__ import annotations

from imu_fast.errors import InputError

# How many of n samples each process has, by the size of the group.
SHARES = {2: [(0.0, 0.4, 1.0), (0.0, 1.0, 1.0)], 4: [(0.0, 0.2, 0.2, 0.5, 1.0)]}


def same(found, truth, what, bound=1e-10):
    """To rounding, relative to the largest."""
    found, truth = found.detach(), truth.detach()
    assert found.shape == truth.shape, (what, found.shape, truth.shape)
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    error = float((found - truth).abs().max()) if truth.numel() else 0.0
    assert error <= bound * max(scale, 1e-30), f"{what}: {error:.3g} of {scale:.3g}"


def refused(call, message, kind=InputError):
    try:
        call()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def share_of(n, cut, rank):
    places = [round(part * n) for part in cut]
    return slice(places[rank], places[rank + 1])
