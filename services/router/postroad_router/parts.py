"""What the routes work with, put together once at start."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from postroad.config import Environment, Recipe
from postroad_router.dispatch import Dispatcher
from postroad_router.engine_client import EngineClient
from postroad_router.engines import Engines
from postroad_router.families import FAMILIES, Family
from postroad_router.model import ModelFacts, read_model
from postroad_router.template import ChatTemplate, Vocabulary, load_template, load_vocabulary

ALIAS = "postroad"  # a name under which any run's model answers


@dataclass
class Parts:
    """`names` are those of the model: its own first. `draining` is set once the service is told to stop."""

    key: str = field(repr=False)
    names: tuple[str, ...]
    max_length: int
    model: ModelFacts
    vocabulary: Vocabulary
    family: Family
    template: ChatTemplate
    client: EngineClient
    dispatcher: Dispatcher
    started: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    read: Callable[[Sequence[int]], str] = field(init=False)  # tokens as the text that parsers and clients see

    def __post_init__(self) -> None:
        self.read = self.vocabulary.reader(self.family.markup)

    @property
    def ready(self) -> bool:
        return self.dispatcher.engines.read and not self.draining


def build_parts(environment: Environment, recipe: Recipe, engines: Engines) -> Parts:
    """Raises ModelFolderError."""
    vocabulary, model = load_vocabulary(environment.model), read_model(environment.model)
    own = recipe.model.bundled or Path(recipe.model.path or environment.model).name
    client = engines.client
    return Parts(
        key=environment.key, names=tuple(dict.fromkeys((own, ALIAS))), max_length=recipe.rollout.engine.max_length,
        model=model, vocabulary=vocabulary, family=FAMILIES[recipe.router.family or model.family],
        template=load_template(environment.model, recipe.model.chat_template),
        client=client, dispatcher=Dispatcher(engines, client, recipe.router, model, vocabulary.decode),
    )  # fmt: skip
