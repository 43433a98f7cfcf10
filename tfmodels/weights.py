"""Keras variables under their checkpoint keys: one mechanical rule per layer type, both ways.

The attribute path of a layer is its checkpoint name, so only the last part of a key and the order of the axes differ
between the frameworks.
"""

import dataclasses
from collections.abc import Iterator

import keras
import numpy as np

# layer type -> Keras attribute -> (checkpoint name, order of the Keras axes in the checkpoint)
_RULES: list[tuple[type, dict[str, tuple[str, tuple[int, ...] | None]]]] = [
    (keras.layers.DepthwiseConv2D, {"kernel": ("weight", (2, 3, 0, 1)), "bias": ("bias", None)}),
    (keras.layers.Conv2D, {"kernel": ("weight", (3, 2, 0, 1)), "bias": ("bias", None)}),
    (keras.layers.Dense, {"kernel": ("weight", (1, 0)), "bias": ("bias", None)}),
    (keras.layers.LayerNormalization, {"gamma": ("weight", None), "beta": ("bias", None)}),
    (
        keras.layers.BatchNormalization,
        {
            "gamma": ("weight", None),
            "beta": ("bias", None),
            "moving_mean": ("running_mean", None),
            "moving_variance": ("running_var", None),
            "num_batches_tracked": ("num_batches_tracked", None),
        },
    ),
]


@dataclasses.dataclass(frozen=True)
class CheckpointVariable:
    """A Keras variable and how its axes lie in the checkpoint."""

    variable: keras.Variable
    axes: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the checkpoint."""
        shape = tuple(self.variable.shape)
        return shape if self.axes is None else tuple(shape[axis] for axis in self.axes)

    def to_checkpoint(self, value: np.ndarray) -> np.ndarray:
        """Lays an array of the variable's shape (its value, its gradient) out as in the checkpoint."""
        return np.ascontiguousarray(value if self.axes is None else np.transpose(value, self.axes)).reshape(self.shape)

    def to_keras(self, value: np.ndarray) -> np.ndarray:
        """Lays an array of the checkpoint's shape out as in the variable."""
        return value if self.axes is None else np.transpose(value, np.argsort(self.axes))


def checkpoint_variables(model: keras.Model) -> dict[str, CheckpointVariable]:
    """Returns checkpoint key -> variable for every weight of the model.

    Raises:
        RuntimeError: a weight of the model was not reached: some layer holds it under a private name.
    """
    variables = dict(_walk(model, ""))
    if len(variables) != len(model.weights):
        reached = {id(entry.variable) for entry in variables.values()}
        lost = [weight.path for weight in model.weights if id(weight) not in reached]
        raise RuntimeError(f"{type(model).__name__} has weights without a checkpoint key: {', '.join(lost)}")
    return variables


def _walk(layer: keras.layers.Layer, prefix: str) -> Iterator[tuple[str, CheckpointVariable]]:
    for layer_type, names in _RULES:
        if isinstance(layer, layer_type):
            for attribute, (name, axes) in names.items():
                variable = getattr(layer, attribute, None)
                if variable is not None:
                    yield prefix + name, CheckpointVariable(variable, axes)
            return
    for name, value in vars(layer).items():
        if name.startswith("_"):
            continue
        if isinstance(value, keras.layers.Layer):
            yield from _walk(value, f"{prefix}{name}.")
        elif isinstance(value, keras.Variable):
            yield prefix + name, CheckpointVariable(value)
        elif isinstance(value, (list, tuple, dict)):
            for index, entry in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(entry, keras.layers.Layer):
                    yield from _walk(entry, f"{prefix}{name}.{index}.")


def read_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """Returns checkpoint key -> array, in the checkpoint's layouts and the variables' dtypes."""
    return {
        key: entry.to_checkpoint(keras.ops.convert_to_numpy(entry.variable))
        for key, entry in checkpoint_variables(model).items()
    }


def assign_weights(model: keras.Model, tensors: dict[str, np.ndarray]) -> None:
    """Gives the model's variables the values of the checkpoint keys in `tensors`; others keep theirs.

    Raises:
        KeyError: a key is not the model's.
    """
    variables = checkpoint_variables(model)
    for key, value in tensors.items():
        entry = variables[key]
        entry.variable.assign(entry.to_keras(value).astype(entry.variable.dtype))
