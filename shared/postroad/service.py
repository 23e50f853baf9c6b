"""The outside of every service's process: environment, logs, signals, exit codes.

Exit codes: 0 it was told to stop, or its work is done; 3 it can't go on as it is configured (the log says why); others:
start it again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine

from postroad.config import Environment, Recipe, RecipeError, load_recipe
from postroad.supervisor.processes import die_with_parent
from postroad.telemetry.logging import set_up_logging
from postroad.telemetry.tracer import set_up_tracing

FATAL = 3
LoopFactory = Callable[[], asyncio.AbstractEventLoop]
Serve = Callable[[Environment, Recipe, asyncio.Event], Coroutine[None, None, None]]

logger = logging.getLogger(__name__)


def run_service(kind: str, serve: Serve, *fatal: type[Exception], loop: LoopFactory | None = None) -> int:
    """Run `serve` until it returns; its event is set on SIGTERM or SIGINT. The exit code; `fatal` errors are told in a
    sentence and end in code 3."""
    told: tuple[type[Exception], ...] = (RecipeError, *fatal)
    die_with_parent()
    environment = Environment.read()
    set_up_logging(kind, environment.run, environment.log_level)
    set_up_tracing(kind, environment.run)
    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(_with_signals(serve, environment, load_recipe(environment.recipe)))
    except told as error:
        logger.error("%s", error)
        print(f"{kind}: {error}", file=sys.stderr)
        return FATAL
    return 0


async def _with_signals(serve: Serve, environment: Environment, recipe: Recipe) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(environment, recipe, stop)
