"""The recipe's tools: what agents may call while they attempt a prompt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from postroad.config.algorithm import DottedPath
from postroad.config.section import Section

OWN = {
    "python": {"stateful"},
    "search": {"corpus", "max_broken_lines", "url", "top_k"},
    "function": {"path"},
    "mcp": {"command", "url"},
}


class ToolSection(Section):
    """Served by the reward service, called by workers. docs/agents.md has an example of each kind."""

    kind: Literal["python", "search", "function", "mcp"] = Field(
        description="Python in the sandbox, a search engine, a function of yours, or all tools of an MCP server."
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w-]{0,63}$",
        description="By which the model calls it; by itself the kind or function.",
    )
    deadline_s: float = Field(30.0, gt=0, description="Seconds that one call may take.")
    concurrency: int = Field(64, ge=1, description="Calls, or python sessions, at the same time in one reward process.")
    output_characters: int = Field(8192, ge=16, description="Longer results are cut in the middle.")
    stateful: bool = Field(False, description="python: variables last from call to call of an attempt.")
    corpus: str | None = Field(
        None, description="search: JSONL file of documents, {contents} or {title, text} a line; relative to the recipe."
    )
    max_broken_lines: int = Field(0, ge=0, description="search: how many unreadable lines are skipped, not fatal.")
    url: str | None = Field(
        None, description="search: a server of Search-R1's /retrieve; mcp: a streamable HTTP server."
    )
    top_k: int = Field(3, ge=1, description="search: documents in a result.")
    path: DottedPath | None = Field(
        None, description="function: its dotted path, sync or async; its signature is the schema."
    )
    command: list[str] = Field(
        default_factory=list, description="mcp: a server that speaks over its standard input and output."
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> ToolSection:
        own = set[str]().union(*OWN.values()) - OWN[self.kind]
        foreign = [
            name
            for name in own
            if getattr(self, name) != ToolSection.model_fields[name].get_default(call_default_factory=True)
        ]
        if foreign:
            raise ValueError(f"a tool of kind {self.kind} takes no {' or '.join(sorted(foreign))}")
        if self.kind == "function" and self.path is None:
            raise ValueError("a tool of kind function needs its path")
        if self.kind == "search" and (self.corpus is None) == (self.url is None):
            raise ValueError("a tool of kind search needs one of corpus and url")
        if self.kind == "mcp" and bool(self.command) == (self.url is not None):
            raise ValueError("a tool of kind mcp needs one of command and url")
        if self.kind == "mcp" and self.name is not None:
            raise ValueError("the tools of an MCP server have their own names: leave name away")
        return self

    @property
    def called(self) -> str:
        return self.name or (self.path or self.kind).rpartition(".")[2]
