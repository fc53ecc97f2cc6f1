"""A head whose classes several processes share: a part of ``processes.py``."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Case, head_factors
from process_checks import refused, same, share_of
from torch import nn

import imu_fast as imu
from imu_fast.factors import implicit_head

# How many of C classes each process has.
CLASSES = {2: [(0.0, 0.3, 1.0)], 4: [(0.0, 0.1, 0.5, 0.6, 1.0)]}
WIDE = Case("a vocabulary", (3, 1, 0, 5, 2, 1, 1, 4), 40, 6, scale=2.0)
FLAT = Case("no bias, confident", (1,) * 9, 23, 5, has_bias=False, scale=40.0)
SPECS = (
    imu.FisherDiag(damping=1e-3),
    imu.FisherDiag(damping=1e-2, damping_mode="clamp"),
    imu.Identity(),
)


def parts(case, rank, world, dtype=torch.float64):
    p = case.make(dtype)
    mine = share_of(case.classes, CLASSES[world][0], rank)
    return p, (p.weight[mine], None if p.bias is None else p.bias[mine]), mine


def walk(rank, world):
    kept = implicit_head._FEWEST_CLASSES, implicit_head._TILE_BYTES
    ways = ((WIDE, "torch"), (FLAT, "torch"), (WIDE, "reference"))
    for case, backend in ways[: 3 if world == 2 else 1]:
        with imu.use_backend(backend):
            equal(case, rank, world)
        implicit_head._FEWEST_CLASSES, implicit_head._TILE_BYTES = 2 + rank, 1
    implicit_head._FEWEST_CLASSES, implicit_head._TILE_BYTES = kept
    narrow(rank, world)
    by_default(rank, world)
    in_parts(rank, world)
    turned_away(rank, world)


def equal(case, rank, world):
    """To the whole head in one process, whatever is dealt with at a time."""
    p, rows, mine = parts(case, rank, world)
    whole = head_factors(case)
    head = imu.ShardedHead(p.act, *rows, p.labels, p.offsets)
    assert (head.n, head.num_tokens, head.num_classes) == (whole.n, len(p.act), case.classes)
    assert head.classes == mine and head.width == whole.width
    same(head.losses, whole.losses, "losses")
    same(head.mean_gradient(), whole.mean_gradient()[mine], "mean gradient")
    same(head.fisher_diagonal(), whole.fisher_diagonal()[mine], "Fisher diagonal")
    few = imu.ShardedHead(p.act[:2], *rows, p.labels[:2].tolist())
    queries = imu.GradientFactors.from_head(p.act[:2], p.weight, p.bias, p.labels[:2])
    v = torch.linspace(-1, 1, whole.num_classes * whole.width, dtype=torch.float64)
    v = v.view(whole.num_classes, whole.width)
    for spec in SPECS:
        for more in ({}, {"per": "token"}, {"first_row_is_mean": True}):
            truth = imu.influence_scores(whole, curvature=spec, **more)
            same(imu.influence_scores(head, curvature=spec, **more), truth, f"{spec} {more}")
        for own, target in ((few, queries), (v[mine], v)):
            truth = imu.influence_scores(whole, curvature=spec, target=target)
            found = imu.influence_scores(head, curvature=spec, target=own)
            same(found, truth, f"{spec} of a target")
        own = imu.self_influence(head, curvature=spec)
        same(own, imu.self_influence(whole, curvature=spec), f"{spec} of itself")
        truth = imu.pairwise_influence(whole, queries, curvature=spec)
        same(imu.pairwise_influence(head, few, curvature=spec), truth, f"{spec} pairs")
    ignored = p.labels.clone()
    ignored[1::3] = -7
    how = {"ignore_index": -7}
    truth = imu.GradientFactors.from_head(p.act, p.weight, p.bias, ignored, p.offsets, **how)
    found = imu.ShardedHead(p.act, *rows, ignored, p.offsets, **how)
    same(imu.influence_scores(found), imu.influence_scores(truth), "ignored")


def narrow(rank, world):
    """Float32 of a well-conditioned head, and half precision as the implicit head has it."""
    case = replace(WIDE, scale=0.3)
    p, rows, _ = parts(case, rank, world, torch.float32)
    head = imu.ShardedHead(p.act, *rows, p.labels, p.offsets)
    truth = imu.influence_scores(head_factors(case, torch.float32), damping=1.0)
    same(imu.influence_scores(head, damping=1.0), truth, "float32", 1e-6)
    p, rows, _ = parts(case, rank, world, torch.bfloat16)
    operands = p.act, p.weight, p.bias, p.labels, p.offsets
    whole = imu.GradientFactors.from_head(*operands, implicit=True)
    head = imu.ShardedHead(p.act, *rows, p.labels, p.offsets)
    truth = imu.influence_scores(whole, damping=1.0)
    same(imu.influence_scores(head, damping=1.0), truth, "bfloat16", 1e-5)


def by_default(rank, world):
    """Pairs without a curvature named: where attribution takes the diagonal anyway."""
    generator = torch.Generator().manual_seed(0)
    act, weight = (torch.randn(k, 4200, generator=generator).double() for k in (3, 2 * world))
    labels, mine = torch.tensor([0, 1, 0]), slice(2 * rank, 2 * rank + 2)
    head = imu.ShardedHead(act, weight[mine], None, labels)
    whole = imu.GradientFactors.from_head(act, weight, None, labels)
    same(imu.pairwise_influence(head, head), imu.pairwise_influence(whole, whole), "the default")


def in_parts(rank, world):
    """A weight that torch holds in parts, as a vocabulary-parallel head's is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    p, mesh = WIDE.make(torch.float64), init_device_mesh("cpu", (world,))
    truth = imu.influence_scores(head_factors(WIDE))
    for split in (
        lambda layer: parallelize_module(layer, mesh, ColwiseParallel()),
        lambda layer: fully_shard(layer, mesh=mesh),
    ):
        layer = nn.Linear(WIDE.features, WIDE.classes, dtype=torch.float64)
        layer.load_state_dict({"weight": p.weight, "bias": p.bias})
        rows = list(split(layer).parameters())
        head = imu.ShardedHead(p.act, *rows, p.labels, p.offsets, group=mesh.get_group())
        same(imu.influence_scores(head), truth, "a layer in parts")
    bias = distribute_tensor(p.bias, mesh, [Shard(0)])
    for placement in (Replicate(), Shard(1)):
        other = distribute_tensor(p.weight, mesh, [placement])
        call = lambda other=other: imu.ShardedHead(p.act, other, bias, p.labels)  # noqa: E731
        refused(call, "(Shard(0),)")
    few = distribute_tensor(p.weight[: world - 1], mesh, [Shard(0)])
    refused(lambda: imu.ShardedHead(p.act, few, None, p.labels % (world - 1)), "C >= 1")


