"""Which sample each row of a layer belongs to, found out by gradients and never by its shape.

Losses of samples are separate, so with every sample's loss weighted by ``2^k_i`` the gradient at a
row of sample i is exactly ``2^k_i`` times what it was: powers of two pass through backward without
rounding. The ratio of two backward passes names the owner of every row, whatever the layout; what
shapes suggest is only believed after it has passed this test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imu_fast.errors import InputError

# Weights [n] of the samples' losses -> the gradient at each call, [..., C].
Backward = Callable[[Tensor], Sequence[Tensor]]

NOBODY = -1


@dataclass(frozen=True)
class Layout:
    """A way in which rows [*shape] may belong to n samples: along one dimension."""

    kind: str
    dim: int

    def owners(self, shape: torch.Size, n: int) -> Tensor | None:
        """The sample of each row, [*shape], or None where the shape does not allow it."""
        if self.dim >= len(shape):
            return None
        size = shape[self.dim]
        if self.kind == "batch":
            index = torch.arange(size) if size == n else None
        elif size % n or size == n or n == 1:
            index = None
        elif self.kind == "sample by sample":
            index = torch.arange(size) // (size // n)
        else:
            index = torch.arange(size) % n
        if index is None:
            return None
        return index.view(-1, *[1] * (len(shape) - self.dim - 1)).expand(shape)


def layouts(dims: int) -> list[Layout]:
    """Every way in which rows of so many axes may belong to samples, the likeliest first."""
    kinds = ("batch", "sample by sample", "position by position")
    return [Layout(kind, dim) for kind in kinds for dim in range(dims)]


class Mixed(Exception):
    """A row's gradient comes from several samples; ``call`` is the first where it does."""

    def __init__(self, call: int) -> None:
        super().__init__(call)
        self.call = call


class LayoutChanged(Exception):
    """A layer's rows are laid out in another way than in batches that were taken on trust."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


# A layout is trusted where it had to pass by chance with a probability of 2 to the minus so many;
# the first batches are tested all the same, and every so many after them.
_TRUST_BITS, _FIRST, _EVERY = 40.0, 4, 8


def levels_of(dtype: torch.dtype) -> tuple[int, int]:
    """How many powers of two tell samples apart, and the lowest exponent; half is narrow."""
    return (8, 0) if dtype == torch.float16 else (48, -16)


def _digits(base: Tensor, weighted: Tensor, low: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exponents read off each row, where there is a gradient at all, and where it is one sample's.

    Args:
        base, weighted: [..., C], gradients without and with weights. Results are [R] on the CPU.
    """
    base, weighted = base.reshape(-1, base.shape[-1]), weighted.reshape(-1, base.shape[-1])
    limits = torch.finfo(base.dtype)
    size, largest = base.abs().max(dim=1)
    # Below, a product with a power of two may round.
    clear = size > limits.tiny * 2.0 ** (3 if base.dtype == torch.float16 else 30)
    column = largest[:, None]
    ratio = weighted.gather(1, column).float() / base.gather(1, column).float()
    exponent = torch.where(clear[:, None], ratio, 1.0).clamp_min(2.0**-100).log2().round()
    power = torch.exp2(exponent).to(base.dtype)
    rest = torch.addcmul(weighted, base, power, value=-1).abs().amax(dim=1)
    # Passes whose sums run in another order each time (atomics) differ by rounding.
    own = rest <= limits.eps**0.5 * power[:, 0] * size
    return (exponent[:, 0].long() - low).cpu(), clear.cpu(), own.cpu()


