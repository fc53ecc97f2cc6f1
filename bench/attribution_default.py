"""How the default of data attribution was chosen: ``python bench/attribution_default.py FOLDER``.

Linear datamodeling scores on digits, as ``imu-fast validate`` makes them, of curvatures whose
damping is relative to the mean eigenvalue, at the head and at all layers: the means over the
development queries, then those of the others at the best of them. FOLDER keeps what the retrained
models' losses are.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from imu_fast.curvature.named import CURVATURES
from imu_fast.evaluation.validate import Candidate, _influence, validate
from imu_fast.study.data.tasks import load_dataset
from imu_fast.study.validation import _SIZES, _digits_network

SIZE = _SIZES["digits"]
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HEAD = [(name, {}) for name in ("ekfac", "kfac", "ggn_block", "ggn", "fisher_diag")]
HEAD.append(("ekfac", {"fisher": "empirical"}))
LAYERS = [(name, {"fisher": "sampled"}) for name in ("kfac", "ekfac")]
LAYERS += [("ekfac", {"fisher": "empirical"}), ("ekfac", {"fisher": "exact"}), ("fisher_diag", {})]


def candidates() -> dict[str, Candidate]:
    found = {}
    for where, chosen in (("head", HEAD), (SIZE["layers"], LAYERS)):
        for curvature, options in chosen:
            specs = {
                f"{d:g}": CURVATURES.choose(
                    curvature, damping=d, damping_mode="relative", **options
                )
                for d in DAMPINGS
            }
            of = "head" if where == "head" else "all layers"
            name = ", ".join([curvature, *options.values(), of])
            found[name] = Candidate({k: _influence(s, where) for k, s in specs.items()})
    return found


def main(folder: Path) -> None:
    data = load_dataset("digits", None, SIZE["samples"], 0)
    queries = tuple(part[: SIZE["queries"]] for part in data.test)
    found = validate(
        partial(_digits_network, SIZE["epochs"]),
        data.train,
        (queries[0], queries[1]),
        folder=folder,
        extra=candidates(),
        without=[*CURVATURES, "TRAK", "gradient cosine", "the sample's loss", "random"],
    )
    for row in found.grid:
        print(f"{row['candidate']}, {row['setting']}: {row['development']:.3f}")
    for row in found.lds:
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        print(f"{row['candidate']}, {row['setting']}: {row['lds']:.3f} ({interval})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
