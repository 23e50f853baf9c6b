"""Runs inside bubblewrap: forks an interpreter per job, each in pid, mount and IPC namespaces of its own.

Standard library only: the service passes this file's text to the sandbox's python. It never runs a job's code itself.
What it and the service say are frames: 4 bytes of length, then JSON.

A job is two processes: the first of its pid namespace waits for the order, sets the limits, forks the one that runs the
code, and reports how that ended. When it is gone the kernel has killed all that the job started.
"""

from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import ctypes
import json
import linecache
import os
import resource
import select
import signal
import site
import struct
import sys
import threading
import time
import traceback
import types
from typing import Any

NEW_NAMESPACES = 0x00020000 | 0x08000000  # CLONE_NEWNS, CLONE_NEWIPC
NEW_USER, NEW_PID = 0x10000000, 0x20000000
NO_SET_UID, NO_DEVICES, NO_EXECUTION = 2, 4, 8  # MS_NOSUID, MS_NODEV, MS_NOEXEC
DROP_BOUND, SET_SECCOMP, SET_SECURE_BITS, FILTER_MODE = 24, 22, 28, 2
NO_ROOT = 0x2F  # SECBIT_NOROOT and NO_SETUID_FIXUP, locked, and KEEP_CAPS locked off
BROKEN = 70  # exit code of a job's first process where it could not set the job up
ORDERS, REPORTS = 60, 61  # descriptors of a job's processes
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def read_frame(descriptor: int) -> Any:
    """None at the end of the stream."""
    header = read_exactly(descriptor, 4)
    return json.loads(read_exactly(descriptor, struct.unpack(">I", header)[0])) if header else None


def read_exactly(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := os.read(descriptor, size - len(data))):
        data += part
    return bytes(data)


def write_frame(descriptor: int, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    left = memoryview(struct.pack(">I", len(data)) + data)
    while left:
        left = left[os.write(descriptor, left) :]


class Cage:
    """What every job of this sandbox gets."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.limits, self.uid = order["limits"], order["uid"]
        self.filter = base64.b64decode(order["filter"])
        sys.path.append("/packages")
        for name in order["imports"]:
            __import__(name)

    def enter(self) -> None:
        """Namespaces, the private /tmp and, for good, no capability."""
        call("unshare", NEW_NAMESPACES)
        options = f"size={self.limits['disk_bytes']},nr_inodes=4096,mode=0777".encode()
        call("mount", b"tmpfs", b"/tmp", b"tmpfs", NO_SET_UID | NO_DEVICES | NO_EXECUTION, options)
        os.chdir("/tmp")
        for capability in range(64):
            libc.prctl(DROP_BOUND, capability, 0, 0, 0)  # the last one that the kernel knows ends this
        call("prctl", SET_SECURE_BITS, NO_ROOT, 0, 0, 0)
        nothing = ctypes.create_string_buffer(struct.pack("II6I", 0x20080522, 0, *[0] * 6))
        call("capset", nothing, ctypes.byref(nothing, 8))

    def limit(self, seconds: float) -> None:
        """The limits and the filter. A core limit of 1 byte, unlike 0, also keeps a crash from the program that
        core_pattern may name (core(5))."""
        memory, seconds = self.limits["memory_bytes"], int(seconds) + 2
        for what, value in (
            (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 1),
            (resource.RLIMIT_FSIZE, self.limits["disk_bytes"]), (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_NPROC, self.limits["processes"] + 2), (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):  # fmt: skip
            resource.setrlimit(what, (value, value))
        instructions = ctypes.create_string_buffer(self.filter, len(self.filter))
        program = struct.pack("HxxxxxxP", len(self.filter) // 8, ctypes.addressof(instructions))
        call("prctl", SET_SECCOMP, FILTER_MODE, program, 0, 0)


class Child:
    """The zygote's end of a job, which is started and waits for its order."""

    def __init__(self, cage: Cage, own: int) -> None:
        orders, self.orders = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        self.reports, reports = os.pipe()
        call("unshare", NEW_PID)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for old, new in ((stdout, 1), (stderr, 2), (orders, ORDERS), (reports, REPORTS)):
                    os.dup2(old, new)
                os.closerange(3, ORDERS)
                first(cage)
            except BaseException:  # noqa: BLE001  reported below
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(BROKEN)
        call("setns", own, NEW_PID)  # or the next unshare would fail
        for descriptor in (orders, stdout, stderr, reports):
            os.close(descriptor)
        self.pidfd = os.pidfd_open(self.pid)
        for descriptor in (self.stdout, self.stderr, self.reports):
            os.set_blocking(descriptor, False)

    def end(self) -> bool:
        """Kill the job and all that it started; returns when all of it is gone. True where it broke by our fault."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        for descriptor in (self.orders, self.stdout, self.stderr, self.reports, self.pidfd):
            os.close(descriptor)
        return os.waitstatus_to_exitcode(status) == BROKEN


def first(cage: Cage) -> None:
    """The first process of a job's pid namespace."""
    cage.enter()
    order = read_frame(ORDERS)
    if order is None:
        os._exit(0)
    for path, content in order["files"].items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(content))
    with open(".stdin", "w+b", 0) as file:
        file.write(base64.b64decode(order["stdin"]))
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.dup2(file.fileno(), 0)
    os.unlink(".stdin")
    cage.limit(order["life_s"])
    child = os.fork()
    if child == 0:
        try:
            session(order) if order["session"] else script(order)
        finally:
            os._exit(1)
    while (ended := os.wait())[0] != child:
        pass
    os.write(REPORTS, b"exit %d" % os.waitstatus_to_exitcode(ended[1]))
    os._exit(0)


