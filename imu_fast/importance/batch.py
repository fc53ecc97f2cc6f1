"""One batch: sites in, squares out, and which parameters have to go sample by sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imu_fast.importance.gradients import (
    Dense,
    Gradients,
    Product,
    joined_squares,
    matrix_shape,
)
from imu_fast.importance.recorder import Recorder, Site, Use
from imu_fast.importance.split import Codes, digest, possible
from imu_fast.model.calls import leaves_of
from imu_fast.model.rows import Layout, LayoutChanged

# Batches that are tested after the first, and how small one is tested always.
_EVERY, _SMALL = 8, 8
# Elements of a parameter's gradients that exist at once where it has several uses.
_SLAB_ELEMENTS = 1 << 18

# What code ran; then, of a site: a parameter, the function, the axes, and the how manieth.
Key = tuple[int, int, str, int, int]


@dataclass
class Layouts:
    """What is known, over the batches, about how samples lie at each site.

    Attributes:
        always: test every batch.
    """

    always: bool = False
    known: dict[Key, Layout | None] = field(default_factory=dict)
    batches: int = 0
    untested: int = 0

    def due(self, keys: list[Key], sites: list[Site], n: int, moves: bool) -> bool:
        """Whether this batch is to be tested."""
        number, self.batches = self.batches, self.batches + 1
        if n == 1:
            return False
        due = self.always or moves or n <= _SMALL or number % _EVERY == 0
        for key, site in zip(keys, sites, strict=True):
            layout = self.known.get(key)
            due |= key not in self.known
            due |= layout is not None and layout not in possible(site.shape, site.axes, n)
        self.untested += not due
        return due


class Ledger:
    """The squares of one batch's gradients, added to the totals as they come.

    Args:
        totals: by the parameter's id. recorder: what ran. layouts: what is known of it.
    """

    def __init__(
        self,
        recorder: Recorder,
        parameters: Mapping[int, Tensor],
        totals: Mapping[int, Tensor],
        layouts: Layouts,
        names: Mapping[int, str],
    ) -> None:
        self.recorder, self.parameters, self.totals = recorder, parameters, totals
        self.layouts, self.names = layouts, names
        self.alone: set[int] = set()
        self.reached: set[int] = set()
        self._behind: dict[int, set[int]] = {}
        self._waiting: dict[int, int] = defaultdict(int)
        self._held: dict[int, list[tuple[Use, Gradients]]] = defaultdict(list)
        self._keys: dict[int, Key] = {}
        self._coded: dict[int, dict[Layout, Tensor]] = {}
        self._codes: Codes | None = None
        counts: dict[tuple[int, int, str, int], int] = defaultdict(int)
        code = hash(tuple(recorder.code))
        for site in recorder.sites:
            behind = [id(p) for use in site.uses for p in self._parameters_of(use.source)]
            first = (code, min(behind, default=0), site.kind, len(site.shape))
            self._keys[id(site)] = (*first, counts[first])
            counts[first] += 1
            for parameter in behind:
                self._waiting[parameter] += 1

    def _parameters_of(self, source: Tensor) -> list[Tensor]:
        if id(source) in self.parameters:
            return [source]
        if id(source) not in self._behind:
            self._behind[id(source)] = leaves_of(source) & self.parameters.keys()
        return [self.parameters[p] for p in self._behind[id(source)]]

    def run(self, logits: Tensor, signal: Tensor) -> None:
        """The backward passes; signal: of the samples' losses, at the logits."""
        n, sites = len(signal), self.recorder.sites
        loose = leaves_of(logits) & self.parameters.keys()
        self.alone |= loose
        ends = [*self.recorder.anchors, *(self.parameters[p] for p in loose)]
        if not ends or not logits.requires_grad:
            return
        self._n = n
        if self.layouts.due(list(self._keys.values()), sites, n, self.recorder.moves):
            self._codes = Codes(n, logits.dtype)
            weights = self._codes.weights.to(signal).view(-1, *[1] * (signal.dim() - 1))
            self.recorder.sink = self._note
            torch.autograd.grad(
                logits, ends, signal * weights, retain_graph=True, allow_unused=True
            )
        self.recorder.sink = self._take
        torch.autograd.grad(logits, ends, signal, allow_unused=True)
        for parameter in list(self._held):
            self._finish(parameter)

    def _note(self, site: Site, gradient: Tensor) -> None:
        candidates = possible(site.shape, site.axes, self._n)
        self._coded[id(site)] = {lay: digest(gradient, lay, self._n) for lay in candidates}

    def _layout(self, site: Site, gradient: Tensor) -> tuple[Layout | None, bool]:
        """How samples lie at a site, and whether that is known at all."""
        n, key = self._n, self._keys[id(site)]
        if n == 1:
            return None, True
        known = self.layouts.known.get(key)
        if self._codes is None:
            return known, known is not None
        coded = self._coded.get(id(site), {})
        order = sorted(coded, key=lambda layout: layout != known)
        found = next(
            (lay for lay in order if self._codes.fit(digest(gradient, lay, n), coded[lay])), None
        )
        if self.layouts.untested and known is not None and found != known:
            raise LayoutChanged(self.names[key[1]])
        if key not in self.layouts.known or known is not None:
            self.layouts.known[key] = found
        return found, found is not None

    def _take(self, site: Site, gradient: Tensor) -> None:
        """A site's gradient has come."""
        layout, sure = self._layout(site, gradient)
        sure &= site.unchanged()
        for use in site.uses:
            behind = self._parameters_of(use.source)
            self.reached |= {id(p) for p in behind}
            wanted = [p for p in behind if id(p) not in self.alone]
            if not sure:
                self.alone |= {id(p) for p in wanted}
                wanted = []
            made = use.gradients(gradient, layout, self._n) if wanted else None
            for parameter in behind:
                self._waiting[id(parameter)] -= 1
                if made is not None:
                    self._held[id(parameter)].append((use, made))
                if not self._waiting[id(parameter)] and use.source is parameter:
                    self._finish_early(id(parameter))

    def _finish_early(self, parameter: int) -> None:
        """A parameter whose uses have all come, so that none of them has to be kept."""
        if all(id(use.source) in self.parameters for use, _ in self._held.get(parameter, [])):
            self._finish(parameter)

    def _finish(self, parameter: int) -> None:
        held = self._held.pop(parameter, [])
        if not held or parameter in self.alone:
            return
        source = self.parameters[parameter]
        shape = matrix_shape(source)
        total = self.totals[parameter].view(shape)
        direct = [made for use, made in held if use.source is source]
        direct.sort(key=lambda made: not isinstance(made, Product))
        made_of = [(use.source, made) for use, made in held if use.source is not source]
        if not made_of and len(direct) == 1:
            direct[0].add_squares(total)
            return
        if not made_of and joined_squares(direct, total):
            return
        rows = shape[0] if made_of else max(1, _SLAB_ELEMENTS // max(1, shape[1]))
        for start in range(0, shape[0], rows):
            slab, chosen = total[start : start + rows], slice(start, start + rows)
            g = torch.zeros_like(slab)
            for sample in range(self._n):
                for first, made in enumerate(direct):
                    (made.add if first else made.put)(sample, chosen, g)
                if not direct:
                    g.zero_()
                for derived, made in made_of:
                    found = through(derived, source, made, sample)
                    if found is not None:
                        g += found.view(shape).to(g)
                slab.addcmul_(g, g)


def through(derived: Tensor, parameter: Tensor, made: Gradients, sample: int) -> Tensor | None:
    """A sample's gradient in a parameter, from that in what was made of it."""
    if isinstance(made, Dense):
        if made.part is not None:
            with torch.enable_grad():
                derived = made.part(derived, sample)
        signal = made.values[sample]
    else:
        signal = torch.zeros(
            matrix_shape(derived), dtype=made_dtype(derived), device=derived.device
        )
        made.add(sample, slice(None), signal)
    signal = signal.reshape(derived.shape).to(derived.dtype)
    return torch.autograd.grad(derived, parameter, signal, retain_graph=True, allow_unused=True)[0]


def made_dtype(tensor: Tensor) -> torch.dtype:
    """In which sums over a tensor's gradients are taken."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
