"""``imu-fast split``: a set of images in two, what is to be forgotten and what stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from imu_fast.errors import InputError


def split(
    data: Annotated[
        Path, typer.Option(help="A folder with a sub-folder per class, or .npz (x, y).")
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            help="Forget these, commas between: class indices of an .npz, names of sub-folders."
        ),
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Forget so many of all, drawn by --seed; in (0, 1).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of --fraction; default 0.")] = None,
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("split"),
) -> None:
    """Split data into what is to be forgotten and what stays, each as the data was.

    Of an .npz: OUT/forget.npz and OUT/retain.npz. Of a folder: OUT/forget/ and OUT/retain/, with
    the sub-folders of their classes, their images hard links where the file system has them.
    """
    from imu_fast.cli.score_files import check_new_folder, write_or_rescue
    from imu_fast.data.image_files import read_arrays
    from imu_fast.storage import replacing_folder

    if (classes is None) == (fraction is None):
        raise InputError(
            f"classes={classes!r}, fraction={fraction!r}: pass exactly one, --classes or --fraction"
        )
    check_new_folder(out)
    here, there = (Path(os.path.realpath(path)) for path in (out, data))
    if data.is_dir() and there in (here, *here.parents):
        raise InputError(
            f"out={str(out)!r} is in data={str(data)!r}, where it would be a class; choose another"
        )
    how: dict[str, Any] = {"fraction": fraction, "seed": seed}
    if data.is_dir():
        counts = _folder(data, out, classes, how)
    else:
        x, y = read_arrays(data)
        chosen = None if classes is None else _indices(classes)
        from imu_fast.unlearning.split import split as library

        parts = library((x, y), classes=chosen, **how)
        check_new_folder(out, size=x.nbytes + y.nbytes)

        def write(path: Path) -> None:
            import numpy as np

            with replacing_folder(path) as temporary:
                for name, (inputs, labels) in zip(("forget", "retain"), parts, strict=True):
                    np.savez(temporary / f"{name}.npz", x=inputs, y=labels)

        write_or_rescue(out, write)
        counts = [len(part[0]) for part in parts]
    ending = "/" if data.is_dir() else ".npz"
    typer.echo(
        f"{counts[0]} to forget, {counts[1]} stay: forget{ending} and retain{ending} are in {out}/"
    )
    if data.is_dir():
        typer.echo(f"pass --classes {data} with them, which says which class a sub-folder is")


def _indices(classes: str) -> list[int]:
    try:
        return [int(name) for name in classes.split(",")]
    except ValueError:
        raise InputError(
            f"classes={classes!r}: of an .npz, class indices, such as 3 or 3,7"
        ) from None


def _folder(data: Path, out: Path, classes: str | None, how: dict[str, Any]) -> list[int]:
    """Write both parts of an image folder; how many images each has."""
    import numpy as np

    from imu_fast.cli.score_files import write_or_rescue
    from imu_fast.data.image_files import list_images
    from imu_fast.storage import replacing_folder
    from imu_fast.unlearning.split import split as library

    names, labels, known = list_images(data)
    chosen: list[int] | None = None
    if classes is not None:
        wanted = [name.strip() for name in classes.split(",")]
        if unknown := [name for name in wanted if name not in known]:
            raise InputError(
                f"classes={classes!r}: data={str(data)!r} has no sub-folder {unknown[0]!r}; it has "
                f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
            )
        chosen = [known.index(name) for name in wanted]
    parts = library((np.arange(len(names)), np.array(labels)), classes=chosen, **how)

    def write(path: Path) -> None:
        with replacing_folder(path) as temporary:
            for part, (rows, _) in zip(("forget", "retain"), parts, strict=True):
                for row in rows.tolist():
                    _link(data / names[row], temporary / part / names[row])

    write_or_rescue(out, write)
    return [len(rows) for rows, _ in parts]


def _link(source: Path, target: Path) -> None:
    """The image itself, not a link that a moved folder would break."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(real, target)
