"""The one module that reads the environment. Secrets come from here and are never printed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

NEEDED = (
    "POSTROAD_RUN", "POSTROAD_DIR", "POSTROAD_RECIPE", "POSTROAD_MODEL", "POSTROAD_NATS_URL", "POSTROAD_REDIS_URL",
    "POSTROAD_KEY",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """What a service is told by whoever starts it. `key` is the mesh's bearer key, `teacher_key` that of a distillation's
    teacher; URLs may carry passwords."""

    run: str
    folder: Path
    recipe: Path
    nats_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    key: str = field(repr=False)
    teacher_key: str = field(default="", repr=False)
    model: Path = Path("model")
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 0
    advertise: str = ""
    log_level: str = "INFO"

    @classmethod
    def read(cls) -> Environment:
        missing = [name for name in NEEDED if not os.environ.get(name)]
        if missing:
            raise SystemExit(f"{', '.join(missing)} must be set; `postroad up` and compose/compose.yaml set them")
        return cls(
            run=os.environ["POSTROAD_RUN"],
            folder=Path(os.environ["POSTROAD_DIR"]),
            recipe=Path(os.environ["POSTROAD_RECIPE"]),
            nats_url=os.environ["POSTROAD_NATS_URL"],
            redis_url=os.environ["POSTROAD_REDIS_URL"],
            key=os.environ["POSTROAD_KEY"],
            teacher_key=os.environ.get("POSTROAD_TEACHER_KEY", ""),
            model=Path(os.environ["POSTROAD_MODEL"]),
            name=os.environ.get("POSTROAD_NAME", ""),
            host=os.environ.get("POSTROAD_HOST", "127.0.0.1"),
            port=int(os.environ.get("POSTROAD_PORT", "0")),
            advertise=os.environ.get("POSTROAD_ADVERTISE", ""),
            log_level=os.environ.get("POSTROAD_LOG_LEVEL", "INFO"),
        )
