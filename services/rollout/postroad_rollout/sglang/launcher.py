"""`python -m postroad_rollout.sglang.launcher ARGUMENTS…`: SGLang's launch_server, whose key comes from the environment
(a command line can be read by every user of the machine) and which ends with whoever started it."""

from __future__ import annotations

import os
import sys

from postroad.supervisor.processes import die_with_parent


def main() -> None:
    die_with_parent()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    key = os.environ.pop("POSTROAD_KEY")
    arguments = prepare_server_args([*sys.argv[1:], "--api-key", key])
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
