"""Processes that call alone, or have something otherwise: a part of ``processes.py``."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import torch
import torch.distributed as dist
from process_checks import refused, same, share_of
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import imu_fast as imu
from imu_fast import distributed
from imu_fast.evaluation.shallowness import relearning_steps

X = torch.arange(240, dtype=torch.float64).sin().view(40, 6)
Y = torch.arange(40) % 4


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))
    return body.double().eval()


def walk(rank, world):
    calls_alone(rank)
    other_processes(rank)
    samples_twice(rank, world)
    models_and_options(rank, world)
    none_here(rank)
    not_sent(rank)


def calls_alone(rank):
    """A wrapper's buffers are no reason to wait for processes that do something else."""
    wrapped, data = nn.parallel.DistributedDataParallel(network()), (X, Y)
    stop = imu.StopRule(forget_accuracy=0.2)
    if not rank:
        imu.evaluate(wrapped, data)
        relearning_steps(wrapped, data, target=1.0, scope="all", max_steps=1)
        for method, how in (
            ("boundary_shrink", {"scope": "all", "epochs": 1}),
            ("npo", {"scope": "all", "epochs": 1}),
            (
                "uniform",
                {"scope": "all", "epochs": 1, "retain": imu.Retain(data=data, retain_loss="kl")},
            ),
            ("imu", {"scope": "layers", "layers": "3", "epochs": 1, "batchnorm": "train"}),
            ("self_distillation", {"stop": stop, "max_steps": 1}),
        ):
            alone, own = network(), {k: v.clone() for k, v in wrapped.state_dict().items()}
            imu.unlearn(alone, data, method, **how)
            imu.unlearn(wrapped, data, method, **how)
            same(wrapped.module[3].weight, alone[3].weight, method)
            wrapped.module.load_state_dict({k.removeprefix("module."): v for k, v in own.items()})
    dist.barrier()


def tokens():
    generator = torch.Generator().manual_seed(3)
    act, weight = (torch.randn(k, 5, generator=generator).double() for k in (12, 3))
    cuts = torch.tensor([0, 2, 5, 6, 9, 12])
    return imu.GradientFactors.from_head(act, weight, None, torch.arange(12) % 3, cuts)


def other_processes(rank):
    """What other processes share has sums over other samples."""
    whole, groups = tokens(), [dist.new_group([0]), dist.new_group([1])]
    mine = whole.samples(2, 5) if rank else whole.samples(0, 2)
    shared, own = imu.ShardedFactors(mine), imu.ShardedFactors(mine, groups[rank])
    cg = imu.GGN(solver="cg")
    fitted = imu.fit(cg, shared)
    for call in (
        lambda: imu.influence_scores(shared, target=own),
        lambda: imu.pairwise_influence(shared, own, curvature=cg),
        lambda: imu.pairwise_influence(own, shared, curvature=cg),
        lambda: fitted.self_influence(own),
        lambda: imu.influence_scores([shared, own]),
    ):
        refused(call, "shared among different processes")
    # Queries whose rows are the same numbers, and not of the same samples.
    cuts = torch.tensor([0, 2, 5] if rank else [0, 3, 5])
    queries = replace(whole.samples(0, 2), offsets=cuts, losses=None)
    refused(lambda: imu.top_influences(shared, queries, 2, curvature="kfac"), "queries differs")


def samples_twice(rank, world):
    """Samplers that give some again, so that all processes have as many."""
    group, model = dist.group.WORLD, network()
    for n in (9, 10):
        data = TensorDataset(X[:n], Y[:n])
        loader = DataLoader(data, 2, sampler=DistributedSampler(data, world, rank, shuffle=False))
        calls = (imu.capture, imu.capture_features, imu.unlearn, imu.leave_one_out)
        if n == 9:
            options = ({}, {}, {}, {"weight_decay": 0.1})
            for call, how in zip(calls, options, strict=True):
                refused(
                    lambda c=call, h=how, x=loader: c(model, x, group=group, **h), "samples twice"
                )
            continue
        found = imu.capture(model, loader, group=group)
        same(found.mean_gradient(), imu.capture(model, (X[:n], Y[:n])).mean_gradient(), "shares")


