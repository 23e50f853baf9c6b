"""The sandbox keeps in what is in it, and one job's trouble is nobody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from postroad_reward.sandbox import Job, Sandbox, SandboxLost, SandboxUnavailable, SessionClosed
from postroad_reward.sandbox import root as sandbox_root
from postroad_reward.sandbox.processes import descendants


async def test_a_job_is_ordinary_python(sandbox):
    code = """
        import asyncio, dataclasses, multiprocessing, pathlib, subprocess, sys, threading
        @dataclasses.dataclass
        class Point:
            x: int
        print(Point(1), __name__, input(), pathlib.Path("data/a.txt").read_text())
        print(asyncio.run(asyncio.sleep(0, 2)), multiprocessing.Pool(2).map(abs, [-3]))
        print(subprocess.run([sys.executable, "-c", "print(4)"], capture_output=True, text=True).stdout)
        threading.Thread(target=print, args=("late",)).start()
    """
    job = Job(textwrap.dedent(code), stdin=b"line\nmore", files={"data/a.txt": b"content"})
    result = await sandbox.run(job)
    assert result.stdout == "Point(x=1) __main__ line content\n2 [3]\n4\n\nlate\n", result
    failed = await sandbox.run(Job("def f():\n    1/0\nf()"))
    assert (failed.status, failed.exit_code) == ("error", 1)
    assert failed.stderr.splitlines()[:2] == [
        "Traceback (most recent call last):",
        '  File "<job>", line 3, in <module>',
    ]
    assert "    1/0" in failed.stderr and (await sandbox.run(Job("exit(3)"))).exit_code == 3


async def test_no_trace_of_one_job_is_visible_to_another(started_sandbox):
    sandbox = await started_sandbox(size=1, packages=("numpy",), imports=("numpy.random",))
    try:
        await sandbox.run(
            Job("import os, sys; open('/tmp/a', 'w').write('x'); os.environ['A'] = 'x'; sys.path.append('x')")
        )
        seen = await sandbox.run(Job("import os, sys; print(os.listdir('/tmp'), 'A' in os.environ, 'x' in sys.path)"))
        numbers = {
            (await sandbox.run(Job("import random, numpy; print(random.random(), numpy.random.rand())"))).stdout
            for _ in range(3)
        }
        both = [number for pair in numbers for number in pair.split()]
    finally:
        await sandbox.close()
    assert seen.stdout == "[] False False\n" and len(set(both)) == 6


async def test_a_session_keeps_its_state_until_a_limit_ends_it(sandbox):
    async with sandbox.session() as session:
        assert (await session.run("x = 2\nprint('set')")).stdout == "set\n"
        assert (await session.run("x + 1")).stdout == "3\n"
        failed = await session.run("x / 0")
        assert failed.status == "error" and "ZeroDivisionError" in failed.stderr
        assert (await session.run("x")).stdout == "2\n"
        late = await session.run("print('begun')\nwhile True: pass", deadline_s=0.3)
        assert (late.status, late.stdout) == ("timeout", "begun\n") and session.closed
        with pytest.raises(SessionClosed, match="open another one"):
            await session.run("x")
    async with sandbox.session() as other:
        assert "NameError" in (await other.run("x")).stderr
        forged = await other.run("import os\nos.write(61, b'exit 0')\nos.closerange(0, 99)")
        assert forged.status in ("ok", "killed", "timeout", "error")
    assert (await sandbox.run(Job("print(1)"))).stdout == "1\n"


async def test_a_lost_sandbox_is_named_and_replaced(sandbox):
    running = asyncio.create_task(sandbox.run(Job("import time; time.sleep(30)", deadline_s=30)))
    await asyncio.sleep(0.2)
    for slot in list(sandbox._slots):
        slot.process.send_signal(signal.SIGKILL)
    with pytest.raises(SandboxLost, match="has ended"):
        await asyncio.wait_for(running, 10)
    assert (await sandbox.run(Job("print(1)"))).stdout == "1\n"


async def test_a_session_whose_sandbox_was_lost_does_not_come_back(sandbox):
    async with sandbox.session() as session:
        (slot,) = [slot for slot in sandbox._slots if slot is session._slot]
        running = asyncio.create_task(session.run("import time; time.sleep(30)", deadline_s=30))
        await asyncio.sleep(0.2)
        slot.process.kill()
        with pytest.raises(SandboxLost):
            await running
        with pytest.raises(SessionClosed):
            await session.run("1")
    assert slot not in sandbox._slots and (await sandbox.run(Job("print(1)"))).stdout == "1\n"


async def test_a_cancelled_job_is_killed(sandbox, gone):
    running = asyncio.create_task(sandbox.run(Job("while True: pass", deadline_s=60)))
    await asyncio.sleep(0.2)
    before = descendants(os.getpid())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sum(not gone(pid) for pid in before) < len(before)
    assert (await sandbox.run(Job("print(1)"))).stdout == "1\n"


def test_sandboxes_end_with_a_killed_service(gone):
    code = (
        "import asyncio, os\nfrom postroad_reward.sandbox import *\nfrom postroad_reward.sandbox.processes import descendants\n"
        "async def main():\n    sandbox = Sandbox(size=1)\n    await sandbox.start()\n"
        "    job = asyncio.create_task(sandbox.run(Job('while True: pass', deadline_s=60)))\n    await asyncio.sleep(0.3)\n"
        "    print(*descendants(os.getpid()), flush=True)\n    await job\nasyncio.run(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as service:
        pids = [int(pid) for pid in service.stdout.readline().split()]
        service.kill()
        error = service.stderr.read()
    if not pids and "SandboxUnavailable" in error:
        pytest.skip(error.splitlines()[-1])

    async def all_gone():
        async with asyncio.timeout(10):
            while not all(gone(pid) for pid in pids):
                await asyncio.sleep(0.02)

    asyncio.run(all_gone())
    assert len(pids) >= 4


async def test_where_bubblewrap_cannot_run_the_reason_and_the_remedy_are_given(monkeypatch):
    monkeypatch.setattr(sandbox_root, "command", lambda packages: ("/bin/false",))
    with pytest.raises(SandboxUnavailable, match="can't start.*unprivileged user namespaces"):
        await Sandbox(size=1).start()
    monkeypatch.undo()
    with pytest.raises(SandboxUnavailable, match="'no-such-package' is not installed: pip install"):
        await Sandbox(size=1, packages=("no-such-package",)).start()


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", ""])
def test_files_stay_in_the_jobs_folder(path):
    with pytest.raises(ValueError, match="relative path"):
        Job("", files={path: b""})
