"""Agents that know nothing of postroad: a function, and a program (`python example_agents.py`)."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import httpx


async def ask_once(task: dict[str, Any], base_url: str, api_key: str) -> None:
    async with httpx.AsyncClient() as http:
        body = {"model": "postroad", "messages": [*task["prompt"], {"role": "user", "content": "by a function"}]}
        answer = await http.post(
            f"{base_url}/chat/completions", json=body, headers={"Authorization": f"Bearer {api_key}"}
        )
        answer.raise_for_status()


if __name__ == "__main__":
    given = json.load(sys.stdin)
    if "fail" in sys.argv:
        sys.exit("it can't be done")
    assert not [name for name in os.environ if name.startswith("POSTROAD_")]
    answer = httpx.post(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json={
            "model": os.environ["OPENAI_MODEL"],
            "messages": [*given["prompt"], {"role": "user", "content": "by a program"}],
        },
        headers={"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
    )
    answer.raise_for_status()
