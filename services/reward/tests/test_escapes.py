"""What untrusted code tries. A case prints ESCAPED where it got out and `refused` where it was kept in; `status` is how
the job ends. HOST_* are filled in by the test: a file, a TCP port and an abstract socket of the host that are really there.
"""

from __future__ import annotations

import asyncio
import os
import platform
import socket

import pytest

from postroad_reward.sandbox import Job
from postroad_reward.sandbox.processes import descendants

DEADLINE_S = 3.0

PRELUDE = """
import ctypes, errno, os, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def must_fail(what):
    try: what()
    except Exception as error: print("refused", type(error).__name__)
    else: print("ESCAPED")
def call(number, *arguments):
    if libc.syscall(number, *arguments) >= 0: print("ESCAPED")
    else: print("refused", errno.errorcode[ctypes.get_errno()])
def read(path): return lambda: open(path, "rb").read(1)
def write(path): return lambda: open(path, "wb")
def family(number, kind=1): return lambda: socket.socket(number, kind)
"""

REFUSED = {
    "read /etc/shadow": "must_fail(read('/etc/shadow'))",
    "read /etc/passwd": "must_fail(read('/etc/passwd'))",
    "read a host file": "must_fail(read('HOST_FILE'))",
    "read /proc/1/environ": "must_fail(read('/proc/1/environ'))",
    "read /proc/self/mem": "must_fail(read('/proc/self/mem'))",
    "list /sys": "must_fail(lambda: os.listdir('/sys'))",
    "list the host's home": "must_fail(lambda: os.listdir('/root'))",
    "mount proc": "call(165, b'proc', b'/tmp', b'proc', 0, 0)",
    "connect to the host": "must_fail(lambda: socket.create_connection(('127.0.0.1', HOST_PORT), 1))",
    "udp": "must_fail(family(socket.AF_INET, socket.SOCK_DGRAM))",
    "ipv6": "must_fail(family(socket.AF_INET6))",
    "dns": "must_fail(lambda: socket.getaddrinfo('example.com', 80))",
    "raw packets": "must_fail(family(17, socket.SOCK_RAW))",
    "netlink": "must_fail(family(16, socket.SOCK_RAW))",
    "vsock": "must_fail(family(40))",
    "kernel crypto socket": "must_fail(family(38, 5))",
    "abstract socket of the host": "must_fail(lambda: socket.socket(socket.AF_UNIX).connect('\\0HOST_ABSTRACT'))",
    "setuid root": "must_fail(lambda: os.setuid(0))",
    "setgroups": "must_fail(lambda: os.setgroups([0]))",
    "chown to root": "open('/tmp/a', 'w'); must_fail(lambda: os.chown('/tmp/a', 0, 0))",
    "umount /tmp": "call(166, b'/tmp', 2)",
    "remount read-write": "call(165, b'none', b'/', b'', 32, 0)",
    "ptrace of the first process": "call(101, 16, 1, 0, 0)",
    "read memory of the first process": "call(310, 1, 0, 0, 0, 0, 0)",
    "take a descriptor of the first process": "call(438, os.pidfd_open(1), 60, 0)",
    "unshare a user namespace": "call(272, 0x10000000)",
    "clone into a user namespace": "call(56, 0x10000000 | 17, 0, 0, 0, 0)",
    "clone3": "call(435, ctypes.create_string_buffer(struct.pack('11Q', 0x10000000, *[0] * 10)), 88)",
    "setns": "call(308, os.pidfd_open(1), 0x20000000)",
    "chroot": "must_fail(lambda: os.chroot('/tmp'))",
    "pivot_root": "call(155, b'/tmp', b'/tmp')",
    "open_tree": "call(428, -100, b'/', 1)",
    "io_uring": "call(425, 8, ctypes.create_string_buffer(120))",
    "bpf": "call(321, 0, ctypes.create_string_buffer(72), 72)",
    "perf": "call(298, ctypes.create_string_buffer(120), 0, -1, -1, 0)",
    "userfaultfd": "call(323, 1)",
    "keyctl": "call(250, 0, -3, 1)",
    "add_key": "call(248, b'user', b'a', b'b', 1, -3)",
    "kexec": "call(246, 0, 0, 0, 0)",
    "memfd": "must_fail(lambda: os.memfd_create('a'))",
    "System V memory": "call(29, 1234, 4096, 0o1666)",
    "message queue": "call(240, b'a', 0o102, 0o600, 0)",
    "reboot": "call(169, 0xfee1dead, 672274793, 0x1234567, 0)",
    "set the clock": "must_fail(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))",
    "set the host name": "must_fail(lambda: socket.sethostname('a'))",
    "load a module": "call(313, 0, b'', 0)",
    "open by handle": "call(304, -100, ctypes.create_string_buffer(64), 0)",
    "open /dev/mem": "must_fail(read('/dev/mem'))",
    "open /dev/tty": "must_fail(read('/dev/tty'))",
    "make a device": "must_fail(lambda: os.mknod('/tmp/d', 0o60600, os.makedev(8, 0)))",
    "write to python": "must_fail(write(os.__file__))",
    "write to a device's folder": "must_fail(write('/dev/a'))",
    "write to the root": "must_fail(write('/a'))",
    "symlink out of /tmp": "os.symlink('/etc/shadow', '/tmp/l'); must_fail(read('/tmp/l'))",
    "symlink into python": "os.symlink(os.__file__, '/tmp/l'); must_fail(write('/tmp/l'))",
    "dot-dot out of /tmp": "must_fail(read('/tmp/../../../HOST_FILE'))",
    "exec from /tmp": "open('/tmp/x', 'w').write('#!'); os.chmod('/tmp/x', 0o7755); must_fail(lambda: os.execv('/tmp/x', ['x']))",
    "raise a limit": "import resource; must_fail(lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)))",
    "a sparse giant": "f = open('/tmp/a', 'wb'); must_fail(lambda: f.truncate(1 << 40))",
    "fill /tmp": "must_fail(lambda: [open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 20)) for n in range(99)])",
    "fill inodes": "must_fail(lambda: [open(f'/tmp/{n}', 'w').close() for n in range(9999)])",
    "kill every process": "must_fail(lambda: os.kill(-1, 0))",
    "kill the parent for good": "os.kill(os.getppid(), 9); os.kill(1, 2); time.sleep(0.1); print('refused')",
    "the host's process ids": "must_fail(lambda: os.kill(HOST_PID, 0))",
    "stop the parent": "os.kill(os.getppid(), signal.SIGSTOP); print('refused')",
    "the service's pipes": "must_fail(lambda: [os.write(n, b'x') for n in range(3, 1024)])",
    "the service's environment": "print('ESCAPED' if 'HOST_SECRET' in str(os.environ) else 'refused')",
    "other people's processes": "must_fail(lambda: [os.kill(n, 0) for n in range(3, 40000)])",
}  # fmt: skip

