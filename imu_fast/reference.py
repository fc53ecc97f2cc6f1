"""The formulas of docs/mathematics.md, one short function each, in float64: the oracle.

Nothing here is fast and nothing here is shared with the fast paths; every faster implementation is
tested against these functions. Shapes: n samples, N packed tokens (N = n for images), C classes,
d features, D = d + bias, and ``offsets [n+1]`` says which tokens belong to which sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from imu_fast.reference_ggn import augment as augment
from imu_fast.reference_ggn import ekfac_matrix as ekfac_matrix
from imu_fast.reference_ggn import ggn_block_matrix as ggn_block_matrix
from imu_fast.reference_ggn import ggn_matrix as ggn_matrix
from imu_fast.reference_ggn import ggn_product as ggn_product
from imu_fast.reference_ggn import kfac_matrix as kfac_matrix
from imu_fast.reference_ggn import kronecker_factors as kronecker_factors
from imu_fast.reference_ggn import output_matrix as output_matrix

# Features [N, d], weight [C, d], bias [C] or None, labels [N], scale [N] or None.
Head = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def softmax_residual(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``delta[i] = c_i (softmax(z_i) - onehot(y_i))`` and ``loss[i] = -c_i log softmax(z_i)[y_i]``.

    Args:
        logits: [N, C]. labels: [N] in [0, C). scale: [N], the ``c_i = 1 / T_i`` of its sample.
    Returns:
        delta [N, C] and loss [N], float64; delta by autograd of the loss.
    """
    delta, losses = [], []
    for z, y, c in zip(logits.double(), labels.tolist(), scale.double(), strict=True):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            # log(1 + exp(others - z_y)), whose derivatives do not cancel where p_y is nearly one.
            others = (
                torch.cat([z[:y], z[y + 1 :]]).logsumexp(dim=0) if len(z) > 1 else z - torch.inf
            )
            loss = -c * torch.nn.functional.logsigmoid(z[y] - others).sum()
        delta.append(torch.autograd.grad(loss, z)[0])
        losses.append(loss.detach())
    if not losses:
        return logits.double(), scale.double()
    return torch.stack(delta), torch.stack(losses)


