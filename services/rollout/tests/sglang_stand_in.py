"""A stand-in for sglang.launch_server: its health check and control endpoints, what was asked of it on GET /asked, and a
grandchild, as SGLang has its scheduler. `POST /break` makes the next update fail. It takes SGLang's arguments."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

from postroad.supervisor.processes import die_with_parent

app = FastAPI()
state: dict[str, Any] = {"asked": [], "version": "0", "broken": False}


@app.get("/health")
async def health() -> dict[str, int]:
    return {"grandchild": state["grandchild"]}


@app.get("/asked")
async def asked() -> list[Any]:
    return list(state["asked"])


@app.get("/model_info")
async def model_info() -> dict[str, str]:
    return {"weight_version": state["version"]}


@app.post("/break")
async def break_() -> None:
    state["broken"] = True


@app.post("/{path}")
async def control(path: str, request: Request) -> Response:
    if request.headers.get("authorization") != f"Bearer {os.environ['POSTROAD_KEY']}":
        return Response(status_code=401)
    body = await request.json()
    state["asked"].append([path, body])
    if path == "update_weights_from_tensor":
        if state["broken"]:
            return Response('{"success": false, "message": "shape mismatch"}', 400, media_type="application/json")
        state["version"] = body["weight_version"]
    return Response('{"success": true}', media_type="application/json")


if __name__ == "__main__":
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    sleeper = "import time; from postroad.supervisor.processes import die_with_parent as d; d(); time.sleep(600)"
    state["grandchild"] = subprocess.Popen([sys.executable, "-c", sleeper]).pid
    uvicorn.run(app, host="127.0.0.1", port=parser.parse_known_args()[0].port, log_level="warning")