def script(order: dict[str, Any]) -> None:
    os.closerange(ORDERS, REPORTS + 1)
    code = execute(order["code"], "<job>", main_module())
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of an interpreter does
    atexit._run_exitfuncs()
    flush()
    os._exit(code)


def session(order: dict[str, Any]) -> None:
    module, number = main_module(), 1
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what a cell printed before its deadline is seen
    while order is not None:
        code = execute(order["code"], f"<cell {number}>", module, leave=True, echo=True)
        flush()
        os.write(REPORTS, b"done %d" % code)
        order, number = read_frame(ORDERS), number + 1
    os._exit(0)


def main_module() -> types.ModuleType:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    site.setquit()
    sys.argv, sys.path[:0] = ["job"], ["/tmp"]  # /packages is there already
    if "numpy.random" in sys.modules:  # one of `imports`, whose generator every job would share
        sys.modules["numpy.random"].seed()
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    return module


def execute(code: str, name: str, module: types.ModuleType, *, leave: bool = False, echo: bool = False) -> int:
    """The exit code. `leave`: a SystemExit ends the process; `echo`: the value of a last expression is printed."""
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop().value if echo and tree.body and isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
        exec(compile(tree, name, "exec"), module.__dict__)
        if last is not None:
            value = eval(compile(ast.Expression(last), name, "eval"), module.__dict__)
            if value is not None:
                print(repr(value))
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        exit_code = (error.code if isinstance(error.code, int) else int(error.code is not None)) & 255
        if leave:
            flush()
            os._exit(exit_code)
        return exit_code
    except BaseException as error:  # noqa: BLE001  a job may raise anything
        frames = error.__traceback__ and error.__traceback__.tb_next  # without this function's own
        while frames is not None and frames.tb_frame.f_code.co_filename == ast.__file__:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        return 1
    return 0


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the job closed or replaced it
            stream.flush()


class Output:
    """What a job wrote to one descriptor, up to a limit."""

    def __init__(self, descriptor: int, limit: int) -> None:
        self.descriptor, self.limit, self.data = descriptor, limit, bytearray()

    def read(self) -> bool:
        """False at its end."""
        try:
            part = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return False
        self.data += part[: self.limit + 1 - len(self.data)]
        return bool(part)

    @property
    def full(self) -> bool:
        return len(self.data) > self.limit

    def text(self) -> str:
        while not self.full and self.read():
            pass
        return self.data[: self.limit].decode(errors="replace")


def serve(cage: Cage, child: Child, order: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Run one order. The answer, and whether the job lives on (a session)."""
    started = time.monotonic()
    outputs = [Output(child.stdout, cage.limits["output_bytes"]), Output(child.stderr, cage.limits["output_bytes"])]
    status, exit_code = "killed", None
    try:
        write_frame(child.orders, order)
        status, exit_code = watch(child, outputs, started + order["deadline_s"])
    except BrokenPipeError:  # it has ended by itself
        pass
    alive = status == "done"
    if alive:
        status = "error" if exit_code else "ok"
    texts = [output.text() for output in outputs]
    if status == "error" and texts[1].rstrip().rpartition("\n")[2].startswith("MemoryError"):
        status = "memory"
    answer = {"status": status, "exit_code": exit_code, "stdout": texts[0], "stderr": texts[1], "alive": alive}
    return {**answer, "seconds": time.monotonic() - started}, alive


def watch(child: Child, outputs: list[Output], deadline: float) -> tuple[str, int | None]:
    """Read what the job writes until it ends, reaches a limit or is to be killed: the status and the exit code."""
    poller = select.poll()
    streams = {output.descriptor: output for output in outputs}
    for descriptor in (*streams, child.reports, child.pidfd, 0):
        poller.register(descriptor, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(left * 1000 + 1):
            if descriptor in streams:
                if not streams[descriptor].read():
                    poller.unregister(descriptor)
                if streams[descriptor].full:
                    return "output", None
            elif descriptor == 0:
                order = read_frame(0)
                if order is None:
                    os._exit(0)
                return order["kill"], None
            elif (report := read_report(child)) is not None:
                return report
            elif descriptor == child.pidfd:
                return "killed", None
            else:
                poller.unregister(descriptor)
    return "timeout", None


def read_report(child: Child) -> tuple[str, int | None] | None:
    try:
        word, _, number = os.read(child.reports, 64).partition(b" ")
        code = int(number)
    except (BlockingIOError, ValueError):  # a session's code can write here too
        return None
    if word == b"done":
        return "done", code
    if word != b"exit":
        return None
    if code == -signal.SIGXCPU:
        return "timeout", None
    return "ok" if code == 0 else "error" if code > 0 else "killed", code


def main() -> None:
    order = read_frame(0)
    if os.getuid() != order["uid"]:  # root: become nobody in particular, in a user namespace that the service maps
        os.setgroups([])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)
        call("unshare", NEW_USER | NEW_PID)
        write_frame(1, {"status": "map"})
        read_frame(0)
        if inner := os.fork():  # the first process of that pid namespace goes on; this one ends with it
            os.closerange(0, 2)
            os.waitpid(inner, 0)
            os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cage, own = Cage(order), os.pidfd_open(os.getpid())
    child = Child(cage, own)
    write_frame(1, {"status": "ready"})
    while (order := read_frame(0)) is not None:
        alive = False
        if "code" in order:
            answer, alive = serve(cage, child, order)
        elif not order.get("end"):
            continue  # a kill that came too late
        broken = not alive and child.end()
        if "code" in order:
            if broken:
                answer["status"] = "lost"
            write_frame(1, answer)
        if not alive:
            child = Child(cage, own)


if __name__ == "__main__":
    main()
