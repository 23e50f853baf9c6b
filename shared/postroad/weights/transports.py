"""How a reader gets buckets out of a source's image: the memory itself on the same host, TCP, a shared folder, NIXL.

Readers block: each is used by one thread. None waits longer than `stall_s` without a byte, or past the deadline.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from postroad.weights.manifest import Manifest
from postroad.weights.nixl import NixlProcess
from postroad.weights.protocol import WeightsError
from postroad.weights.slices import whole, within
from postroad.weights.snapshot import Image

HEADER = struct.Struct(">q")
KEY_IS_WRONG, RELEASED = -1, -2
REQUEST_BYTES = 64 * 1024 * 1024
REQUEST_RANGES = 1000
_CHUNK_BYTES = 1024 * 1024  # stays in the cache


class Wanted(NamedTuple):
    """`target` (uint8) is to hold what lies at `offset` of the source's image: bucket `number`, or its delta."""

    number: int
    offset: int
    target: np.ndarray
    is_delta: bool = False


@dataclass(frozen=True)
class Pull:
    """What a reader may need to know of the pull that it works for."""

    manifest: Manifest
    key: str
    staging: Image  # where every target lies, except those of deltas
    stall_s: float
    end: float  # time.monotonic() of the deadline
    nixl: NixlProcess

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise WeightsError("deadline passed")


class Reader(ABC):
    """An open way to one source. The constructor takes (endpoint, pull) and raises OSError or WeightsError."""

    deltas = False  # is it worth to fetch a delta and to apply it, rather than the bucket?

    def __init__(self, endpoint: dict[str, Any], pull: Pull) -> None:
        self.endpoint, self.pull = endpoint, pull

    @abstractmethod
    def read(self, wanted: Sequence[Wanted]) -> Generator[Wanted, None, None]:
        """Fill the targets and give back each as it is full, in any order. Raises OSError or WeightsError."""

    @abstractmethod
    def close(self) -> None: ...


def host_identity() -> str:
    """The same for two processes that can see each other's /proc entries."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


class SharedMemoryReader(Reader):
    """Reads the source's memfd through /proc: same host, same user, same pid namespace."""

    @staticmethod
    def endpoint_of(image: Image) -> dict[str, Any]:
        where = {"host": host_identity(), "pid": os.getpid(), "descriptor": image.descriptor, "memory": image.name}
        return {"transport": "shared_memory", **where}

    def __init__(self, endpoint: dict[str, Any], pull: Pull) -> None:
        super().__init__(endpoint, pull)
        if endpoint["host"] != host_identity():
            raise WeightsError("the source's shared memory is on another host")
        path = f"/proc/{endpoint['pid']}/fd/{endpoint['descriptor']}"
        if os.readlink(path) != f"/memfd:{endpoint['memory']} (deleted)":
            raise WeightsError(f"{path} no longer holds {endpoint['memory']}: it was released")
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, wanted: Sequence[Wanted]) -> Generator[Wanted, None, None]:
        for item in wanted:
            self.pull.check()
            done = 0
            while done < item.target.size:
                count = os.preadv(self._descriptor, [item.target[done:].data], item.offset + done)
                if count == 0:
                    raise WeightsError(f"the image ends at byte {item.offset + done}")
                done += count
            yield item

    def close(self) -> None:
        os.close(self._descriptor)


class TcpReader(Reader):
    """Reads from the source's ImageServer; the next request is there before the last one's bytes are."""

    deltas = True

    def __init__(self, endpoint: dict[str, Any], pull: Pull) -> None:
        super().__init__(endpoint, pull)
        self._socket = socket.create_connection((endpoint["address"], endpoint["port"]), timeout=pull.stall_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # the kernel's own timeout: a blocking read of a whole bucket needs fewer calls than Python's
        seconds, rest = divmod(pull.stall_s, 1)
        self._socket.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(rest * 1e6)))

    def read(self, wanted: Sequence[Wanted]) -> Generator[Wanted, None, None]:
        asked: deque[list[Wanted]] = deque()
        requests = _requests(wanted)
        for request in requests:
            self._ask(request)
            asked.append(request)
            if len(asked) == 2:
                yield from self._answer(asked.popleft())
        while asked:
            yield from self._answer(asked.popleft())

    def _ask(self, request: list[Wanted]) -> None:
        ranges = [[item.offset, item.target.size] for item in request]
        question = {"key": self.pull.key, "version": self.pull.manifest.version, "ranges": ranges}
        self._socket.sendall(json.dumps(question).encode() + b"\n")

    def _answer(self, request: list[Wanted]) -> Generator[Wanted, None, None]:
        header = np.empty(HEADER.size, dtype=np.uint8)
        self._fill(header)
        (size,) = HEADER.unpack(header.tobytes())
        if size == KEY_IS_WRONG:
            raise WeightsError("the source refused: the key is wrong")
        if size != sum(item.target.size for item in request):
            raise WeightsError(f"version {self.pull.manifest.version} is released at the source")
        for item in request:
            self._fill(item.target)
            yield item

    def _fill(self, target: np.ndarray) -> None:
        view, done = target.data, 0
        while done < len(view):
            self.pull.check()
            try:
                count = self._socket.recv_into(view[done : done + _CHUNK_BYTES], 0, socket.MSG_WAITALL)
            except BlockingIOError as error:
                raise WeightsError(f"the source sent nothing for {self.pull.stall_s:g} s") from error
            if count == 0:
                raise WeightsError("the source closed the connection in mid-read")
            done += count

    def close(self) -> None:
        self._socket.close()


