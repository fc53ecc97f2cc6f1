"""What stands between the head's output and the loss, batch by batch.

Three cases, from the most to the least that can be said:

* ``plain``: the logits are the output itself.
* ``affine``: each row of logits is ``sum_k s_k z_k + e`` of output rows z_k, with numbers s_k and
  any e: a temperature, an added bias, the mean of two heads or of positions, a choice of token.
  That is a linear head on the features ``sum_k s_k [a_k, 1]``, softmax and all.
* ``tokens``: anything else; the signal at the outputs by autograd, and no claim about curvature.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_fast.errors import InputError
from imu_fast.losses.output_curvature import StoredCurvature
from imu_fast.model.calls import Call, steps_of
from imu_fast.model.head import LinearLayer
from imu_fast.model.loss import Targets, on_logits, sample_losses
from imu_fast.model.packing import BatchPacker
from imu_fast.model.rows import Layout, Mixed, Ownership

# Operations that move numbers about and leave them as they are.
_MOVES = re.compile(
    r"^(Clone|View|UnsafeView|ReshapeAlias|Alias|Transpose|Permute|T|Squeeze|Unsqueeze|Select|Slice"
    r"|Index|IndexSelect|Gather|ToCopy|AsStrided|Movedim|Expand|Split|SplitWithSizes|Unbind)"
    r"Backward\w*$"
)


_CHUNK_ROWS = 512
_MOVED = "rows that are chosen or reordered"


def _check_finite(logits: Tensor, targets: Targets) -> None:
    """Raise InputError for NaN, infinity, or -inf at a label; other classes may be ruled out."""
    bad = (torch.isnan(logits) | (logits == torch.inf)).any(dim=-1)
    if targets.labels.dim() == 1 and not _is_smoothed(targets):
        label = logits[targets.valid].gather(1, targets.labels[:, None])[:, 0]
        bad[targets.valid] |= label == -torch.inf
    else:
        bad |= torch.isinf(logits).any(dim=-1)
    bad = bad.reshape(len(bad), -1).any(dim=1)
    if bool(bad.any()):
        raise InputError(
            f"logits are not finite at sample {int(torch.nonzero(bad)[0])} ({int(bad.sum())} of "
            f"{len(bad)} samples), or rule out its label; remove these samples or repair the model"
        )


def _is_smoothed(targets: Targets) -> bool:
    """Whether every class has a share of each label: then none can be ruled out."""
    return bool(getattr(targets.loss, "label_smoothing", 0.0))


def named_steps(names: Sequence[str]) -> list[str]:
    """Operations other than moves, by names that users know."""
    kept = [name for name in names if not _MOVES.match(name)]
    return [re.sub(r"Backward\w*$", "", name).lower() for name in kept]


@dataclass(frozen=True)
class Piece:
    """What one batch says of the head.

    Attributes:
        kind: ``plain``, ``affine`` or ``tokens``.
        act: [N, d], the features of a plain piece; otherwise [N, D], ``[a, 1]`` of each part side
            by side (without the one where the part has no bias).
        labels: of each row, as in :class:`Targets`; for tokens, of each row of the logits.
        counts: [n], rows of each sample.
        delta: [N, C], losses: [n]; None for a plain piece. curvature: of an affine one.
        exact: whether the logits are a linear head of ``act``, with nothing added.
        steps: what stands between, as a text; empty where there is nothing but moves.
    """

    kind: str
    act: Tensor
    labels: Tensor
    counts: Tensor
    delta: Tensor | None = None
    losses: Tensor | None = None
    curvature: StoredCurvature | None = None
    exact: bool = True
    steps: str = ""


def plain_piece(act: Tensor, targets: Targets) -> Piece:
    """act: [*targets.shape, d]."""
    act = act.flatten(0, -2) if bool(targets.valid.all()) else act[targets.valid]
    return Piece("plain", act, targets.labels, targets.counts)


def bias_columns(parts: Sequence[LinearLayer]) -> list[int]:
    """Which columns of ``[a, 1]`` side by side are the ones."""
    found, end = [], 0
    for part in parts:
        end += part.weight.shape[1]
        if part.bias is not None:
            found.append(end)
            end += 1
    return found


def side_by_side(blocks: Sequence[tuple[Tensor, Tensor]], parts: Sequence[LinearLayer]) -> Tensor:
    """``[a, s]`` of each part: [N, D]; blocks: act [N, d] and the scale [N] of the bias."""
    columns = []
    for (act, scale), part in zip(blocks, parts, strict=True):
        columns.append(act)
        if part.bias is not None:
            columns.append(scale[:, None].to(act))
    return torch.cat(columns, dim=1)


def _wide(*tensors: Tensor) -> torch.dtype:
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


class Between:
    """The step from the head's outputs to the logits, over the batches.

    Args:
        parts: the layers that make up the head; one, but for averaged and summed heads.
    """

    def __init__(self, parts: Sequence[LinearLayer]) -> None:
        self.parts = list(parts)
        self.affine = True
        self._ownership = Ownership(always=True)  # on so small a graph a test costs little
        self._generator = torch.Generator().manual_seed(0)

    def piece(self, calls: Sequence[Call], logits: Tensor, targets: Targets) -> Piece:
        """A batch whose logits are not simply the output.

        Args:
            calls: of the parts, each with a leaf. logits: [*targets.shape, C], their graph alive.

        Raises:
            InputError: the logits mix samples, or do not depend on the head differentiably.
        """
        _check_finite(logits.detach(), targets)
        names, _ = steps_of(logits)
        steps = ", ".join(named_steps(names))
        if self.affine:
            found = self._affine(calls, logits, targets, steps)
            if found is not None:
                return found
            self.affine = False
        return self._tokens(calls, logits, targets, steps)

    def _pulled(self, calls: Sequence[Call], logits: Tensor, signal: Tensor) -> list[Tensor]:
        """The transposed Jacobian of the logits times a signal, at each call: [..., C]."""
        targets = [call.target for call in calls]
        found = torch.autograd.grad(logits, targets, signal, retain_graph=True, allow_unused=True)
        return [call.rows(g) for call, g in zip(calls, found, strict=True)]

    def _affine(
        self, calls: Sequence[Call], logits: Tensor, targets: Targets, steps: str
    ) -> Piece | None:
        """The piece if every output row acts on its logits by one number, which a random signal r
        shows: ``J^T r = s r`` row by row.

        Where a logit is constant (a mask) it may be zero instead, if that class has no probability
        and is not the label: neither the gradient nor the curvature has anything there.
        """
        valid = targets.valid.flatten()
        rows = logits.detach().reshape(-1, logits.shape[-1])
        # Few bits, so that no dtype rounds them.
        r = torch.randint(64, 128, rows.shape, generator=self._generator).to(rows.device) / 64.0
        r *= torch.randint(2, rows.shape, generator=self._generator).to(rows.device) * 2 - 1
        r = r.to(rows.dtype) * valid[:, None]
        pulled = self._pulled(calls, logits, r.view_as(logits))
        possible = torch.ones_like(rows, dtype=torch.bool)
        if targets.labels.dim() == 1 and not _is_smoothed(targets):  # a class may be ruled out
            possible = torch.softmax(rows.to(_wide(rows)), dim=1) > 0
            labels = torch.nonzero(valid).flatten()
            possible[labels, targets.labels] = True
        scales, owners = [], []
        for pull in pulled:
            found = _scaled(pull, r, possible, targets.shape)
            if found is None:
                return None
            scales.append(found[0])
            owners.append(found[1])
        return self._as_one_head(calls, scales, owners, logits, targets, steps)

    def _as_one_head(
        self,
        calls: Sequence[Call],
        scales: Sequence[Tensor],
        owners: Sequence[Tensor],
        logits: Tensor,
        targets: Targets,
        steps: str,
    ) -> Piece:
        valid = targets.valid.flatten()
        units, kept = len(valid), torch.nonzero(valid).flatten()
        blocks = []
        made = torch.zeros_like(logits.detach().reshape(units, -1), dtype=_wide(logits))
        for part in self.parts:
            own = [k for k, call in enumerate(calls) if call.layer.name == part.name]
            if not own:  # such as an expert that none of these samples was sent to
                empty = part.weight.new_zeros(len(kept), part.weight.shape[1])
                blocks.append((empty, empty.new_zeros(len(kept))))
                continue
            acts = [calls[k].act.reshape(-1, calls[k].act.shape[-1]) for k in own]
            used = [torch.nonzero(scales[k]).flatten() for k in own]
            act = torch.cat([a[u] for a, u in zip(acts, used, strict=True)])
            scale = torch.cat([scales[k][u] for k, u in zip(own, used, strict=True)])
            owner = torch.cat([owners[k][u] for k, u in zip(own, used, strict=True)])
            out = [calls[k].layer.outputs(calls[k].out.detach()) for k in own]
            z = torch.cat([o.reshape(-1, o.shape[-1])[u] for o, u in zip(out, used, strict=True)])[
                :, : logits.shape[-1]
            ].to(made)
            made.index_add_(0, owner, z * scale[:, None].to(made))
            if bool((scale == 1).all()) and torch.equal(owner.sort().values, kept):
                # One row each: the features themselves, in the model's dtype.
                block = act[torch.argsort(owner)]
                blocks.append((block, scale.new_ones(len(kept))))
                continue
            wide = _wide(act)
            summed = act.new_zeros(units, act.shape[1], dtype=wide)
            summed.index_add_(0, owner, act.to(wide) * scale[:, None].to(wide))
            bias = act.new_zeros(units, dtype=wide).index_add_(0, owner, scale.to(wide))
            blocks.append((summed[kept], bias[kept]))
        delta, losses, curvature = sample_losses(logits, targets)
        width = self.parts[0].width
        if width > delta.shape[1]:  # classes that the logits leave out, at the end
            missing = (0, width - delta.shape[1])
            delta = torch.nn.functional.pad(delta, missing)
            curvature = curvature.map(
                lambda x: torch.nn.functional.pad(x, missing) if x.dim() == 2 else x
            )
        rows = logits.detach().reshape(units, -1)[kept].to(made)
        bound = 16 * torch.finfo(logits.dtype).eps * (rows.abs() + made[kept].abs().amax(1, True))
        exact = width == logits.shape[-1] and bool(torch.isfinite(rows).all())
        exact = exact and bool(((rows - made[kept]).abs() <= bound).all())
        moved = not steps and exact and len(self.parts) == 1
        if moved and bool((blocks[0][1] == 1).all()):
            return Piece("plain", blocks[0][0], targets.labels, targets.counts)
        signal = (delta, losses, curvature, exact, steps or _MOVED)
        columns = side_by_side(blocks, self.parts)
        return Piece("affine", columns, targets.labels, targets.counts, *signal)

    def _tokens(self, calls: Sequence[Call], logits: Tensor, targets: Targets, steps: str) -> Piece:
        n = len(targets)
        delta, losses, _ = sample_losses(logits, targets)
        signal = on_logits(delta, logits, targets)

        def backward(weights: Tensor) -> list[Tensor]:
            shape = (-1, *[1] * (logits.dim() - 1))
            return self._pulled(calls, logits, signal * weights.to(signal).view(shape))

        base = self._pulled(calls, logits, signal)
        names = [call.layer.name for call in calls]
        try:
            owners = self._ownership.owners(names, base, backward, n)
        except Mixed as mixed:
            raise InputError(
                f"head {names[mixed.call]!r}: an output of one sample changes the loss of others "
                f"(between them: {steps}); a sample has no gradient of its own there"
            ) from None
        deltas, acts, rows = [], [], []
        width = max(part.width for part in self.parts)
        for call, g, owner in zip(calls, base, owners, strict=True):
            act = call.act.reshape(-1, call.act.shape[-1])
            ones = act.new_ones(len(act))
            blocks = [
                (act, ones)
                if part.name == call.layer.name
                else (act.new_zeros(len(act), part.weight.shape[1]), torch.zeros_like(ones))
                for part in self.parts
            ]
            acts.append(side_by_side(blocks, self.parts))
            flat = g.reshape(-1, g.shape[-1])
            deltas.append(torch.nn.functional.pad(flat, (0, width - flat.shape[1])))
            rows.append(owner.flatten())
        labelled = targets.counts > 0
        pack = BatchPacker(labelled)
        part = pack(torch.cat(deltas), torch.cat(acts), torch.cat(rows))
        delta, act = part.delta, part.act
        wide = _wide(delta, act)
        found = (delta.to(wide), losses, None, False, steps or _MOVED)
        return Piece("tokens", act, targets.labels, part.counts, *found)


def _scaled(
    pull: Tensor, r: Tensor, possible: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor] | None:
    """``(s [R], owner [R])`` with ``pull = s r[owner]`` at every row, or None.

    Args:
        pull: [..., C'], C' >= C; classes beyond C must have no gradient.
        r: [U, C]. possible: [U, C] bool, where the pull must be right. shape: of U.
    """
    lead, classes = pull.shape[:-1], r.shape[1]
    flat = pull.reshape(-1, pull.shape[-1])
    del pull
    if flat.shape[1] < classes or bool(flat[:, classes:].any()):
        return None
    for owner in _maps(lead, shape, len(r)):
        owner = owner.to(r.device)
        scale = torch.empty(len(flat), device=r.device, dtype=_wide(flat))
        for start in range(0, len(flat), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            whose = owner[part]
            if not _scales(flat[part, :classes], r[whose], possible[whose], scale[part]):
                break
        else:
            return scale, owner
    return None


def _scales(pull: Tensor, r: Tensor, possible: Tensor, scale: Tensor) -> bool:
    """Whether ``pull = s r`` row by row, wherever it is ``possible``; writes s to ``scale`` [R]."""
    tolerance = 8 * max(torch.finfo(pull.dtype).eps, torch.finfo(r.dtype).eps)
    r = r.to(scale.dtype)
    inside = r * possible
    scale.copy_((pull * inside).sum(dim=1) / inside.square().sum(dim=1))
    scale.masked_fill_(~torch.isfinite(scale), 0.0)
    r *= scale[:, None]
    right = (pull - r).abs_() <= tolerance * r.abs()
    return bool((right | ((pull == 0) & ~possible)).all())


def _maps(lead: torch.Size, shape: torch.Size, units: int) -> list[Tensor]:
    """Ways in which output rows may belong to rows of logits, as indices [R]."""
    rows, found = lead.numel(), []
    if rows == units:
        found.append(torch.arange(units))
        if len(shape) == 2:
            found.append(torch.arange(units).view(shape).t().reshape(-1))
    if len(shape) == 1 and rows != units:
        for kind in ("batch", "sample by sample", "position by position"):
            for dim in range(len(lead)):
                owner = Layout(kind, dim).owners(lead, units)
                if owner is not None:
                    found.append(owner.reshape(-1))
                elif units == 1 and kind == "batch":
                    found.append(torch.zeros(rows, dtype=torch.int64))
    return found
