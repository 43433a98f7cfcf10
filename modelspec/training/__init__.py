"""Training without a framework: the recipe, what the batches are, and the state of an interrupted training."""

from modelspec.training.batch_share import BatchShare
from modelspec.training.batches import ArrayImages, EvaluationBatches, LabelledImages, TrainingBatches
from modelspec.training.recipe import Recipe
from modelspec.training.state import TrainingState, matching_state

__all__ = [
    "ArrayImages",
    "BatchShare",
    "EvaluationBatches",
    "LabelledImages",
    "Recipe",
    "TrainingBatches",
    "TrainingState",
    "matching_state",
]