def _requests(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    request: list[Wanted] = []
    size = 0
    for item in sorted(wanted, key=lambda item: item.offset):
        if request and (size + item.target.size > REQUEST_BYTES or len(request) == REQUEST_RANGES):
            yield request
            request, size = [], 0
        request.append(item)
        size += item.target.size
    if request:
        yield request


class FolderReader(Reader):
    """Reads a safetensors file in a folder that both sides see, and that is a checkpoint for other tools."""

    def __init__(self, endpoint: dict[str, Any], pull: Pull) -> None:
        super().__init__(endpoint, pull)
        self._file = np.memmap(endpoint["path"], dtype=np.uint8, mode="r")
        start = 8 + int(self._file[:8].view("<u8")[0])
        header = json.loads(self._file[8:start].tobytes())
        self._places = {
            name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def read(self, wanted: Sequence[Wanted]) -> Generator[Wanted, None, None]:
        manifest = self.pull.manifest
        for item in wanted:
            self.pull.check()
            bucket = manifest.buckets[item.number]
            entry = manifest.tensors[bucket.tensor]
            if entry.name not in self._places:
                raise WeightsError(f"{self.endpoint['path']} has no tensor {entry.name}")
            start, stop = self._places[entry.name]
            if stop - start != entry.size_bytes:
                raise WeightsError(f"{self.endpoint['path']}: {entry.name} has {stop - start} bytes")
            tensor = self._file[start:stop].reshape(*entry.shape, entry.item_size)
            cell = tensor[within(bucket.box, whole(entry.shape))]
            item.target.reshape(cell.shape)[...] = cell
            yield item

    def close(self) -> None:
        del self._file


def write_folder(path: Path, manifest_tensors: Sequence[tuple[str, str, tuple[int, ...], np.ndarray]]) -> None:
    """A safetensors file of whole tensors (name, dtype, shape, bytes), there in one moment."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8", "int32": "I32", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, data in manifest_tensors:
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + data.size]}
        offset += data.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for *_, data in manifest_tensors:
            file.write(data.data)
    temporary.rename(path)


class NixlReader(Reader):
    """Reads the source's registered memory into staging, in both cases through a process of its own."""

    def __init__(self, endpoint: dict[str, Any], pull: Pull) -> None:
        super().__init__(endpoint, pull)
        self._process = pull.nixl
        if not self._process.lock.acquire(timeout=max(0.0, pull.end - time.monotonic())):
            raise WeightsError("deadline passed while other sources were read through NIXL")
        try:
            self._base = int(self._process.register(pull.staging)["base"])
        except BaseException:
            self._process.lock.release()
            raise

    def read(self, wanted: Sequence[Wanted]) -> Generator[Wanted, None, None]:
        start = self.pull.staging.bytes.ctypes.data
        ranges = [
            [
                self.endpoint["base"] + item.offset,
                self._base + item.target.ctypes.data - start,
                item.target.size,
                number,
            ]
            for number, item in enumerate(wanted)
        ]
        for done in self._process.read(self.endpoint, ranges, self.pull.stall_s):
            yield from (wanted[number] for number in done)
            self.pull.check()

    def close(self) -> None:
        self._process.lock.release()


READERS: dict[str, Callable[[dict[str, Any], Pull], Reader]] = {
    "shared_memory": SharedMemoryReader,
    "nixl": NixlReader,
    "tcp": TcpReader,
    "folder": FolderReader,
}
