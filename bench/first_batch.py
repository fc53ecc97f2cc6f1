"""Memory that scoring a first batch takes beside a bare forward: ``python bench/first_batch.py``.

Each is measured in a process of its own, as the rise of its peak resident memory over what it was
with model and batch at hand; a bare forward of one sample has loaded the libraries by then.
"""

from __future__ import annotations

import json
import subprocess
import sys

MODELS = ("timm:vit_small_patch16_224", "torchvision:vit_b_16", "torchvision:resnet18")
BATCH = 32

CODE = """
import gc, json, resource, sys, torch
what, name, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
library, _, arch = name.partition(":")
if library == "timm":
    import timm
    model = timm.create_model(arch, pretrained=False).eval()
else:
    import torchvision
    model = torchvision.models.get_model(arch, weights=None).eval()
x, y = torch.randn(batch, 3, 224, 224), torch.arange(batch)
import imu_fast as imu
imu.influence_scores(torch.nn.Linear(4, 2), (torch.randn(6, 4), torch.arange(6) % 2))
with torch.no_grad():
    model(x[:1])
gc.collect()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
if what == "forward":
    with torch.no_grad():
        model(x)
else:
    imu.influence_scores(model, [(x, y)])
print(json.dumps(peak() - before))
"""


def risen(what: str, model: str) -> float:
    """MB."""
    command = [sys.executable, "-c", CODE, what, model, str(BATCH)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    print(f"{'model':32} {'bare forward':>13} {'scores':>9} {'ratio':>6}   MB, a batch of {BATCH}")
    for model in MODELS:
        forward, scores = (min(risen(what, model) for _ in range(3)) for what in ("forward", "s"))
        print(f"{model:32} {forward:13.0f} {scores:9.0f} {scores / forward:6.2f}")


if __name__ == "__main__":
    main()
