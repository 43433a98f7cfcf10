"""What an interrupted training needs to go on, in one file: weights, the optimizer's moments, the curves so far.

Everything lies under checkpoint keys and in the checkpoint's layouts, so that either half can go on with what the other
one began. What is drawn is a function of the recipe's seed and the epoch, and needs no state.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.atomic_file import atomic_file
from modelspec.checkpoints import CheckpointError
from modelspec.checkpoints.checkpoint import digest_arrays
from modelspec.training.recipe import Recipe

GROUPS = ("weights", "first_moments", "second_moments", "averages")
_FORMAT = "twinzoo training state 1"


@dataclasses.dataclass
class TrainingState:
    """A training after some epochs.

    Attributes:
        epoch: how many are finished.
        step: how many optimizer steps were taken.
        recipe: by which it is trained.
        history: the curves: name -> one number per finished epoch.
        weights: key -> array, of all parameters and statistics.
        first_moments, second_moments: AdamW's, of the trained parameters.
        averages: the moving averages of the trained parameters; empty without.
    """

    epoch: int
    step: int
    recipe: Recipe
    history: dict[str, list[float]]
    weights: dict[str, np.ndarray]
    first_moments: dict[str, np.ndarray]
    second_moments: dict[str, np.ndarray]
    averages: dict[str, np.ndarray]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state; whoever reads the file finds the old state or this one.

        Raises:
            OSError: it cannot be written; the old file, if there is one, is whole.
        """
        from safetensors.numpy import save_file

        tensors = {
            f"{group}/{key}": np.asarray(value, order="C")
            for group in GROUPS
            for key, value in getattr(self, group).items()
        }
        described = {"epoch": self.epoch, "step": self.step, "recipe": self.recipe.to_dict(), "history": self.history}
        metadata = {"format": _FORMAT, "state": json.dumps(described), "sha256": digest_arrays(tensors)}
        with atomic_file(path) as temporary:
            try:
                save_file(tensors, str(temporary), metadata)
            except OSError:
                raise
            except Exception as error:  # safetensors has an error of its own for a full disk
                raise OSError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TrainingState":
        """Reads a state.

        Raises:
            CheckpointError: the file is missing, damaged or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                metadata = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{Path(path)} is no readable training state: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(f"{Path(path)} is no training state of this version")
        if digest_arrays(tensors) != metadata.get("sha256"):
            raise CheckpointError(f"{Path(path)} is damaged: its tensors are not those of its sha256")
        described = json.loads(metadata["state"])
        groups: dict[str, dict[str, np.ndarray]] = {group: {} for group in GROUPS}
        for name, value in tensors.items():
            group, _, key = name.partition("/")
            groups[group][key] = value
        recipe = Recipe.from_dict(described["recipe"])
        return cls(described["epoch"], described["step"], recipe, described["history"], **groups)


def matching_state(path: str | os.PathLike | None, recipe: Recipe, shapes: dict[str, Any]) -> TrainingState | None:
    """Returns the state to go on from, or None where there is no file yet.

    Args:
        path: of the file; None: there is none.
        recipe: what is being trained by.
        shapes: key -> shape of the model's weights.

    Raises:
        CheckpointError: the file is damaged, of another recipe or of another model.
    """
    if path is None or not Path(path).exists():
        return None
    state = TrainingState.load(path)
    ours, theirs = recipe.to_dict(), state.recipe.to_dict()
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{Path(path)} was begun with {name}={theirs[name]!r}, but now it is {ours[name]!r}; "
            "go on with the same recipe, or begin anew elsewhere"
        )
    found = {key: value.shape for key, value in state.weights.items()}
    if found != {key: tuple(shape) for key, shape in shapes.items()}:
        raise CheckpointError(f"{Path(path)} is the state of another model")
    return state