def turned_away(rank, world):
    """What one process does wrong, all hear of; and what takes whole factors alone."""
    p, rows, _ = parts(WIDE, rank, world)
    head, whole = imu.ShardedHead(p.act, *rows, p.labels, p.offsets), head_factors(WIDE)
    for name in ("kfac", "ekfac", "ggn", "ggn_block", "fisher"):
        refused(lambda name=name: imu.influence_scores(head, curvature=name), "couples the outputs")
    relative = imu.FisherDiag(damping_mode="relative")
    refused(lambda: imu.self_influence(head, curvature=relative), "couples the outputs")
    refused(lambda: imu.pairwise_influence(head, head), "curvature=None is EKFAC")
    fitted = imu.fit("identity", whole)
    for call in (
        lambda: imu.fit("fisher_diag", head),
        lambda: imu.similarity_scores(head),
        lambda: imu.pairwise_similarity(head, head),
        lambda: imu.top_influences(head, head, 1, curvature="identity"),
        lambda: imu.influence_scores([head]),
        lambda: imu.influence_scores(whole, target=head),
        lambda: fitted.self_influence(head),
        lambda: imu.ShardedFactors(head),
    ):
        refused(call, "ShardedHead")
    refused(lambda: imu.influence_scores(head, target=whole), "target is a GradientFactors")
    refused(lambda: imu.influence_scores(head, target=p.weight), "expected one [C, D] per layer")
    other = imu.ShardedHead(p.act, *(x.flip(0)[: 1 + rank] for x in rows), p.labels % world)
    refused(lambda: imu.influence_scores(head, target=other), "make both of the same rows")
    damping = 1e-2 * (1 + rank)
    refused(lambda: imu.influence_scores(head, damping=damping), "make the same calls")
    name = "none" if rank else "identity"
    refused(lambda: imu.self_influence(head, curvature=name), "none")
    act, labels = p.act.clone(), p.labels.clone()
    act[0, 0] += rank
    labels[0] = (labels[0] + rank) % WIDE.classes
    refused(lambda: imu.ShardedHead(act, *rows, p.labels), "features differs")
    refused(lambda: imu.ShardedHead(p.act, *rows, labels), "labels differs")
    coarse, many = (
        torch.randn(300, 32, generator=torch.Generator().manual_seed(0)),
        torch.arange(300),
    )
    coarse[7] = coarse[7 + rank]  # one row is another's, however coarse its numbers
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        of = coarse.to(dtype), torch.zeros(2, 32, dtype=dtype), None, many % 2
        refused(lambda of=of: imu.ShardedHead(*of), "features differs")
    of_rank = {"ignore_index": 3 + rank}
    refused(lambda: imu.ShardedHead(p.act, *rows, p.labels, **of_rank), "ignore_index")
    mixed = [x.float() if rank else x for x in rows]
    refused(lambda: imu.ShardedHead(p.act, *mixed, p.labels), "torch.float32")
    refused(lambda: imu.ShardedHead(p.act[rank:], *rows, p.labels[rank:]), "all samples")
    refused(lambda: imu.ShardedHead(p.act, *rows, p.labels + WIDE.classes), "label")
    refused(lambda: imu.ShardedHead(p.act, *rows, p.labels.double()), "no probabilities")
    refused(lambda: imu.ShardedHead(p.act, *rows, p.labels[:, None].expand(-1, 2)), "labels")
    huge = rows[0] * (float("nan") if rank == 1 else 1.0)
    refused(lambda: imu.ShardedHead(p.act, huge, rows[1], p.labels), "weight")
    refused(lambda: imu.ShardedHead(p.act, *rows, p.labels, group="world"), "process group")
    rows[0].mul_(1.5)
    refused(lambda: imu.influence_scores(head), "changed in place")
