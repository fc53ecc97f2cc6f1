"""The report as tables for the terminal, drawn by rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rich.table import Table

from imu_fast.check.check import Report, Row

# From this many columns on the operation has a column of its own, else a line above its rows.
_WIDE = 110
_COLUMNS = {"backend": 9, "dtype": 14, "error": 7, "bound": 7}
_TIMES = {"ours, ms": 8, "torch, ms": 9, "faster": 6, "of floor": 8}


def title(report: Report) -> str:
    machine = report.machine
    on = machine["name"] + (", Triton's interpreter" if machine["interpreted"] else "")
    threads = "" if machine["device"] != "cpu" else f", threads: {machine['threads']}"
    held = sum(row.holds for row in report.rows)
    return f"{held} of {len(report.rows)} within their bounds; {on}{threads}"


def tables(report: Report, width: int) -> list[Table | str]:
    """A line for each operation, backend and dtype; times where they were taken."""
    timed, names = report.rates is not None, list(dict.fromkeys(r.operation for r in report.rows))
    groups = [[row for row in report.rows if row.operation == name] for name in names]
    if width >= _WIDE:
        whole = _empty(timed, header=True, name=max(map(len, names)))
        for group in groups:
            for i, row in enumerate(group):
                name = "" if i else row.operation
                whole.add_row(name, *_cells(row, timed), style=_style(row))
        return [whole]
    found: list[Table | str] = [_empty(timed, header=True)]
    for name, group in zip(names, groups, strict=True):
        part = _empty(timed, header=False)
        for row in group:
            part.add_row(*_cells(row, timed), style=_style(row))
        found += [f"[bold]{name}[/bold]", part]
    return found


def _style(row: Row) -> str:
    return "" if row.holds else "red"


def _empty(timed: bool, header: bool, name: int = 0) -> Table:
    """Columns of fixed widths, so that those of several tables are below each other."""
    found = Table(box=None, padding=(0, 1, 0, 0), show_header=header, header_style="bold")
    if name:
        found.add_column("operation", no_wrap=True, width=name)
    for column, width in {**_COLUMNS, **(_TIMES if timed else {})}.items():
        text = column in ("backend", "dtype")
        justify: Literal["left", "right"] = "left" if text else "right"
        found.add_column(column, justify=justify, no_wrap=True, width=width)
    return found


def _cells(row: Row, timed: bool) -> Iterator[str]:
    yield from (
        row.backend,
        row.dtype if row.precision == "ieee" else f"{row.dtype} {row.precision}",
    )
    if row.worst is None:
        yield from ("raised", "")
    else:
        yield from (f"{row.worst.error:.1e}", f"{row.worst.bound:.1e}")
    if timed and row.times is not None:
        yield from (f"{1e3 * row.times.seconds:.2f}", f"{1e3 * row.times.plain:.2f}")
        yield f"{row.times.plain / row.times.seconds:.2f}x"
        yield f"{100 * row.times.floor / row.times.seconds:.0f} %"


def notes(report: Report) -> list[str]:
    """What the numbers are, what did not run and why, and last what is broken."""
    said = [
        "error: against the definition in float64, of the entry nearest to its bound, which follows"
        " from the dtype and the lengths of the sums."
    ]
    if report.rates is not None:
        gigabytes = report.rates.bytes_per_second / 1e9
        rates = ", ".join(
            f"{kind} {report.rates.flops_per_second[kind] / 1e9:,.0f}" for kind in ("fp32", "fp64")
        )
        said.append(
            "torch: as a good user writes it, in turns with ours. floor: what its bytes or FLOPs,"
            " whichever is more, take as a bare copy or product of matrices, in the same turns;"
            " more than 100 % where ours reads from a cache."
            f" Here {gigabytes:,.1f} GB/s and, in GFLOP/s, {rates}. Times never fail a check."
        )
    said += [f"{name}: not run, {why}" for name, why in report.missing.items()]
    return said + [f"BROKEN: {line}" for line in report.broken]
