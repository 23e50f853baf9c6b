"""The system call filter of a job, as classic BPF: an allow-list (Docker's default profile, tightened).

Not on it: ptrace, process_vm_*, keyctl, bpf, mount and its family, userfaultfd, io_uring, perf_event_open, kexec, unshare,
setns, memfd_create, System V and POSIX queues, setuid. Sockets are AF_UNIX only, which reach nothing outside the job.
"""

from __future__ import annotations

import errno
import platform
import struct
from importlib.resources import files

_ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH_*, column of syscalls.txt

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data (seccomp(2)); both machines are little-endian
_KILL, _ERROR, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_DENIED = _ERROR | errno.EPERM
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID and NET
_AF_UNIX, _TIOCSTI, _TIOCLINUX = 1, 0x5412, 0x541C


def program(machine: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter. Raises ValueError for a machine without a table."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise ValueError(f"there is no system call table for {machine}; there are {', '.join(_ARCHITECTURES)}")
    arch, column = _ARCHITECTURES[machine]
    code = [
        _op(_LOAD, _ARCH), _op(_EQUAL, arch, 1, 0), _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER), _op(_AT_LEAST, _X32, 0, 1), _op(_RETURN, _KILL),
    ]  # fmt: skip
    for name, number in _numbers(column):
        checks = _CHECKS.get(name, [_op(_RETURN, _ALLOW)])
        code += [_op(_EQUAL, number, 0, len(checks)), *checks]
    return b"".join([*code, _op(_RETURN, _DENIED)])


def _op(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", operation, if_true, if_false, value)


def _only_if(argument: int, operation: int, value: int, *, holds: bool) -> list[bytes]:
    """Allow where the test of an argument's low half has that outcome."""
    jump = (0, 1) if holds else (1, 0)
    return [
        _op(_LOAD, _ARGUMENTS + 8 * argument), _op(operation, value, *jump), _op(_RETURN, _ALLOW), _op(_RETURN, _DENIED),
    ]  # fmt: skip


_CHECKS = {
    "clone": _only_if(0, _ANY_BIT, _NEW_NAMESPACES, holds=False),
    "clone3": [_op(_RETURN, _ERROR | errno.ENOSYS)],  # its flags are out of a filter's reach: glibc goes on with clone
    "socket": _only_if(0, _EQUAL, _AF_UNIX, holds=True),
    "socketpair": _only_if(0, _EQUAL, _AF_UNIX, holds=True),
    "ioctl": [
        _op(_LOAD, _ARGUMENTS + 8), _op(_EQUAL, _TIOCSTI, 1, 0), _op(_EQUAL, _TIOCLINUX, 0, 1),
        _op(_RETURN, _DENIED), _op(_RETURN, _ALLOW),
    ],
}  # fmt: skip


def _numbers(column: int) -> list[tuple[str, int]]:
    rows = [line.split() for line in files(__package__).joinpath("syscalls.txt").read_text().splitlines()]
    return [(row[0], int(row[column])) for row in rows if row[0] != "#" and row[column] != "-"]
