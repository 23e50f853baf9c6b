"""Serving an engine: as a library function, and alone: `python -m postroad_rollout.engine.server --model DIR --port P`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from .app import create_app
from .engine import Engine
from .handover import Bootstrap
from .settings import EngineSettings

SHUTDOWN_S = 1


class Server(uvicorn.Server):
    """uvicorn on a socket that is bound before the start, so that port 0 has a number to tell."""

    def __init__(self, app: FastAPI, settings: EngineSettings) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=SHUTDOWN_S))
        self.socket = socket.create_server((settings.host, settings.port))
        self.port = int(self.socket.getsockname()[1])

    async def serve_socket(self) -> None:
        """Until SIGTERM or SIGINT, or until `should_exit` is set."""
        await self.serve(sockets=[self.socket])


async def serve(settings: EngineSettings) -> None:
    """Serve until SIGTERM. Raises EngineError for a model that can't be served, OSError for a port that is taken."""
    engine = await asyncio.to_thread(Engine, settings)
    engine.start()
    bootstrap = Bootstrap(settings.secret)
    try:
        if settings.role == "prefill":
            print(f"bootstrap: {await bootstrap.open(settings.host, settings.bootstrap_port)}", flush=True)
        server = Server(create_app(engine, bootstrap), settings)
        print(f"engine: http://{settings.host}:{server.port}", flush=True)
        await server.serve_socket()
    finally:
        await bootstrap.close()
        await asyncio.to_thread(engine.close)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model with the embedded engine.")
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face layout")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=64, help="sequences decoded at the same time")
    parser.add_argument("--role", default="mixed", choices=["mixed", "prefill", "decode"])
    parser.add_argument("--bootstrap-port", type=int, default=0, help="of a prefill engine")
    parser.add_argument("--max-length", type=int, default=None, help="longest sequence in tokens")
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO)
    asyncio.run(serve(EngineSettings(model_path=arguments.pop("model"), **arguments)))


if __name__ == "__main__":
    main()
