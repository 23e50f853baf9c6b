"""Untrusted Python in a cage: bubblewrap, namespaces, a system call filter, limits.

    sandbox = Sandbox(Limits(), packages=("numpy",))
    await sandbox.start()
    result = await sandbox.run(Job("print(input())", stdin=b"hello"))     # result.status, result.stdout
    async with sandbox.session() as session:
        await session.run("x = 2")
        result = await session.run("x + 1")                               # result.stdout == "3\n"

How it is built: `root` says what a job sees, `zygote` runs inside and forks an interpreter per job, `slot` is one running
bubblewrap, `pool` holds the warm ones.
"""

from postroad_reward.sandbox.models import Job, Limits, Result, SandboxLost, SandboxUnavailable, SessionClosed
from postroad_reward.sandbox.pool import Sandbox, Session

__all__ = ["Job", "Limits", "Result", "Sandbox", "SandboxLost", "SandboxUnavailable", "Session", "SessionClosed"]
