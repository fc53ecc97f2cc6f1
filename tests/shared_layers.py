"""Inner layers whose samples several processes share: a part of ``processes.py``."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from process_checks import SHARES, refused, same, share_of
from torch import nn
from torch.utils.data import default_collate

import imu_fast as imu
from imu_fast.curvature.named import CURVATURES

EXACT = 1e-12


class Reader(nn.Module):
    """Positions that meet in the middle, so that no row of an inner layer has a loss of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(5, 3), nn.Linear(3, 4)
        self.after, self.head = nn.Linear(4, 3), nn.Linear(3, 5)

    def forward(self, ids):
        h = torch.tanh(self.inner(self.words(ids)))
        return self.head(torch.tanh(self.after(h.cumsum(dim=1))))


def images():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4), nn.Tanh()
    )
    model.append(nn.Linear(4, 3))
    x, y = torch.randn(11, 1, 4, 4, dtype=torch.float64), torch.arange(11) % 3
    return model.double().eval(), [(x[i : i + 1], y[i : i + 1]) for i in range(11)], ["0", "3"]


def texts():
    """Of lengths 2 to 5, of which the first processes have the short ones."""
    torch.manual_seed(1)
    model = Reader().double().eval()
    data = []
    for i in range(9):
        ids = torch.randint(5, (1, 2 + i // 3))
        labels = torch.randint(5, ids.shape)
        labels[0, 0] = -100 if i % 4 == 1 else labels[0, 0]
        data.append((ids, labels))
    return model, data, ["inner", "after"]


def specs():
    """Those that are made of signals, and every way to solve them, as exact as float64 has it."""
    for name in ("kfac", "ekfac", "ggn_block"):
        yield CURVATURES.choose(name, damping=0.1)
    relative = {"damping": 0.3, "damping_mode": "relative"}
    yield CURVATURES.choose("ekfac", **relative)
    for how in ({"solver": "primal"}, {"solver": "dual"}, {"solver": "cg"}, {}):
        yield CURVATURES.choose("ggn", tolerance=EXACT, damping=0.1, **how)
    made = {"solver": "cg", "preconditioner": "kfac"}
    yield CURVATURES.choose("ggn", tolerance=EXACT, **relative, **made)


def walk(rank, world):
    group = dist.group.WORLD
    for make in (images, texts):
        model, data, layers = make()
        shift = {"shift": False} if make is texts else {}
        ways = [{"fisher": "exact"}, {"fisher": "sampled", "draws": 2, "seed": 7}, {}]
        if world > 2:
            ways = ways[1:] if make is images else ways[:1]
        for fisher in ways:
            whole = imu.capture(model, data, layers, **fisher, **shift)
            options = {} if fisher else {"fisher": "empirical"}
            every = world == 2 and make is images and fisher.get("fisher") == "exact"
            for number, cut in enumerate(SHARES[world]):
                mine = share_of(len(data), cut, rank)
                shared = imu.capture(model, data[mine], layers, group=group, **fisher, **shift)
                for one, all_ in zip(shared, whole, strict=True):
                    layer(one, all_, mine, options)
                for spec in specs() if every and not number else ():
                    curvature(spec, shared[0], whole[0], mine)
    whole_models(rank, world, group)
    single(rank, world, group)


def layer(shared, whole, mine, options):
    same(shared.mean_gradient(), whole.mean_gradient(), "mean gradient")
    if options:
        refused(lambda: imu.fit("ggn", shared), "have no curvature of the loss in their outputs")
    else:
        drawn = torch.cat([chunk.curvature.s for chunk in whole.chunks()])
        same(shared.gathered().curvature.s, drawn, "signals")
    for name in ("kfac", "ekfac", "ggn_block", "ggn"):
        tolerance = EXACT if name == "ggn" else None
        spec = CURVATURES.choose(name, damping=0.5, tolerance=tolerance, **options)
        scores = imu.influence_scores(whole, curvature=spec)
        same(imu.influence_scores(shared, curvature=spec), scores[mine], repr(spec))


def curvature(spec, shared, whole, mine):
    """Every call on what is fitted."""
    what, one, all_ = repr(spec), imu.fit(spec, shared), imu.fit(spec, whole)
    v = torch.linspace(-1, 1, whole.num_classes * whole.width, dtype=torch.float64)
    v = v.view(whole.num_classes, whole.width)
    own = slice(mine.start % 3, mine.start % 3 + 2)  # each process's
    same(one @ v, all_ @ v, what)
    same(one.solve(v), all_.solve(v), what)
    same(one.diagonal(), all_.diagonal(), what)
    same(one.self_influence(shared), all_.self_influence(whole)[mine], what)
    found, truth = all_.self_influence(whole), all_.pairwise(whole, whole)
    queries = whole.samples(own.start, own.stop)
    same(one.self_influence(queries), found[own], what)
    same(one.pairwise(shared, shared), truth[mine], what)
    same(one.pairwise(shared, queries), truth[mine, own], what)


def whole_models(rank, world, group):
    """Draws of samples that a loader has to be asked for, and what is refused."""
    model, data, layers = images()
    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    given = {"fisher": "sampled", "seed": 3}
    truth = imu.capture(model, (x, y), layers[1], **given).curvature.s
    mine = share_of(len(x), SHARES[world][0], rank)
    samples = torch.utils.data.TensorDataset(x[mine], y[mine])
    loader = torch.utils.data.DataLoader(samples, batch_size=3) if len(samples) else []
    for form in ((x[mine], y[mine]), samples, loader):
        same_seed = given | {"seed": np.int64(3)} if rank else given | {"draws": 1}
        found = imu.capture(model, form, layers[1], group=group, **same_seed)
        same(found.gathered().curvature.s, truth, "draws")
    # One that makes fewer samples of a batch than it has items.
    fewer = {"batch_size": 3, "collate_fn": lambda items: default_collate(items[:2])}
    loader = torch.utils.data.DataLoader(samples, **fewer) if len(samples) else []
    found = imu.capture(model, loader, layers[1], group=group, **given)
    gone = len(samples) // 3
    assert found.n_here == len(samples) - gone

    def capture(form, **more):
        return lambda: imu.capture(model, form, layers[1], group=group, **(given | more))

    refused(capture(iter(data) if rank else data), "read once")
    refused(capture(data, seed=rank), "seed=1")
    refused(lambda: capture(data, seed=None, fisher="exact" if rank else None)(), "fisher=")

    for other in ({"ignore_index": 2}, {"output": 0}, {"loss": "cross_entropy"}):
        for more in ({"fisher": "exact", "seed": None}, {"fisher": None, "seed": None}):
            how = more | (other if rank == 1 else {})
            refused(capture(data, **how), f"{next(iter(other))}=")

    class Grows:
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter(data[: self.reads + 2])

    refused(capture(Grows()), "give the same each time")


def single(rank, world, group):
    """Float32, of a well-conditioned problem."""
    model, data, layers = images()
    model, data = model.float(), [(x.float(), y) for x, y in data]
    mine = share_of(len(data), SHARES[world][0], rank)
    whole = imu.capture(model, data, layers, fisher="exact")
    shared = imu.capture(model, data[mine], layers, fisher="exact", group=group)
    for name in ("kfac", "ekfac", "ggn", "ggn_block"):
        truth = imu.influence_scores(whole, curvature=name, damping=1.0)[mine]
        found = imu.influence_scores(shared, curvature=name, damping=1.0)
        same(found, truth, name, 1e-6)
