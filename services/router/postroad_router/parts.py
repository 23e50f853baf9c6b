"""What the routes work with, put together once at start."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from postroad.config import Environment, Recipe
from postroad_router.dispatch import Dispatcher
from postroad_router.engine_client import EngineClient
from postroad_router.engines import Engines
from postroad_router.families import FAMILIES, Family
from postroad_router.keys import Keys
from postroad_router.model import ModelFacts, read_model
from postroad_router.responses_store import ResponsesStore
from postroad_router.sessions.junction import Junctions
from postroad_router.sessions.store import SessionStore
from postroad_router.sessions.trajectories import Collector
from postroad_router.template import ChatTemplate, Vocabulary, load_template, load_vocabulary

ALIAS = "postroad"  # a name under which any run's model answers


@dataclass
class Parts:
    """`names` are those of the model: its own first. `draining` is set once the service is told to stop."""

    keys: Keys
    names: tuple[str, ...]
    max_length: int
    model: ModelFacts
    vocabulary: Vocabulary
    family: Family
    template: ChatTemplate
    client: EngineClient
    dispatcher: Dispatcher
    sessions: SessionStore
    responses: ResponsesStore
    started: int = field(default_factory=lambda: int(time.time()))
    capture: bool = False  # routed experts, in every session
    draining: bool = False

    def __post_init__(self) -> None:
        self.read = self.vocabulary.reader(self.family.markup)  # tokens as the text that parsers and clients see
        self.junctions = Junctions(self.template, self.vocabulary, self.family)
        self.collector = Collector(self.sessions, self.junctions, self.vocabulary)

    @property
    def ready(self) -> bool:
        return self.dispatcher.engines.read and not self.draining


def build_parts(environment: Environment, recipe: Recipe, engines: Engines) -> Parts:
    """Raises ModelFolderError."""
    vocabulary = load_vocabulary(environment.model, recipe.rollout.engine.max_length)
    model = read_model(environment.model)
    own = recipe.model.bundled or Path(recipe.model.path or environment.model).name
    client = engines.client
    return Parts(
        keys=Keys(engines.store, environment.key), names=tuple(dict.fromkeys((own, ALIAS))),
        max_length=recipe.rollout.engine.max_length,
        model=model, vocabulary=vocabulary, family=FAMILIES[recipe.router.family or model.family],
        template=load_template(environment.model, recipe.model.chat_template),
        client=client, dispatcher=Dispatcher(engines, client, recipe.router, model, vocabulary.decode),
        sessions=SessionStore(engines.store, recipe.router.session_ttl_s, recipe.router.session_bytes),
        responses=ResponsesStore(engines.store, recipe.router.session_ttl_s),
        capture=recipe.rollout.routed_experts and bool(model.experts),
    )  # fmt: skip
