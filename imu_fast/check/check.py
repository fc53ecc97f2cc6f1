"""Each operation, backend, dtype and precision that can run here: its error, then its time."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from imu_fast import __version__
from imu_fast.backend import backends, interpreted, use_backend
from imu_fast.check.counts import Ceilings
from imu_fast.check.entries import Entry, entries
from imu_fast.check.error import Worst, worst
from imu_fast.check.timing import KINDS, Times, ceilings, times
from imu_fast.errors import InputError, check_choice
from imu_fast.precision import PRECISIONS, at_least, precision_of, use_precision
from imu_fast.solvers.cholesky.cholesky import backend_of

_SOLVER = "damped_cholesky_solve"


@dataclass(frozen=True)
class Row:
    """One operation on one backend, in one dtype and precision of float32 products.

    worst: of its errors. times: None where nothing is timed. raised: what it raised, "" if nothing.
    """

    operation: str
    backend: str
    dtype: str
    precision: str
    worst: Worst | None
    times: Times | None = None
    raised: str = ""

    @property
    def holds(self) -> bool:
        return self.worst is not None and self.worst.share <= 1

    @property
    def said(self) -> str:
        """What is wrong, in words; "" where nothing is."""
        where = f"{self.operation} ({self.backend}, {self.dtype}, {self.precision})"
        if self.worst is None:
            return f"{where} raised {self.raised}"
        found = f"error {self.worst.error:.2g}, bound {self.worst.bound:.2g} ({self.worst.shape})"
        return "" if self.holds else f"{where}: {found}"

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON; numbers that JSON has not are None."""
        found: dict[str, Any] = {
            name: getattr(self, name) for name in ("operation", "backend", "dtype", "precision")
        }
        found |= {"holds": self.holds, "raised": self.raised}
        found |= vars(self.worst or Worst(float("nan"), float("nan"), ""))
        found |= dict.fromkeys(Times._fields) if self.times is None else self.times._asdict()
        bad = [k for k, x in found.items() if isinstance(x, float) and not abs(x) < float("inf")]
        return found | dict.fromkeys(bad)


@dataclass(frozen=True)
class Report:
    """All rows, the machine, its measured rates, and why what is missing did not run."""

    rows: list[Row]
    machine: dict[str, Any]
    rates: Ceilings | None
    missing: dict[str, str]

    @property
    def broken(self) -> list[str]:
        """What is wrong, a line each."""
        return [row.said for row in self.rows if not row.holds]

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "rates": None if self.rates is None else vars(self.rates),
            "missing": self.missing,
            "broken": self.broken,
            "rows": [row.as_dict() for row in self.rows],
        }


def run(
    device: str | None = None,
    only: Sequence[str] = (),
    timed: bool = True,
    watch: Callable[[str], object] = lambda name: None,
) -> Report:
    """Check what can run on a device. Under Triton's interpreter nothing is timed.

    Args:
        device: "cpu" or "cuda"; default: CUDA where there is one.
        only: names of operations; default: all.
        timed: False leaves out the times.
        watch: called with the name of each before it runs.

    Raises:
        InputError: a device that is not here, a name that is no operation.
    """
    where, known = _device(device), entries()
    for name in only:
        check_choice("only", name, tuple(known))
    rates = ceilings(where) if timed and not interpreted() else None
    rows = []
    for name in only or known:
        watch(name)
        for backend, dtype, precision in _ways(known[name], where):
            with torch.no_grad():
                row = _row(known[name], where, backend, dtype, precision, rates)
            rows += [] if row is None else [row]
    return Report(rows, _machine(where), rates, _missing(where))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
    check_choice("device", name, ("cpu", "cuda"))
    if name == "cuda" and interpreted():
        raise InputError("device='cuda' is not where the interpreter runs kernels; use 'cpu'")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda' is not here; use 'cpu', and --interpret for the kernels")
    return torch.device(name)


def _missing(device: torch.device) -> dict[str, str]:
    info = backends()["triton"]
    if not info.available:
        return {"triton": info.reason}
    if device.type == "cpu" and not interpreted():
        return {"triton": "kernels run on a CUDA device, and device='cpu'"}
    return {}


def _machine(device: torch.device) -> dict[str, Any]:
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "imu_fast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device.type,
        "name": here,
        "threads": torch.get_num_threads(),
        "interpreted": interpreted(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _ways(entry: Entry, device: torch.device) -> Iterator[tuple[str, torch.dtype, str]]:
    """Backend, dtype, and precision of float32 products."""
    for dtype in KINDS:
        if entry.name == _SOLVER and dtype.itemsize >= 4:
            yield backend_of(torch.empty(1, 1, dtype=dtype, device=device)), dtype, "ieee"
        elif dtype.itemsize >= 4 or entry.half:
            yield "torch", dtype, "ieee"
    if not entry.has_kernel or not (device.type == "cuda" or interpreted()):
        return
    multiplies: Sequence[str] = getattr(entry.run, "products", ())
    # The interpreter multiplies in float32 whatever is asked: of those the two with other tiles.
    there = [one for one in PRECISIONS if one in multiplies] or ["ieee"]
    for precision in there[:2] if interpreted() else there:
        yield "triton", torch.float32, precision
    for dtype in (torch.bfloat16, torch.float16):
        yield "triton", dtype, at_least(precision_of([dtype]), there)


def _row(
    entry: Entry,
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    precision: str,
    rates: Ceilings | None,
) -> Row | None:
    """None where the backend takes no operands of this dtype."""
    which = (entry.name, backend, str(dtype).removeprefix("torch."), precision)
    timed = None if rates is None else entry.timed[device.type == "cuda"]
    try:
        chosen = nullcontext() if entry.name == _SOLVER else use_backend(backend)
        with chosen, use_precision(precision):
            found = worst(entry, device, backend, dtype, precision, timed)
            if found is None:
                return None
            # No time of what is wrong.
            right = found.share <= 1
            taken = times(entry, device, dtype, precision, rates) if right and rates else None
    except Exception as error:  # whatever this machine comes up with is what is to be found out
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(*which, None, raised=said)
    return Row(*which, found, taken)