def sample_gradients(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``g_i = sum_t delta[i,t] (x) a~[i,t]``: G as [n, C, D], float64."""
    delta, act = delta.double(), augment(act.double(), has_bias)
    gradients = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        g = torch.zeros(delta.shape[1], act.shape[1], dtype=torch.float64, device=delta.device)
        for t in range(start, stop):
            g += torch.outer(delta[t], act[t])
        gradients.append(g)
    return torch.stack(gradients)


def mean_gradient(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``gbar = 1/n sum_i g_i``: [C, D], float64."""
    return sample_gradients(delta, act, offsets, has_bias).mean(dim=0)


def fisher_diagonal(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``diag(F) = 1/n sum_i g_i * g_i``: [C, D], float64."""
    g = sample_gradients(delta, act, offsets, has_bias)
    return (g * g).mean(dim=0)


def bilinear_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> Tensor:
    """``<g_i, X_j>``: x [C, D] gives [n], x [m, C, D] gives [n, m]; float64."""
    g = sample_gradients(delta, act, offsets, has_bias)
    if x.dim() == 2:
        return torch.stack([(gi * x.double()).sum() for gi in g])
    return torch.stack([torch.stack([(gi * xj).sum() for xj in x.double()]) for gi in g])


def quadratic_scores(
    delta: Tensor, act: Tensor, x: Tensor, offsets: Tensor, has_bias: bool
) -> Tensor:
    """``sum_ck X[c,k] g_i[c,k]^2``, the self-influence under a diagonal: [n], float64."""
    g = sample_gradients(delta, act, offsets, has_bias)
    return torch.stack([(gi * gi * x.double()).sum() for gi in g])


def gradient_norms(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``||g_i||^2``: [n], float64."""
    return sample_gradients(delta, act, offsets, has_bias).square().sum(dim=(1, 2))


def damped_diagonal(diagonal: Tensor, damping: float, mode: str) -> Tensor:
    """``diag + lam`` (mode "add") or ``max(diag, lam)`` (mode "clamp")."""
    return diagonal + damping if mode == "add" else diagonal.clamp_min(damping)


def influence(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool, x: Tensor) -> Tensor:
    """``influence_i = - g_i^T X`` with ``X = M^-1 v``: [n], float64."""
    return -bilinear_scores(delta, act, x, offsets, has_bias)


def influence_weights(
    scores: Tensor, top_fraction: float, clip_quantile: float, quantile_over: str = "kept"
) -> tuple[list[int], list[float]]:
    """Who has ``influence < 0``, by descending magnitude, and ``min(|influence| ** 0.5, clip)``.

    Of these as many as are at most ``top_fraction`` of them, at least one; ties keep the samples'
    order, and a fraction is known to 2^-52. ``clip``: the ``clip_quantile`` quantile of the kept
    weights, or of "all" samples' weights, which are zero where not kept.
    """
    values = scores.double().tolist()
    negative = [i for i in range(len(values)) if values[i] < 0]
    limit = Fraction(top_fraction) + Fraction(1, 2**52)
    fitting = [k for k in range(1, len(negative) + 1) if Fraction(k, len(negative)) <= limit]
    kept = sorted(negative, key=lambda i: (values[i], i))[: max(fitting, default=1)]
    weights = [math.sqrt(-values[i]) for i in kept]
    zeros = [] if quantile_over == "kept" else [0.0] * (len(values) - len(kept))
    clip = quantile(weights + zeros, clip_quantile) if kept else math.inf
    return kept, [min(w, clip) for w in weights]


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the two order statistics next to ``q (count - 1)``."""
    ordered, position = sorted(values), q * (len(values) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def objective(logits: Tensor, labels: Tensor, name: str, auxiliary: Tensor | None = None) -> Tensor:
    """``f(l_i)``, what reweighted ascent increases: [B], float64, differentiable.

    ``ce``: the cross-entropy. ``log1mp``: ``log(1 - p_y)``. ``margin``: minus the hinge
    ``max(0, z_y - max_{j != y} z_j)``. ``npo``: ``-2/beta log(1 + (p_y/p_ref)^beta)``, beta = 0.1,
    auxiliary ``-log p_ref``. ``relabel``: ``log p`` of the class that auxiliary names.
    """
    values = []
    for i, (z, y) in enumerate(zip(logits.double(), labels.tolist(), strict=True)):
        log_p = z - z.logsumexp(dim=0)
        others = torch.cat([z[:y], z[y + 1 :]])
        if name == "ce":
            values.append(-log_p[y])
        elif name == "log1mp":
            values.append(others.logsumexp(dim=0) - z.logsumexp(dim=0))
        elif name == "margin":
            values.append(-(z[y] - others.max()).clamp_min(0))
        elif name == "npo":
            assert auxiliary is not None
            ratio = (log_p[y] + auxiliary[i].double()).exp()
            values.append(-20 * torch.log(1 + ratio**0.1))
        else:
            assert auxiliary is not None
            values.append(log_p[int(auxiliary[i])])
    return torch.stack(values)


def objective_residual(
    logits: Tensor, labels: Tensor, name: str, auxiliary: Tensor | None = None
) -> Tensor:
    """``d f / d z`` of :func:`objective`, by autograd: [B, C], float64."""
    z = logits.detach().double().requires_grad_()
    with torch.enable_grad():
        total = objective(z, labels, name, auxiliary).sum()
    return torch.autograd.grad(total, z)[0]


def head_ascent_gradient(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    has_bias: bool,
    name: str,
    auxiliary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient [C, D] of ``- sum w f / sum w`` by autograd, and that loss; float64."""
    t, w = theta.detach().double().requires_grad_(), weights.double()
    with torch.enable_grad():
        logits = augment(features.double(), has_bias) @ t.T
        loss = -(w * objective(logits, labels, name, auxiliary)).sum() / w.sum()
    return torch.autograd.grad(loss, t)[0], loss.detach()


def head_ascent(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    theta: Tensor,
    buffer: Tensor | None,
    has_bias: bool,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One SGD step on ``- sum w f / sum w + alpha ||theta||_1``.

    Returns:
        theta [C, D] and momentum buffer [C, D] after the step (buffer None before it: zero), and
        the loss before it; float64.
    """
    gradient, loss = head_ascent_gradient(features, labels, weights, theta, has_bias, name)
    t = theta.detach().double()
    gradient, loss = gradient + alpha * t.sign() + weight_decay * t, loss + alpha * t.abs().sum()
    old = torch.zeros_like(gradient) if buffer is None else buffer.double()
    velocity = momentum * old + gradient
    return t - lr * velocity, velocity, loss


def conjugate_gradient(
    matrix: Tensor, v: Tensor, iterations: int, preconditioner: Tensor
) -> Tensor:
    """x after some iterations from zero (Hestenes, Stiefel 1952): [P], float64.

    Args:
        matrix: M [P, P]. v: [P]. preconditioner: about ``M^-1``, [P, P]; the identity for none.
    """
    m, inverse, r = matrix.double(), preconditioner.double(), v.double()
    x, p, rho = torch.zeros_like(r), inverse @ r, r @ inverse @ r
    for _ in range(iterations):
        step = rho / (p @ m @ p)
        x, r = x + step * p, r - step * m @ p
        rho, old = r @ inverse @ r, rho
        p = inverse @ r + rho / old * p
    return x


def conjugate_gradient_iteration(
    x: Tensor, r: Tensor, p: Tensor, mp: Tensor, moving: Tensor, inverse: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """One iteration of m systems: x, r, p [m, ...], ``r.z``, ``r.r``, step [m, 1 ...], float64.

    mp: ``M p``. moving: [m, 1 ...]; where ``p.Mp`` is not positive none moves: step zero. inverse:
    about ``M^-1``, of [m, ...].
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(dim=1).view(moving.shape)

    x, r, p, mp = (t.double() for t in (x, r, p, mp))
    rho, curvature = dot(r, inverse(r)), dot(p, mp)
    step = torch.where(moving & (curvature > 0), rho / curvature, 0.0)
    x, r = x + step * p, r - step * mp
    z = inverse(r)
    p = torch.where(step != 0, z + dot(r, z) / rho * p, p)
    return x, r, p, dot(r, z), dot(r, r), step


def gram(delta: Tensor, act: Tensor, offsets: Tensor, has_bias: bool) -> Tensor:
    """``K[i,j] = <g_i, g_j>``: [n, n], float64."""
    g = sample_gradients(delta, act, offsets, has_bias).flatten(1)
    return g @ g.T


def cross_gram(
    left: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor], has_bias: bool
) -> Tensor:
    """``<g_i, h_j>`` of two sets, each as (delta, act, offsets): [n, m], float64."""
    g, h = (sample_gradients(*one, has_bias).flatten(1) for one in (left, right))
    return g @ h.T


def linear_softmax_normaliser(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each token's logits, ``1 - p_y`` (1 where y is negative) and loss; [N]."""
    lse, others = [], []
    for z, y in zip(head_logits(*head[:3]), head[3].tolist(), strict=True):
        lse.append(z.logsumexp(dim=0))
        rest = z if y < 0 else torch.cat([z[:y], z[y + 1 :]])
        others.append(torch.exp(rest.logsumexp(dim=0) - lse[-1]))
    return torch.stack(lse), torch.stack(others), softmax_of_head(head)[1]


def softmax_of_head(head: Head) -> tuple[Tensor, Tensor]:
    """delta [N, C] and loss [N], zero where a label is negative; float64."""
    *_, labels, scale = head
    valid = (labels >= 0).double()
    scale = valid if scale is None else valid * scale
    return softmax_residual(head_logits(*head[:3]), labels.clamp_min(0), scale)


def linear_softmax_residual(head: Head, lse: Tensor, others: Tensor) -> Tensor:
    """delta [N, C] of tokens whose log-sum-exp and ``1 - p_y`` are known, of these classes and of
    others that are elsewhere, as a label >= C is; zero where it is negative; float64."""
    *_, labels, scale = head
    valid = (labels >= 0).double()
    scale = valid if scale is None else valid * scale
    delta = torch.exp(head_logits(*head[:3]) - lse.double()[:, None])
    for row, y, q in zip(delta, labels.tolist(), others.tolist(), strict=True):
        if 0 <= y < len(row):
            row[y] = -q
    return delta * scale[:, None]


def head_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``features W^T + b``: [N, C], float64."""
    logits = features.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


def linear_softmax_scores(
    head: Head, offsets: Tensor, damping: float, mode: str
) -> tuple[Tensor, Tensor]:
    """A large vocabulary by definition: scores [n] under ``fisher_diag``, and losses [N]."""
    (delta, loss), features, has_bias = softmax_of_head(head), head[0], head[2] is not None
    fisher = fisher_diagonal(delta, features, offsets, has_bias)
    x = mean_gradient(delta, features, offsets, has_bias) / damped_diagonal(fisher, damping, mode)
    return influence(delta, features, offsets, has_bias, x), loss


def margin_edit(
    features: Tensor,
    labels: Tensor,
    rivals: Tensor,
    theta: Tensor,
    has_bias: bool,
    moment: Tensor,
    margin: float,
    sweeps: int,
) -> Tensor:
    """The margin edit: ``min 1/2 tr(dT H dT^T)`` with every ``D_i (theta + dT) a~_i <= -m``.

    Cyclic coordinate ascent on the dual, each sample against its given rival. moment: H, the damped
    second moment [D, D]. Returns dT [C, D], float64.
    """
    act, inverse = augment(features.double(), has_bias), torch.linalg.inv(moment.double())
    eye = torch.eye(len(theta), dtype=torch.float64)
    push = [
        torch.outer(eye[y] - eye[r], inverse @ a)
        for y, r, a in zip(labels, rivals, act, strict=True)
    ]
    step, alpha = torch.zeros_like(theta, dtype=torch.float64), [0.0] * len(labels)
    for _ in range(sweeps):
        for i, (y, r, a) in enumerate(zip(labels, rivals, act, strict=True)):
            z, own = (theta.double() + step) @ a, push[i] @ a
            excess = z[y] - z[r] + margin
            new = max(0.0, alpha[i] + float(excess / (own[y] - own[r])))
            step = step - (new - alpha[i]) * push[i]
            alpha[i] = new
    return step
