"""A large vocabulary through the public calls: ``python bench/implicit_head.py``.

1,024 tokens in batches of 128, width 1,024, 128,000 classes, scored under the diagonal Fisher.
Memory is the rise of a process's peak resident memory over what it was with model and batches at
hand; time is beside the closed form with logits stored (one product for the logits, three for mean
gradient, Fisher diagonal and scores; the fastest of three runs of each, in turn, in one process).
"""

from __future__ import annotations

import json
import subprocess
import sys

CALLS = ("scores of a model", "from_head and scores", "closed form, logits stored")
TOKENS, CLASSES, WIDTH, BATCH = 1_024, 128_000, 1_024, 128

CODE = """
import json, resource, sys, time, torch
calls, repeats = sys.argv[1].split(";"), int(sys.argv[2])
tokens, classes, width, batch = map(int, sys.argv[3:])
torch.manual_seed(0)
import imu_fast as imu
imu.influence_scores(torch.nn.Linear(4, 2), (torch.randn(6, 4), torch.arange(6) % 2))
torch.randn(256, 256) @ torch.randn(256, 256)
model = torch.nn.Linear(width, classes, bias=False)
x, y = torch.randn(tokens, width), torch.randint(classes, (tokens,))
batches = list(zip(x.split(batch), y.split(batch)))
weight = model.weight.detach()

def stored():
    delta = torch.softmax(x @ weight.T, dim=1)
    delta[torch.arange(tokens), y] -= 1
    v = delta.T @ x / tokens
    v /= (delta.square().T @ x.square() / tokens).add_(1e-2)
    return -((delta @ v) * x).sum(dim=1)

run = {
    "scores of a model": lambda: imu.influence_scores(model, batches),
    "from_head and scores": lambda: imu.influence_scores(
        imu.GradientFactors.from_head(x, weight, None, y)
    ),
    "closed form, logits stored": stored,
}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before, best, found = peak(), {}, {}
for _ in range(repeats):
    for call in calls:
        start = time.perf_counter()
        found[call] = run[call]()
        best[call] = min(best.get(call, float("inf")), time.perf_counter() - start)
truth = found[calls[-1]]
error = {call: float((found[call] - truth).norm() / truth.norm()) for call in calls}
print(json.dumps({"rise": peak() - before, "seconds": best, "error": error}))
"""


def measured(calls: tuple[str, ...], repeats: int) -> dict:
    sizes = map(str, (TOKENS, CLASSES, WIDTH, BATCH))
    command = [sys.executable, "-c", CODE, ";".join(calls), str(repeats), *sizes]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    rise = {call: measured((call,), 1)["rise"] for call in CALLS}
    timed = measured(CALLS, 3)
    least = timed["seconds"][CALLS[-1]]
    print(f"{TOKENS} tokens, {CLASSES} classes, width {WIDTH}, batches of {BATCH}")
    print(f"{'':28} {'memory GiB':>10} {'seconds':>8} {'ratio':>6} {'difference':>10}")
    for call in CALLS:
        seconds = timed["seconds"][call]
        print(
            f"{call:28} {rise[call]:10.3f} {seconds:8.2f} {seconds / least:6.2f} "
            f"{timed['error'][call]:10.1e}"
        )


if __name__ == "__main__":
    main()
