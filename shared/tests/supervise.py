"""`python supervise.py FOLDER [KIND=EXIT_CODE] [--keep] [--detach]`: a supervisor of stand-ins on real servers."""

from __future__ import annotations

import sys
from pathlib import Path

from postroad.command.plain import PlainView
from postroad.config import Recipe
from postroad.supervisor.folder import FolderError, RunFolder, held
from postroad.supervisor.launch import Launch, detach
from postroad.supervisor.plan import Service

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
RECIPE = {
    "name": "test", "model": {"path": "/nowhere"}, "data": {"kind": "class", "path": "a.b"},
    "reward": {"grader": "exact"}, "trainer": {"steps": 3},
}  # fmt: skip
KINDS = ("engine", "router", "reward", "worker", "trainer")


def stand_ins(broken: dict[str, str]) -> list[Service]:
    return [
        Service(kind, f"{kind}-0", (sys.executable, STAND_IN, kind, *([broken[kind]] if kind in broken else [])))
        for kind in KINDS
    ]  # type: ignore[misc]


def main() -> int:
    arguments = sys.argv[2:]
    broken = dict(argument.split("=") for argument in arguments if "=" in argument)
    folder, recipe = RunFolder(Path(sys.argv[1])), Recipe.model_validate(RECIPE)
    launch = Launch(folder, recipe, "--keep" in arguments, lambda _: stand_ins(broken))
    try:
        with held(folder, "supervisor"):
            launch.prepare()
            if "--detach" in arguments:
                print(*detach(launch))
                return 0
            return 0 if launch.run(PlainView(recipe)) == "finished" else 1
    except FolderError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
