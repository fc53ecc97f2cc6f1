"""``imu-fast`` in two processes, as torchrun starts them: ``python commands.py FOLDER ARGUMENTS``.

Several commands have ``--then`` between them; what each process says goes to ``said-RANK-NUMBER``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch.distributed as dist
from processes import forked

from imu_fast.cli.app import app

WORLD = 2


def main():
    folder, commands = Path(sys.argv[1]), [[]]
    sys.path.insert(0, str(folder))
    for argument in sys.argv[2:]:
        if argument == "--then":
            commands.append([])
        else:
            commands[-1].append(argument)
    # Held here, as torchrun's agent does: a port that is free now need not be free later.
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in commands
    ]

    def body(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0"}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        for number, command in enumerate(commands):
            os.environ["MASTER_PORT"] = str(stores[number].port)
            with open(folder / f"said-{rank}-{number}", "w") as said:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    code = app(command, standalone_mode=False)
                said.write(f"code {code or 0}\n")

    forked(WORLD, body)


if __name__ == "__main__":
    main()
