"""NIXL in a process of its own: `python nixl_process.py DESCRIPTOR`, a socket of JSON messages (and memory, as
descriptors) to its parent.

UCX has no deadline, may go on writing into a buffer whose read was given up, and ends a process when it is confused.
Here the parent may kill it at any time: after that nothing writes into the memory, and the parent has lost nothing.
Run by path, so that it imports neither postroad nor torch.
"""

from __future__ import annotations

import base64
import importlib
import json
import mmap
import os
import socket
import sys
import time
from collections import deque
from typing import Any

import numpy as np

BATCH_BYTES = 16 * 1024 * 1024
IN_FLIGHT = 4
POLL_S = 0.0002
PROGRESS_US = 1000  # 2 % of a core when idle
MESSAGE_BYTES = 128 * 1024


class Agent:
    """A NIXL agent with the memory that it was given. Calls are made by the one thread of this process."""

    def __init__(self) -> None:
        module = importlib.import_module(sys.argv[2])
        make_agent = module.nixlBind.nixlAgent

        def paced(name: str, config: Any) -> Any:  # NIXL's own API sets 0: a progress thread that takes a whole core
            config.pthrDelay = PROGRESS_US
            return make_agent(name, config)

        module.nixlBind.nixlAgent = paced
        config = module.nixl_agent_config(backends=["UCX"])
        self._nixl = module.nixl_agent(f"postroad-{os.uname().nodename}-{os.getpid()}", config)
        self._memory: dict[str, tuple[mmap.mmap, Any]] = {}
        self._peers: dict[str, str] = {}

    def register(self, name: str, size: int, descriptor: int) -> dict[str, Any]:
        """Map and register the memory behind `descriptor`; how others read it."""
        self.release(name)
        memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        self._memory[name] = (memory, self._nixl.register_memory([(address, size, 0, name)], "DRAM"))
        metadata = base64.b64encode(self._nixl.get_agent_metadata()).decode()
        return {"metadata": metadata, "base": address}

    def release(self, name: str) -> dict[str, Any]:
        if name in self._memory:
            _, registered = self._memory.pop(name)
            self._nixl.deregister_memory(registered)
        return {"released": name}

    def read(self, peer: str, ranges: list[list[int]], tell: Any) -> None:
        """Read [remote address, local address, size, number]; several batches in flight, each told as it is done."""
        waiting = deque(_batches(ranges))
        running: list[tuple[Any, list[int]]] = []
        while waiting or running:
            if waiting and len(running) < IN_FLIGHT:
                batch = waiting.popleft()  # one at a time: UCX may do all of it here, and what is done can be verified
                local = self._nixl.get_xfer_descs([(there, size, 0) for _, there, size, _ in batch], "DRAM")
                remote = self._nixl.get_xfer_descs([(here, size, 0) for here, _, size, _ in batch], "DRAM")
                handle = self._nixl.initialize_xfer("READ", local, remote, peer)
                self._nixl.transfer(handle)
                running.append((handle, [number for *_, number in batch]))
            else:
                time.sleep(POLL_S)
            for handle, numbers in list(running):
                state = self._nixl.check_xfer_state(handle)
                if state == "DONE":
                    running.remove((handle, numbers))
                    self._nixl.release_xfer_handle(handle)
                    tell({"done": numbers})
                elif state != "PROC":
                    raise RuntimeError(f"NIXL says {state}")

    def peer(self, metadata: str) -> str:
        """The name of the agent that `metadata` describes; a source describes itself anew when its memory changes."""
        if metadata not in self._peers:
            name = self._nixl.add_remote_agent(base64.b64decode(metadata))
            name = name.decode() if isinstance(name, bytes) else name
            self._peers = {known: peer for known, peer in self._peers.items() if peer != name} | {metadata: name}
        return self._peers[metadata]


def _batches(ranges: list[list[int]]) -> list[list[list[int]]]:
    batches: list[list[list[int]]] = []
    size = BATCH_BYTES
    for entry in ranges:
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(entry)
        size += entry[2]
    return batches


def main() -> None:
    parent = socket.socket(fileno=int(sys.argv[1]))
    agent = Agent()

    def tell(answer: dict[str, Any]) -> None:
        parent.send(json.dumps(answer).encode())

    tell({"ready": True})
    ranges: list[list[int]] = []
    while True:
        data, descriptors, _, _ = socket.recv_fds(parent, MESSAGE_BYTES, 1)
        if not data:
            os._exit(0)  # the parent is gone; UCX's threads are not worth waiting for
        order = json.loads(data)
        try:
            match order["do"]:
                case "register":
                    tell(agent.register(order["name"], order["size_bytes"], descriptors[0]))
                case "release":
                    tell(agent.release(order["name"]))
                case "range":
                    ranges += order["ranges"]
                case "read":
                    agent.read(agent.peer(order["metadata"]), ranges, tell)
                    ranges = []
                    tell({"end": True})
        except Exception as error:  # noqa: BLE001  the only loop of this process; the parent gets the reason, and ends it
            tell({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
