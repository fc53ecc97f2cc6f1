"""Processes of one group that walk through every call on samples they share; started by a test.

``python processes.py WORLD FOLDER``: torch is imported once, and forked.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import shared_head
import shared_layers
import shared_otherwise
import torch
import torch.distributed as dist
from cases import CASES, Case, head_factors
from process_checks import SHARES, refused, same, share_of
from torch import nn

import imu_fast as imu
from imu_fast import distributed
from imu_fast.curvature.named import CURVATURES
from imu_fast.errors import ProcessError
from imu_fast.factors import implicit_head


def sharded(whole, mine):
    local = whole.samples(mine.start, mine.stop) if mine.stop > mine.start else None
    return imu.ShardedFactors(local)


def specs():
    """Every curvature, and every way to solve the GGN, as exact as float64 has it."""
    for name in CURVATURES:
        for solver in ("primal", "dual", "cg") if name == "ggn" else (None,):
            tolerance = 1e-12 if "tolerance" in CURVATURES[name].paths() else None
            yield CURVATURES.choose(name, solver=solver, tolerance=tolerance)


def statistics(rank, world):
    cases = (CASES[1], CASES[2], CASES[7], CASES[8]) if world == 2 else (CASES[8],)
    for number, case in enumerate(cases):
        whole = head_factors(case)
        for cut in SHARES[world]:
            mine = share_of(whole.n, cut, rank)
            shared = sharded(whole, mine)
            assert (shared.n, shared.num_tokens) == (whole.n, whole.num_tokens)
            assert (shared.n_here, shared.here) == (mine.stop - mine.start, mine)
            same(shared.mean_gradient(), whole.mean_gradient(), "mean gradient")
            same(shared.fisher_diagonal(), whole.fisher_diagonal(), "Fisher diagonal")
            gathered = shared.gathered()
            assert torch.equal(gathered.delta, whole.delta) and gathered.loss == whole.loss
            assert torch.equal(gathered.offsets, whole.offsets)
            for spec in specs():
                curvature(spec, whole, shared, mine, rank, few=number + (world - 2) > 0)
    implicit(rank, world)


def curvature(spec, whole, shared, mine, rank, few):
    what = repr(spec)
    v = torch.linspace(-1, 1, whole.num_classes * whole.width, dtype=torch.float64)
    v = v.view(whole.num_classes, whole.width)
    one, all_ = imu.fit(spec, shared), imu.fit(spec, whole)
    same(one @ v, all_ @ v, what)
    same(one.solve(v), all_.solve(v), what)
    same(one.diagonal(), all_.diagonal(), what)
    scores = imu.influence_scores(shared, curvature=spec)
    same(scores, imu.influence_scores(whole, curvature=spec)[mine], what)
    if few:
        return
    same(one.self_influence(shared), all_.self_influence(whole)[mine], what)
    truth = all_.pairwise(whole, whole)
    same(one.pairwise(shared, whole), truth[mine], what)
    same(one.pairwise(shared, shared), truth[mine], what)
    own = whole.samples(rank, 2 * rank + 1)  # as many as each process likes
    same(one.pairwise(shared, own), truth[mine, rank : 2 * rank + 1], what)
    same(one.self_influence(own), all_.self_influence(own), what)
    target = imu.influence_scores(shared, curvature=spec, target=whole.samples(0, 3))
    same(
        target, imu.influence_scores(whole, curvature=spec, target=whole.samples(0, 3))[mine], what
    )
    refused(lambda: imu.influence_scores(shared, curvature=spec, target=v + rank), "target differs")
    values, places = imu.top_influences(shared, whole, 3, curvature=spec)
    truth = imu.top_influences(whole, whole, 3, curvature=spec)
    same(values, truth[0], what)
    assert torch.equal(places, truth[1])


def implicit(rank, world):
    """Signals that are made where they are needed, of as few outputs as the processes agree on."""
    case = CASES[7]
    whole, p = head_factors(case), case.make(torch.float64)
    implicit_head._FEWEST_CLASSES, implicit_head._TILE_BYTES = 2 + rank, 1
    operands = p.act, p.weight, p.bias, p.labels, p.offsets
    made = imu.GradientFactors.from_head(*operands, implicit=True)
    mine = share_of(whole.n, SHARES[world][0], rank)
    shared = sharded(made, mine)
    same(shared.fisher_diagonal(), whole.fisher_diagonal(), "implicit Fisher diagonal")
    for name in ("fisher_diag", "identity", "kfac"):
        truth = imu.influence_scores(whole, curvature=name)[mine]
        same(imu.influence_scores(shared, curvature=name), truth, f"implicit {name}")
        truth = imu.pairwise_influence(whole, whole, curvature=name)[mine]
        found = imu.pairwise_influence(shared, made if rank else whole, curvature=name)
        same(found, truth, f"implicit {name}")


def single(rank, world):
    """Float32, of a well-conditioned problem; and beside inputs of half precision."""
    wide = head_factors(Case("float32", (1,) * 60, 5, 8, scale=0.3), torch.float32)
    half = wide.to(dtype=torch.bfloat16)
    mine = share_of(wide.n, SHARES[world][0], rank)
    for whole in (wide, half):
        shared = sharded(whole, mine)
        assert torch.equal(shared.gathered().act, whole.act)
        for spec in specs():
            spec = CURVATURES.choose(spec.name, damping=1.0 if "damping" in spec.paths() else None)
            truth = imu.influence_scores(whole, curvature=spec)[mine]
            same(imu.influence_scores(shared, curvature=spec), truth, spec.name, 1e-6)
    refused(lambda: sharded(half if rank else wide, mine), "torch.float32 beside torch.bfloat16")


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))
    return body.double().eval()


def models(rank, world):
    """From a model and each process's own data, wrapped or not, by every door that shares."""
    world_group = dist.group.WORLD
    model = network()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 4
    cut = SHARES[world][-1]
    mine = share_of(40, cut, rank)
    data = (x[mine], y[mine])
    wrapped = nn.parallel.DistributedDataParallel(model)
    whole = imu.capture(model, (x, y))
    for one in (model, wrapped):
        shared = imu.capture(one, data, group=world_group)
        same(imu.influence_scores(shared), imu.influence_scores(whole)[mine], "captured")
    scores = imu.influence_scores(shared)
    for options in ({}, {"top_fraction": 0.5, "permute": True}, {"quantile_over": "all"}):
        found = imu.influence_weights(scores, group=world_group, **options)
        places, weights = imu.influence_weights(imu.influence_scores(whole), **options)
        own = (places >= mine.start) & (places < mine.stop)
        assert torch.equal(found[0], places[own] - mine.start)
        same(found[1], weights[own], "weights")
    kind = "kept" if rank else "all"
    refused(
        lambda: imu.influence_weights(scores, quantile_over=kind, group=world_group), "same calls"
    )
    layers = imu.capture(wrapped, data, layers=["0", "3"], group=world_group)
    truth = imu.capture(model, (x, y), layers=["0", "3"])
    found = imu.influence_scores(layers, curvature="fisher_diag")
    same(found, imu.influence_scores(truth, curvature="fisher_diag")[mine], "layers")
    features = imu.capture_features(model, data, group=world_group)
    assert torch.equal(features.labels, y)
    same(features.features, imu.capture_features(model, (x, y)).features, "features")
    options = {"weight_decay": 0.1, "refit": True}
    left = imu.leave_one_out(wrapped, data, group=world_group, **options)
    same(left.logits, imu.leave_one_out(model, (x, y), **options).logits, "leave one out")
    kept = imu.Retain(data=(x[mine], y[mine]))
    named = imu.Ascent(scope=imu.Head(layer="3"), max_steps=2)
    for method in ("imu", "margin_edit", "newton_removal", named, replace(named, retain=kept)):
        own, alone = network(), network()
        stop = imu.StopRule(forget_accuracy=0.2)
        watch = {"again": data}
        result = imu.unlearn(own, data, method, stop=stop, watch=watch, group=world_group)
        if not isinstance(method, str) and isinstance(method.retain, imu.Retain):
            method = replace(method, retain=imu.Retain(data=(x, y)))
        one = imu.unlearn(alone, (x, y), method, stop=stop, watch={"again": (x, y)})
        same(own[3].weight, alone[3].weight, f"unlearned by {method}", 1e-9)
        assert result.model is own and result.stopped_by == one.stopped_by
        assert result.trajectory[-1].keys() == one.trajectory[-1].keys()
    doors(wrapped, model, x, y)
    refused(lambda: imu.unlearn(model, data, "imu", scope="all", group=world_group), "head alone")
    refused(lambda: imu.unlearn(model, data, "auto", group=world_group), "head alone")
    late = imu.StopRule(unseen_accuracy=(x, y))
    refused(lambda: imu.unlearn(model, data, stop=late, group=world_group), "unseen data")
    refused(lambda: imu.capture(model, [], group=world_group), "empty in every process")
    refused(lambda: imu.capture(model, data, group="world"), "process group")
    other = network()
    other[1].running_mean += rank
    refused(lambda: imu.capture(other, data, group=world_group), "1.running_mean")
    one = imu.capture_features(model, iter([(x, y)] if rank else []), group=world_group)
    same(one.features, imu.capture_features(model, (x, y)).features, "of an iterator")
    swapped = network()
    if rank:  # two classes change places, and all weights their sign
        weight = swapped[3].weight.detach()
        weight.copy_(-weight[[1, 0, 2, 3]])
    refused(lambda: imu.capture(swapped, data, group=world_group), "3.weight")
    ids = torch.arange(20).view(4, 5) % 7
    text = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
    with torch.no_grad():
        text[0].weight.copy_(torch.arange(35.0).view(7, 5).sin())
        text[1].weight.copy_(torch.arange(35.0).view(7, 5).cos())
        text[1].bias.zero_()
    for call in (imu.capture, imu.capture_features):
        labels = ids if rank else 6 - ids
        refused(
            lambda c=call, t=labels: c(text, (ids, t), group=world_group), "process 1 shift=True"
        )
    none = dist.new_group([0])
    if rank:
        refused(lambda: imu.capture(model, data, group=none), "does not belong to it")
    partly(model, x, y)


