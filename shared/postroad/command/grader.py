"""Whether the reward service, where it is installed, has a recipe's grader and tools with such settings."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from postroad.config import Recipe, RecipeError

DEADLINE_S = 60.0


def check_grader(recipe: Recipe) -> None:
    """Asked in a process of its own, because shared imports no service. Raises RecipeError."""
    if (recipe.reward.grader == "none" and not recipe.tools) or find_spec("postroad_reward") is None:
        return
    command = [sys.executable, "-m", "postroad_reward", "check", recipe.model_dump_json()]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    if asked.returncode:
        raise RecipeError(f"reward: {asked.stderr.strip()}")
