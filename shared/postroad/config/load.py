"""Reading a recipe: YAML, `--set a.b=c` overrides, and errors that name the key and the nearest valid one."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from postroad.config.recipe import Recipe


class RecipeError(ValueError):
    """The recipe can't be used; the message has a line per fault."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe. Paths in it become absolute (they are relative to the recipe file)."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} is not a recipe: its top level must be a mapping, not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    _absolute(tree, path.resolve().parent)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n" + "\n".join(f"  {line}" for line in _explain(error))) from error


def resolved_yaml(recipe: Recipe) -> str:
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    place: Any = tree
    for section in sections:
        if isinstance(place, list):
            if not section.isdigit() or int(section) >= len(place):
                raise RecipeError(f"--set {key}: there is no element {section!r}")
            place = place[int(section)]
        elif isinstance(place, dict):
            place = place.setdefault(section, {})
        else:
            raise RecipeError(f"--set {key}: {section!r} is below a plain value")
    if not isinstance(place, dict):
        raise RecipeError(f"--set {key}: {last!r} is below a plain value")
    place[last] = yaml.safe_load(value)


def _absolute(tree: dict[str, Any], folder: Path) -> None:
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = str(folder / model["path"])
    tools = tree.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict) and isinstance(tool.get("corpus"), str):
            tool["corpus"] = str(folder / tool["corpus"])
    evaluations = tree.get("evaluation")
    for section in (tree, *(evaluations if isinstance(evaluations, list) else ())):
        data = section.get("data") if isinstance(section, dict) else None
        if isinstance(data, dict) and data.get("kind") == "file" and isinstance(data.get("path"), str):
            data["path"] = str(folder / data["path"])


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            known = _keys_at(fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            lines.append(f"unknown key {place}: {hint}")
        elif fault["type"] == "missing":
            lines.append(f"missing key {place}")
        else:
            lines.append(f"{place}: {fault['msg'].removeprefix('Value error, ')} (got {fault['input']!r})"[:300])
    return lines


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        model = _section_of(model.model_fields[part].annotation)
    return sorted(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        try:
            return _section_of(argument)
        except TypeError:
            continue
    raise TypeError(f"{annotation} holds no section")
