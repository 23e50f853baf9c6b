"""Where prompts come from: generated tasks, files, a user's class. No torch here, so that a laptop can check a recipe."""

from postroad_trainer.data.conversations import Conversations
from postroad_trainer.data.dataset import DataError, Dataset, Report, Row, prompt_key
from postroad_trainer.data.opening import open_dataset
from postroad_trainer.data.order import order, prompt_index

__all__ = [
    "Conversations",
    "DataError",
    "Dataset",
    "Report",
    "Row",
    "open_dataset",
    "order",
    "prompt_index",
    "prompt_key",
]
