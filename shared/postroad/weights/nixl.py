"""NIXL (UCX: RDMA, shared memory, TCP): the reader's and the source's hold on a process that speaks it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from postroad.weights.protocol import WeightsError
from postroad.weights.snapshot import Image

MODULES = ("nixl_cu13", "nixl_cu12")
START_S = 30.0
ANSWER_S = 10.0
_MESSAGE_BYTES = 128 * 1024
_RANGES = 1000  # in one message


def installed() -> str:
    """The module that has NIXL here, or ""."""
    return next((f"{name}._api" for name in MODULES if find_spec(name) is not None), "")


class NixlProcess:
    """One agent, started when it is first needed. A fault ends it; the next use starts another."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one user at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._registered: dict[str, dict[str, Any]] = {}

    def register(self, image: Image) -> dict[str, Any]:
        """Give the agent `image`, if it has not got it; {"metadata", "base"}."""
        known = self._registered.get(image.name)
        if known is None or known["size_bytes"] != image.size_bytes:
            order = {"do": "register", "name": image.name, "size_bytes": max(image.size_bytes, 1)}
            answer = self._ask(order, image.descriptor)
            known = self._registered[image.name] = {**answer, "size_bytes": image.size_bytes}
        return known

    def release(self, name: str) -> None:
        if self._registered.pop(name, None) is not None:
            self._ask({"do": "release", "name": name})

    def read(self, endpoint: dict[str, Any], ranges: Sequence[list[int]], stall_s: float) -> Iterator[list[int]]:
        """Read [remote address, local address, size, number]; the numbers that are done, as they are. Raises
        WeightsError at a fault or after `stall_s` without one; then the process is gone, and writes nothing more."""
        try:
            for first in range(0, len(ranges), _RANGES):
                self._send({"do": "range", "ranges": list(ranges[first : first + _RANGES])})
            self._send({"do": "read", "metadata": endpoint["metadata"]})
            while "end" not in (answer := self._receive(stall_s)):
                yield answer["done"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._process is not None and self._socket is not None:
            self._process.kill()
            self._process.wait()
            self._socket.close()
        self._process, self._socket, self._registered = None, None, {}

    def _start(self) -> socket.socket:
        module = installed()
        if not module:
            raise WeightsError("NIXL is not installed here: pip install 'postroad[rdma]'")
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            script = str(Path(__file__).with_name("nixl_process.py"))
            command = [sys.executable, script, str(theirs.fileno()), module]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        self._socket = ours
        self._receive(START_S)
        return ours

    def _ask(self, order: dict[str, Any], descriptor: int | None = None) -> dict[str, Any]:
        try:
            self._send(order, descriptor)
            return self._receive(ANSWER_S)
        except BaseException:
            self.close()
            raise

    def _send(self, order: dict[str, Any], descriptor: int | None = None) -> None:
        to = self._socket if self._socket is not None else self._start()
        to.settimeout(ANSWER_S)
        socket.send_fds(to, [json.dumps(order).encode()], [] if descriptor is None else [descriptor])

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        if self._socket is None:
            raise WeightsError("the NIXL process was ended")
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(_MESSAGE_BYTES)
        except TimeoutError as error:
            raise WeightsError(f"NIXL moved nothing for {timeout_s:g} s") from error
        if not data:
            raise WeightsError("the NIXL process died")
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise WeightsError(f"NIXL: {answer['error']}")
        return answer
