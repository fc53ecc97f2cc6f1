"""The mean gradient's operands, and the reference against autograd."""

from __future__ import annotations

import torch
from cases import Call, every_case, factors_of

from imu_fast import reference


def operands(case, dtype):
    f = factors_of(case, dtype)
    return Call(f, len(f[0]), [float(f[0].abs().max() * f[1].abs().max())])


OPERANDS = {"mean_gradient": {"": operands}}


@every_case
def test_reference_gradients_are_autograds(case):
    """sample_gradients against one autograd gradient per sample of the mean token loss."""
    p = case.make(torch.float64)
    delta, losses = reference.softmax_residual(p.logits, p.labels, p.scale)
    g = reference.sample_gradients(delta, p.act, p.offsets, p.has_bias)
    weight = torch.cat([p.weight, p.bias[:, None]], 1) if p.has_bias else p.weight
    spans = zip(p.offsets[:-1].tolist(), p.offsets[1:].tolist(), strict=True)
    for i, (start, stop) in enumerate(spans):
        if start == stop:
            assert not g[i].any()
            continue
        theta = weight.clone().requires_grad_()
        logits = reference.augment(p.act[start:stop], p.has_bias) @ theta.T
        loss = torch.nn.functional.cross_entropy(logits, p.labels[start:stop])
        expected = torch.autograd.grad(loss, theta)[0]
        torch.testing.assert_close(g[i], expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(losses[start:stop].sum(), loss.detach())
