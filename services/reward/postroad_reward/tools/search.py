"""`search`: BM25 (Robertson and Zaragoza 2009, by bm25s) over a JSONL corpus, or a retriever that speaks Search-R1's
contract: POST /retrieve {"queries": [text], "topk": k, "return_scores": false} -> {"result": [[{"id", "contents"}]]}.

A line of a corpus is an object with `contents` (its first line is the title), or `title` and `text`, and an `id` or not.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from postroad.config.tools import ToolSection
from postroad_reward.tools.base import CallFailed, Tool, ToolSettingsError
from postroad_reward.tools.functions import tool_of

NAMED = 5  # broken lines that an error shows


async def search(query: str) -> None:
    """Search documents for a query. Returns those that fit best."""


@dataclass(frozen=True)
class Document:
    id: str
    contents: str

    def __post_init__(self) -> None:
        if not self.contents.strip():
            raise ValueError("it has no contents")


class Corpus:
    """Documents with a BM25 index, in memory. Raises ToolSettingsError for a file that can't be used."""

    def __init__(self, path: Path, max_broken_lines: int = 0) -> None:
        import bm25s  # type: ignore[import-untyped]

        self.documents, self.broken = _read(path)
        if len(self.broken) > max_broken_lines:
            shown = "; ".join(self.broken[:NAMED])
            raise ToolSettingsError(
                f"{path}: {len(self.broken)} broken lines, at most {max_broken_lines} allowed: {shown}"
            )
        if not self.documents:
            raise ToolSettingsError(f"{path} holds no documents")
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25()
        self._index.index(self._tokens([document.contents for document in self.documents]), show_progress=False)

    def search(self, query: str, top_k: int) -> list[tuple[Document, float]]:
        """The best documents with their scores, best first; none that has no word of the query."""
        count = min(top_k, len(self.documents))
        places, scores = self._index.retrieve(self._tokens([query]), k=count, show_progress=False)
        found = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [(self.documents[place], score) for place, score in found if score > 0]

    def _tokens(self, texts: list[str]) -> Any:
        return self._tokenize(texts, stopwords="en", show_progress=False)


def search_tool(section: ToolSection, http: httpx.AsyncClient) -> Tool:
    """Reads the corpus, which may take long, when it is made."""
    corpus = Corpus(Path(section.corpus), section.max_broken_lines) if section.corpus is not None else None

    async def call(query: str) -> str:
        if corpus is not None:
            hits = await asyncio.to_thread(corpus.search, query, section.top_k)
            documents = [document for document, _ in hits]
        else:
            documents = await _ask(http, section, query)
        return "\n".join(listed(place, document) for place, document in enumerate(documents, 1)) or "[nothing found]"

    return tool_of(section, search, lambda given, session: call(given["query"]))


def listed(place: int, document: Document) -> str:
    """As Search-R1 shows a document to the model."""
    title, _, text = document.contents.partition("\n")
    title = title.strip().strip('"')
    return f"Doc {place}(Title: {title}) {text.strip()}"


async def _ask(http: httpx.AsyncClient, section: ToolSection, query: str) -> list[Document]:
    """A retriever that fails is our failure: it is never an empty result."""
    body = {"queries": [query], "topk": section.top_k, "return_scores": False}
    try:
        answer = await http.post(str(section.url), json=body, timeout=section.deadline_s)
        answer.raise_for_status()
        return [Document(str(item.get("id", "")), str(item["contents"])) for item in answer.json()["result"][0]]
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CallFailed("sandbox_lost", f"the retriever {section.url} failed: {error!r}"[:500]) from error


def _read(path: Path) -> tuple[list[Document], list[str]]:
    documents: list[Document] = []
    broken: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        documents.append(_document(json.loads(line), number))
                    except (ValueError, TypeError, LookupError, AttributeError) as error:
                        broken.append(f"line {number}: {type(error).__name__}: {error}"[:200])
    except OSError as error:
        raise ToolSettingsError(f"the corpus {path} can't be read: {error.strerror}") from error
    return documents, broken


def _document(row: dict[str, Any], number: int) -> Document:
    contents = row["contents"] if "contents" in row else f"{row['title']}\n{row['text']}"
    if not isinstance(contents, str):
        raise TypeError(f"contents must be text, not {type(contents).__name__}")
    return Document(str(row.get("id", number)), contents)
