"""One YAML recipe configures the whole mesh."""

from postroad.config.load import RecipeError, load_recipe, resolved_yaml
from postroad.config.recipe import Recipe
from postroad.config.environment import Environment

__all__ = ["Environment", "Recipe", "RecipeError", "load_recipe", "resolved_yaml"]