@dataclass
class Ownership:
    """What is known, over the batches, about how each layer's rows are laid out.

    Attributes:
        always: test every batch.
        last: of the last batch, where it was tested: the fewest bits that one of its calls has
            shown, and whether layouts said it all; None where it was not.
    """

    always: bool = False
    last: tuple[float, bool] | None = None
    _known: dict[tuple[str, int], list[Layout]] = field(default_factory=dict)
    _bits: dict[tuple[str, int], float] = field(default_factory=dict)
    _batches: int = 0
    _untested: int = 0

    def owners(
        self,
        names: Sequence[str],
        base: Sequence[Tensor],
        backward: Backward,
        n: int,
        due: bool = False,
    ) -> list[Tensor]:
        """The sample of each row of each call: [...], ``NOBODY`` where no layout says it.

        Args:
            names: of the calls' layers. base: gradients of the plain sum of losses, [..., C].
            backward: the same for a weighted sum. n: samples of this batch.
            due: test this batch, whatever is known.

        Raises:
            Mixed: a row belongs to several samples.
            LayoutChanged: batches before this one, which were not tested, may be wrong.
        """
        number, self._batches = self._batches, self._batches + 1
        self.last = None
        shapes = [g.shape[:-1] for g in base]
        if n == 1:
            return [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
        keys = [(name, len(shape)) for name, shape in zip(names, shapes, strict=True)]
        found = [self._agreed(key, shape, n) for key, shape in zip(keys, shapes, strict=True)]
        sure = all(self._bits.get(key, 0.0) >= _TRUST_BITS for key in keys)
        due |= self.always or number < _FIRST or number % _EVERY == 0
        if sure and not due and all(f is not None for f in found):
            self._untested += 1
            return [f for f in found if f is not None]
        return self._tested(keys, base, backward, n)

    def _agreed(self, key: tuple[str, int], shape: torch.Size, n: int) -> Tensor | None:
        """What all layouts that have passed so far say of this shape."""
        said = [m for lay in self._known.get(key, []) if (m := lay.owners(shape, n)) is not None]
        return said[0] if said and all(torch.equal(m, said[0]) for m in said) else None

    def _tested(
        self, keys: Sequence[tuple[str, int]], base: Sequence[Tensor], backward: Backward, n: int
    ) -> list[Tensor]:
        levels, low = levels_of(base[0].dtype)
        generator = torch.Generator().manual_seed(n)
        if n <= levels:  # all different: one pass names every owner
            code = torch.randperm(n, generator=generator)
        else:
            code = torch.randint(levels, (n,), generator=generator)
        weighted = backward(torch.exp2((code + low).double()))
        out: list[Tensor | None] = []
        fewest, every = math.inf, True
        for i, (key, g, w) in enumerate(zip(keys, base, weighted, strict=True)):
            shape = g.shape[:-1]
            digit, clear, own = _digits(g, w, low)
            if bool((clear & ~own).any()):
                raise Mixed(i)
            candidates = self._known.get(key) or layouts(len(shape))
            passed, owners = [], None
            for layout in candidates:
                owner = layout.owners(shape, n)
                if owner is None:
                    continue
                if torch.equal(code[owner.flatten()[clear]], digit[clear]):
                    passed.append(layout)
                    owners = owner if owners is None else owners
            if not passed and self._untested and self._known.get(key):
                raise LayoutChanged(key[0])
            regular = passed and self._known.get(key, passed)
            self._known[key] = passed if regular else []
            bits = float(clear.sum()) * math.log2(n)
            self._bits[key] = self._bits.get(key, 0.0) + bits if regular else 0.0
            fewest, every = min(fewest, bits), every and bool(regular)
            if owners is None and n <= levels:
                named = torch.argsort(code)[digit.clamp(0, n - 1)]
                owners = torch.where(clear, named, NOBODY).view(shape)
            out.append(owners)
        self.last = fewest, every
        if any(owners is None for owners in out):
            decoded = self._decoded(base, backward, n, levels, low)
            out = [d if o is None else o for o, d in zip(out, decoded, strict=True)]
        return [owners for owners in out if owners is not None]

    def _decoded(
        self, base: Sequence[Tensor], backward: Backward, n: int, levels: int, low: int
    ) -> list[Tensor]:
        """Every row's owner, digit by digit in base ``levels``."""
        numbers = [torch.zeros(g.shape[:-1].numel(), dtype=torch.int64) for g in base]
        alive = [torch.ones(len(number), dtype=torch.bool) for number in numbers]
        place = 1
        while place < n:
            exponent = (torch.arange(n) // place) % levels + low
            weighted = backward(torch.exp2(exponent.double()))
            for i, (g, w) in enumerate(zip(base, weighted, strict=True)):
                digit, clear, own = _digits(g, w, low)
                if bool((clear & ~own).any()):
                    raise Mixed(i)
                numbers[i] += digit * place
                alive[i] &= clear
            place *= levels
        return [
            torch.where(a, number, NOBODY).view(g.shape[:-1])
            for a, number, g in zip(alive, numbers, base, strict=True)
        ]


def one_sample_at_a_time(
    backward: Backward, acts: Sequence[Tensor], n: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``(delta, act, owner)`` of each call where samples share rows: a backward pass per sample.

    Exact where the samples themselves are independent, such as a layer on an input that is the
    same for all of them; acts: [..., d].
    """
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in acts]
    for sample in range(n):
        weights = torch.zeros(n, dtype=torch.float64)
        weights[sample] = 1
        for parts, act, delta in zip(found, acts, backward(weights), strict=True):
            delta = delta.reshape(-1, delta.shape[-1])
            rows = torch.nonzero(delta.any(dim=1)).flatten()
            owner = torch.full((len(rows),), sample)
            parts.append((delta[rows], act.reshape(-1, act.shape[-1])[rows], owner))
    return [
        (
            torch.cat([p[0] for p in parts]),
            torch.cat([p[1] for p in parts]),
            torch.cat([p[2] for p in parts]),
        )
        for parts in found
    ]


def check_owned(names: Sequence[str], wide: Sequence[Tensor], owners: Sequence[Tensor]) -> None:
    """Raise InputError where a signal reaches a row that no gradient has given to a sample.

    Args:
        names: of the calls' layers. wide: gradients and further signals at each, [..., C (1 + K)].
    """
    for name, g, owner in zip(names, wide, owners, strict=True):
        nobody = owner == NOBODY
        if bool(nobody.any()) and bool(g[nobody.to(g.device)].any()):
            raise InputError(
                f"layers={name!r}: the model's predictions reach rows that no sample's loss does, "
                "and whose they are cannot be told; leave fisher out, or this layer"
            )