# those that end by a limit or otherwise: code, how they must end
ENDED = {
    "32-bit calls": ("call(0x40000000 + 39)", {"killed"}),
    "fork bomb": ("while True:\n    try: os.fork()\n    except OSError: pass", {"timeout", "memory"}),
    "thread bomb": ("for n in range(999): threading.Thread(target=time.sleep, args=(9,)).start()", {"timeout", "error"}),
    "memory bomb": ("a = bytearray(8 << 30)", {"memory"}),
    "memory bomb, grown": ("a = []\nwhile True: a.append(bytearray(1 << 20))", {"memory"}),
    "memory bomb of many": (
        "for n in range(8):\n    if os.fork() == 0: a = b'x' * (100 << 20); time.sleep(9)\ntime.sleep(9)", {"memory"},
    ),
    "shared memory bomb": ("import mmap\na = mmap.mmap(-1, 8 << 30)", {"memory", "error"}),
    "output flood": ("while True: print('x' * 9999)", {"output"}),
    "output without a line's end": ("while True: os.write(1, b'x' * 65536)", {"output"}),
    "error flood": ("while True: os.write(2, b'x' * 65536)", {"output"}),
    "busy": ("while True: pass", {"timeout"}),
    "deaf": ("for n in (1, 2, 3, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass", {"timeout"}),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    "silent": ("os.close(1); os.close(2); time.sleep(60)", {"timeout"}),
    "daemon": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)\nos.wait()", {"ok"},
    ),
    "os._exit": ("os._exit(0)", {"ok"}),
    "closed streams": ("sys.stdout.close(); sys.stderr.close(); os.closerange(0, 99)", {"ok"}),
    "crash": ("ctypes.string_at(0)", {"killed"}),
    "endless recursion": ("sys.setrecursionlimit(1 << 30)\ndef f(n): return f(str(n))\nf(1)",
                          {"killed", "memory", "error", "timeout"}),
    "binary garbage": ("os.write(1, bytes(range(256)) * 9)", {"ok"}),
    "pickle bomb": ("import pickle\nclass A:\n    def __reduce__(self): return os.system, ('id',)\n"
                    "os.write(1, pickle.dumps(A()))", {"ok"}),
    "forged frames": ("os.write(1, struct.pack('>I', 1 << 31) + b'{\"status\": \"ok\"}')", {"ok"}),
    "a raised exit": ("raise SystemExit('no')", {"error"}),
    "a raising exception": ("class E(BaseException):\n    def __str__(self): raise self\nraise E", {"error"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def escapes(tmp_path_factory, started_sandbox):
    """All cases, run side by side in one pool whose machine has what they look for."""
    secret = tmp_path_factory.mktemp("host") / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    os.environ["HOST_SECRET"] = "secret"
    listener, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0postroad-{os.getpid()}")
    abstract.listen()
    names = {"HOST_FILE": str(secret), "HOST_PORT": str(listener.getsockname()[1]), "HOST_PID": str(os.getpid()),
             "HOST_ABSTRACT": f"postroad-{os.getpid()}"}  # fmt: skip

    async def run_all():
        sandbox, results = await started_sandbox(size=6), {}

        async def run(name, code):
            for word, value in names.items():
                code = code.replace(word, value)
            results[name] = await sandbox.run(Job(PRELUDE + code, deadline_s=DEADLINE_S))
            assert (await sandbox.run(Job("print(1)", deadline_s=20))).stdout == "1\n"

        cases = {**REFUSED, **{name: code for name, (code, _) in ENDED.items()}}
        await asyncio.gather(*(run(name, code) for name, code in cases.items()))
        idle = len(descendants(os.getpid())) / len(sandbox._slots)
        await sandbox.close()
        return results, idle, descendants(os.getpid())

    before = descendants(os.getpid())
    results, idle, after = asyncio.run(run_all())
    for held in (listener, abstract):
        held.close()
    del os.environ["HOST_SECRET"]
    return results, idle, set(after) - set(before)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the cases name system calls by x86_64's numbers")
class TestEscapes:
    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, escapes, name):
        result = escapes[0][name]
        assert "ESCAPED" not in result.stdout and "refused" in result.stdout, result

    @pytest.mark.parametrize("name", ENDED)
    def test_ended(self, escapes, name):
        result = escapes[0][name]
        assert result.status in ENDED[name][1] and "ESCAPED" not in result.stdout, result
        assert result.seconds < DEADLINE_S + 2
        assert len(result.stdout) <= 64 << 10 and len(result.stderr) <= 64 << 10

    def test_no_process_is_left(self, escapes):
        _, idle, left = escapes
        assert idle <= 5 and not left  # bwrap, two zygotes and the waiting interpreter per sandbox
