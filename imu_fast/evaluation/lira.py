"""Was a sample trained on? The likelihood-ratio attack, LiRA (Carlini et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imu_fast.errors import InputError, check_choice, check_finite_rows, check_tensor
from imu_fast.model.outputs import Outputs, check_outputs

_VARIANCES = ("auto", "global", "sample")
# Below this many models the spread is estimated over all samples together, as the paper does.
_FEW = 64


def scaled_confidence(outputs: Outputs) -> Tensor:
    """``log(p_y / (1 - p_y))`` of each sample, float64 [n]: near a normal distribution over models.

    Of logits, ``z_y - logsumexp of the others``, so that it does not saturate.

    Raises:
        InputError: logits are not finite, or of fewer than two classes.
    """
    check_outputs("outputs", outputs)
    check_finite_rows("outputs.logits", outputs.logits)
    z = outputs.logits.double()
    if z.shape[1] < 2:
        raise InputError("outputs have one class: p_y is 1 whatever was trained on")
    own = outputs.labels[:, None]
    others = z.scatter(1, own, -math.inf)
    return z.gather(1, own)[:, 0] - others.logsumexp(dim=1)


def lira(
    target: Tensor, out: Tensor, inside: Tensor | None = None, *, variance: str = "auto"
) -> Tensor:
    """How much likelier each sample was trained on than not, by models that were and were not.

    Args:
        target: :func:`scaled_confidence` of the attacked model, [n].
        out: the same of m models that were not trained on the sample, [m, n]; NaN where a model
            was, so that each sample may have other models.
        inside: of k models that were, [k, n], NaN likewise. None: the offline attack.
        variance: of the normal distributions over models: ``"sample"``: each sample's own, from
            two models or more; ``"global"``: one for all samples, the mean within them; ``"auto"``:
            global for fewer than 64 models.

    Returns:
        float64 [n], larger: likelier a member. Online the log-likelihood ratio
        ``log N(t; mu_in, s_in) - log N(t; mu_out, s_out)``; offline ``(t - mu_out) / s_out``, of
        which the paper's score is the normal distribution function. NaN for a sample without
        two models of a kind.

    Raises:
        InputError: shapes do not match, infinite values, no spread to be had.
    """
    check_choice("variance", variance, _VARIANCES)
    check_tensor("target", target, "real", "[n]")
    if target.dim() != 1 or not bool(torch.isfinite(target).all()):
        raise InputError(f"target has shape {tuple(target.shape)} or is not finite; pass [n]")
    t = target.detach().double()
    mean, spread = (part.to(t.device) for part in _normal("out", out, len(t), variance))
    if inside is None:
        return (t - mean) / spread
    mean_in, spread_in = (v.to(t.device) for v in _normal("inside", inside, len(t), variance))
    return _log_density(t, mean_in, spread_in) - _log_density(t, mean, spread)


def _log_density(t: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Of the normal distribution, but for a constant."""
    return -((t - mean) ** 2) / (2 * spread**2) - spread.log()


def _normal(name: str, values: Tensor, n: int, variance: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over models, [n] each; NaN where there are too few."""
    check_tensor(name, values, "real", "[models, n]")
    if values.dim() != 2 or values.shape[1] != n or bool(values.isinf().any()):
        raise InputError(
            f"{name} has shape {tuple(values.shape)} or is infinite; pass [models, {n}], NaN where "
            "a model does not count for a sample"
        )
    x = values.detach().double()
    count = (~x.isnan()).sum(dim=0)
    # From a value of theirs: the mean of equal ones is that value, where x.nanmean() may round.
    top = x.nan_to_num(-math.inf).amax(dim=0) if len(x) else x.new_zeros(n)
    mean = (top + (x - top).nanmean(dim=0)).where(count > 1, math.nan)
    squares = ((x - mean) ** 2).nansum(dim=0)
    if variance == "auto":
        variance = "global" if len(x) < _FEW else "sample"
    if variance == "sample":
        spread = (squares / (count - 1)).sqrt().where(count > 1, math.nan)
    else:
        free = int((count - 1).clamp_min(0).sum())
        if free == 0:
            raise InputError(
                f"{name}: no sample has two models, so their spread is unknown; pass more models"
            )
        spread = (squares.sum() / free).sqrt().expand(n)
    if bool((spread == 0).any()):
        raise InputError(f"{name}: models agree exactly, so there is no spread; pass other models")
    return mean, spread
