"""`python -m postroad_trainer.launch N`: N trainer ranks on this machine, each a process of its own.

The first rank that fails takes the others with it, and its exit code is passed on: a supervisor tells "it can't go on as
it is configured" (3) from "start it again". Ranks die with this process, even after a kill -9.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from postroad.supervisor.processes import die_with_parent


def launch(command: Sequence[str], processes: int) -> int:
    """Runs `command` in `processes` ranks until all have ended. The exit code of the first that failed, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        for process in ranks:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(processes):
            environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # a session of its own: a signal to this process's group reaches a rank once, by `forward`
            process = subprocess.Popen(
                list(command), env=environment, preexec_fn=die_with_parent, start_new_session=True
            )
            ranks.append(process)
        return _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    descriptors = {os.pidfd_open(process.pid): process for process in ranks}
    try:
        while descriptors:
            for descriptor in select.select(descriptors, [], [])[0]:
                os.close(descriptor)
                if code := descriptors.pop(descriptor).wait():
                    return code if code > 0 else 128 - code
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(launch([sys.executable, "-m", "postroad_trainer"], int(sys.argv[1])))
