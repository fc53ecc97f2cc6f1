"""What a wheel is tried by where it is built: the extension loads, three lines run.

    python tests/wheel.py

Outside the repository's folder, with the wheel and torch alone.
"""

from __future__ import annotations

import time

began = time.perf_counter()
import torch  # noqa: E402
from torch import nn  # noqa: E402

with_torch = time.perf_counter()
import imu_fast as imu  # noqa: E402


def main() -> None:
    imported = time.perf_counter()
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    forget = torch.randn(32, 8), torch.arange(32) % 4
    scores = imu.influence_scores(model, forget)
    first = time.perf_counter()
    indices, _ = imu.influence_weights(scores)
    result = imu.unlearn(model, forget, epochs=1)

    extension = imu.backends()["extension"]
    assert extension.available, extension.reason
    a, b = torch.randn(5, 9, 9), torch.randn(5, 9)
    a = a @ a.mT
    x = imu.damped_cholesky_solve(a, b, 1.0)
    torch.testing.assert_close(x, torch.linalg.solve(a + torch.eye(9), b), rtol=1e-4, atol=1e-5)
    print(f"torch {torch.__version__}, {imu.__file__}")
    print(f"import torch {with_torch - began:.2f} s, imu_fast {imported - with_torch:.3f} s")
    print(f"first score {first - imported:.3f} s; {len(indices)} weights; {result}")


if __name__ == "__main__":
    main()