class Warm(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.temperature = nn.Linear(6, 4).double(), temperature

    def forward(self, x):
        return self.head(x) / self.temperature


def models_and_options(rank, world):
    group, mine = dist.group.WORLD, share_of(40, (0.0, 0.4, 1.0), rank)
    data, model = (X[mine], Y[mine]), network()
    refused(lambda: imu.capture(Warm(1.0 + rank), data, group=group), "temperature")
    weights = torch.ones(4) + torch.tensor([0.0, 1e-6 * rank, 0.0, 0.0])
    how = {"group": group, "class_weights": weights}
    refused(lambda: imu.capture(model, data, "0", **how), "same calls")
    refused(lambda: distributed.in_step(distributed.text_of(torch.arange(2000) + rank)), "tensor")
    for options in (
        {"milestones": {"deep": imu.StopRule(forget_accuracy=0.2 + 0.1 * rank)}},
        {"stop": imu.StopRule(forget_accuracy=0.2 + 1e-9 * rank)},
        {"precondition": torch.eye(11, dtype=torch.float64) + 1e-6 * rank},
        {"optimizer": torch.optim.AdamW if rank else torch.optim.Adam},
    ):
        refused(lambda o=options: imu.unlearn(model, data, group=group, **o), "same calls")
    seen = []
    result = imu.unlearn(
        network(), data, epochs=3, group=group, callback=None if rank else seen.append
    )
    assert len(result.trajectory) == 4 and len(seen) == (0 if rank else 4)
    # Features of other weights than the summary is of.
    with tempfile.TemporaryDirectory() as folder:
        summary = imu.save_summary(model, (X, Y), f"{folder}/s.safetensors", weight_decay=0.1)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    few = (data[0][:8], data[1][:8])
    for method in ("newton_removal", "margin_edit"):
        how = {"summary": summary, "group": group}
        refused(lambda m=method, h=how: imu.unlearn(model, few, m, **h), "of other weights")


def none_here(rank):
    """A process without samples, in calls that look at its own."""
    whole = imu.capture(network(), (X, Y))
    shared = imu.ShardedFactors(None if rank else whole)
    mine = slice(40 * rank, 40)
    for metric in ("cosine", "product"):
        truth = imu.similarity_scores(whole, metric=metric)[mine]
        same(imu.similarity_scores(shared, metric=metric), truth, metric)
        pairs = imu.pairwise_similarity(whole, whole, metric=metric)
        same(imu.pairwise_similarity(shared, whole, metric=metric), pairs[mine], metric)
        same(imu.pairwise_similarity(shared, shared, metric=metric), pairs[mine], metric)
        same(imu.pairwise_similarity(whole, shared, metric=metric), pairs, metric)
    words = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
    with torch.no_grad():
        for p in words.parameters():
            p.copy_(torch.arange(p.numel()).view(p.shape).sin())
    ids = torch.arange(20).view(4, 5) % 7
    labels = (3 * ids + 1) % 7
    labels[0] = -100  # the sample that the other process is lent has a label
    data = [] if rank else (ids, labels)
    found = imu.capture_features(words, data, shift=False, group=dist.group.WORLD)
    same(found.features, imu.capture_features(words, (ids, labels), shift=False).features, "lent")


def not_sent(rank):
    """What goes wrong in one process between two exchanges is told at the next."""

    class Own(imu.CrossEntropy):
        pass

    data = [] if rank else (X, Y)
    call = lambda: imu.capture(network(), data, loss=Own(), group=dist.group.WORLD)  # noqa: E731
    refused(call, "cannot be sent")

    class Full(torch.Tensor):
        def new_empty(self, *args, **kwargs):
            raise MemoryError("no room")

    def gathered():
        with distributed.together("a call"):
            distributed.rows_of_all(X.as_subclass(Full) if rank else X)

    refused(gathered, "no room", MemoryError if rank else imu.ProcessError)
