"""One YAML recipe configures the whole mesh."""

from postroad.config.environment import Environment
from postroad.config.load import RecipeError, load_recipe, resolved_yaml
from postroad.config.recipe import Recipe

__all__ = ["Environment", "Recipe", "RecipeError", "load_recipe", "resolved_yaml"]
