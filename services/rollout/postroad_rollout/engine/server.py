"""Run one engine as a server: `serve(settings)`, or `python -m postroad_rollout.engine.server --model DIR`."""

from __future__ import annotations

import argparse
import sys
from types import FrameType

import uvicorn
from pydantic import ValidationError

from .app import create_app
from .errors import EngineError
from .loop import Engine
from .settings import EngineSettings

GRACE_S = 1


class EngineServer(uvicorn.Server):
    """uvicorn that ends the engine's requests as soon as it is told to stop, so that it stops within two seconds."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.close(deadline_s=0)
        super().handle_exit(sig, frame)


def serve(settings: EngineSettings) -> int:
    """Load the model and serve until SIGTERM or SIGINT -> exit status, 1 if the model loop failed."""
    engine = Engine(settings)
    config = uvicorn.Config(
        create_app(engine),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        timeout_graceful_shutdown=GRACE_S,
        lifespan="off",
    )
    server = EngineServer(config, engine)
    failures: list[str] = []

    def on_failure() -> None:
        failures.append("the model loop failed")
        server.should_exit = True

    engine.on_failure = on_failure
    engine.start()
    server.run()
    engine.close(deadline_s=0.5)
    return 1 if failures or not server.started else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve a model folder over SGLang's HTTP interface.")
    parser.add_argument("--model", dest="model_path", required=True, metavar="DIR")
    for name, field in EngineSettings.model_fields.items():
        if name != "model_path":
            parser.add_argument(f"--{name.replace('_', '-')}", help=field.description, default=argparse.SUPPRESS)
    try:
        return serve(EngineSettings.model_validate(vars(parser.parse_args())))
    except (EngineError, ValidationError) as error:
        print(f"engine: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