def doors(wrapped, model, x, y):
    """Each process alone, its model wrapped for training."""
    data = (x, y)
    same(imu.influence_scores(wrapped, data), imu.influence_scores(model, data), "wrapped")
    assert imu.evaluate(wrapped, data)["loss"] == imu.evaluate(model, data)["loss"]
    same(imu.batch_weights(wrapped, data), imu.batch_weights(model, data), "wrapped")
    found = imu.parameter_importance(wrapped, data)
    for a, b in zip(found.values(), imu.parameter_importance(model, data).values(), strict=True):
        same(a, b, "importance")
    for options in ({}, {"scope": "all", "epochs": 1}, {"method": "margin_edit"}):
        changed = imu.unlearn(wrapped, data, inplace=False, **options).model
        alone = imu.unlearn(model, data, inplace=False, **options).model
        same(changed.module[3].weight, alone[3].weight, f"wrapped {options}")


def partly(model, x, y):
    """Processes that hold a part of each weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallel = parallelize_module(network(), mesh, {"0": ColwiseParallel()})
    for one in (fully_shard(network(), mesh=mesh), parallel):
        for call in (imu.influence_scores, imu.unlearn, imu.capture, imu.evaluate):
            refused(lambda call=call, one=one: call(one, (x, y)), "DTensor")
    head, labels = torch.randn(3, 4), torch.arange(len(x)) % 3
    whole = imu.GradientFactors.from_head(torch.randn(len(x), 4), head, None, labels)
    part = distribute_tensor(head, mesh, [Shard(0)])
    column = distribute_tensor(head[:, 0].contiguous(), mesh, [Shard(0)])
    for given in (
        lambda: imu.GradientFactors.from_head(whole.act, part, None, labels),
        lambda: imu.GradientFactors(part, part, torch.arange(4), False),
        lambda: imu.influence_scores(whole, target=part),
        lambda: imu.fit("kfac", whole).solve(part),
        lambda: imu.influence_weights(column),
        lambda: imu.damped_cholesky_solve(part.T @ part, head[0], 0.1),
    ):
        refused(given, "full_tensor")


def failures(rank, world):
    """What one process does wrong, all hear of."""
    whole = head_factors(CASES[1])
    shared = sharded(whole, share_of(whole.n, SHARES[world][0], rank))
    name = "kfac" if rank else "ggn"
    refused(lambda: imu.influence_scores(shared, curvature=name), "make the same calls")
    damping = 1e-2 * (1 + rank)
    refused(lambda: imu.fit("kfac", shared, damping=damping), "process 0: fit(KFAC(")
    name = "none" if rank == 1 else "kfac"
    refused(lambda: imu.influence_scores(shared, curvature=name), "none")
    fitted = imu.fit("ggn", shared)
    v = torch.ones(whole.num_classes, whole.width, dtype=torch.float64)
    refused(lambda: fitted.solve(v * (1 + rank)), "v differs")
    refused(lambda: fitted.solve(v[: 2 + rank]), "shape")
    refused(lambda: fitted.save(f"ggn-{rank}"), "shared among processes")
    if rank == 1:
        refused(lambda: imu.self_influence(shared), "make the same calls")
    else:
        refused(lambda: imu.influence_scores(shared), "make the same calls")
    other = head_factors(CASES[1 + (rank == 1)])
    refused(lambda: imu.ShardedFactors(other), "capture all from the same model")
    narrow = head_factors(CASES[1], torch.float32 if rank else torch.float64)
    refused(lambda: imu.ShardedFactors(narrow), "float32")
    refused(lambda: imu.ShardedFactors(None), "no process has a sample")
    refused(lambda: imu.ShardedFactors([whole] if rank == 1 else whole), "a list")
    model, data = network(), (torch.randn(8, 6).double(), torch.arange(8) % 4)
    options = {"method": "imu", "epochs": 0 if rank == 1 else 1}
    refused(lambda: imu.unlearn(model, data, group=dist.group.WORLD, **options), "epochs=0")
    limit = "1MB" if rank == 1 else "1GiB"
    refused(lambda: imu.capture(model, data, group=dist.group.WORLD, max_memory=limit), "1MB")
    seed = 2 * rank
    refused(lambda: imu.unlearn(model, data, group=dist.group.WORLD, seed=seed), "seed=2")
    layers = "0" if rank == 1 else "3"
    refused(lambda: imu.capture(model, data, layers, group=dist.group.WORLD), "same model")
    numbers = torch.tensor([-1, 2], dtype=torch.int64 if rank == 1 else torch.float64)
    refused(lambda: imu.influence_weights(numbers, group=dist.group.WORLD), "scores has dtype")
    labels = data[1] + 9 * (rank == 1)
    world_group = dist.group.WORLD
    refused(lambda: imu.capture(model, (data[0], labels), group=world_group), "label")

    def runs_out(chunk):
        if rank == 1:
            raise MemoryError("no more")
        return chunk.delta.sum(dim=0)

    kind = MemoryError if rank == 1 else ProcessError
    refused(lambda: shared.sums(runs_out), "no more", kind)
    same(shared.mean_gradient(), whole.mean_gradient(), "after all that")
    assert distributed.alike(v) and not distributed.alike(v + rank)
    noise = torch.randn(40, 50, generator=torch.Generator().manual_seed(rank))
    base = torch.randn(40, 50, generator=torch.Generator().manual_seed(9))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = base.to(dtype)
        rounded = x * (1 + 0.5 * torch.finfo(dtype).eps * noise.sign().to(torch.float64))
        assert distributed.alike(rounded.to(dtype))
        assert not distributed.alike(noise.to(dtype))
    assert distributed.alike(v[:0]) and distributed.alike(v / 0) and distributed.alike(v[0, 0])
    # Queries whose rows are the same numbers, and not of the same samples.
    cuts = torch.tensor([0, 1, 3] if rank else [0, 2, 3])
    queries = replace(whole.samples(0, 3), offsets=cuts, losses=None)
    truth = imu.fit("ggn", whole, tolerance=1e-12).self_influence(queries)
    found = imu.fit("ggn", shared, solver="cg", tolerance=1e-12).self_influence(queries)
    same(found, truth, "queries cut otherwise", 1e-9)
    # A group that is there is not used by factors that say nothing of it.
    if rank == 0:
        imu.influence_scores(whole)
    dist.barrier()
    if rank == world - 1:
        os._exit(0)  # dies
    refused(lambda: imu.influence_scores(shared), "another process of the group", ProcessError)


PARTS = {
    2: (
        statistics,
        single,
        shared_layers.walk,
        shared_head.walk,
        models,
        shared_otherwise.walk,
        failures,
    ),
    4: (statistics, shared_layers.walk, shared_head.walk, failures),
}


def walk(rank, world, folder):
    options = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=120)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **options)
    for part in PARTS[world]:
        part(rank, world)


def forked(world, body):
    """``body(rank)`` in as many processes; ends with the worst of their exit codes."""
    torch.set_num_threads(1)
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            code = 1
            try:
                body(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    worst = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if code := abs(os.waitstatus_to_exitcode(status)):
            worst = max(worst, code)
            for other in children:  # which may wait for it for ever
                os.kill(other, signal.SIGKILL)
    sys.exit(worst)


if __name__ == "__main__":
    forked(int(sys.argv[1]), lambda rank: walk(rank, int(sys.argv[1]), Path(sys.argv[2])))
