"""reasoning-gym without a compiler: it needs pycosat, which has no wheel, for one family of logic puzzles alone."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any


def import_reasoning_gym() -> Any:
    """The reasoning_gym package. Where pycosat is missing, its puzzles fail when they are made, not the import."""
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        stand_in = types.ModuleType("pycosat")

        def missing(*_: Any, **__: Any) -> Any:
            raise ValueError("this reasoning-gym task needs pycosat: pip install pycosat (it needs a C compiler)")

        stand_in.itersolve = stand_in.solve = missing  # type: ignore[attr-defined]
        sys.modules["pycosat"] = stand_in
    import reasoning_gym

    return reasoning_gym
