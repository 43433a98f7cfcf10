"""Recomputing blocks in the backward pass, to save memory. Twin: `ptmodels/gradient_checkpointing.py`.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (arXiv:1604.06174), with blocks as segments.
"""

from collections.abc import Callable

import keras
from keras import ops


class GradientCheckpointing:
    """What models have for it; goes before `keras.Model` among the bases."""

    _flatten_layers: Callable  # of `keras.Model`

    def gradient_checkpointing_enable(self) -> None:
        """Makes training keep only what goes into each block, and compute the rest a second time for the gradients.

        Gradients, random masks and the statistics of batch normalization are those of training without it. Inference
        is not affected. It is not saved with the model. Gradients of gradients cannot be had; asking for them is
        TensorFlow's `NotImplementedError`. A model need not be compiled again, but a `tf.function` of one's own that
        was traced before stays as it is.
        """
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Ends what `gradient_checkpointing_enable` began."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in training."""
        return any(sequence.gradient_checkpointing for sequence in self._block_sequences())

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for sequence in self._block_sequences():
            sequence.gradient_checkpointing = value
        self.train_function = None  # it was traced with the former value

    def _block_sequences(self) -> list["BlockSequence"]:
        return [layer for layer in self._flatten_layers() if isinstance(layer, BlockSequence)]


class BlockSequence(keras.layers.Layer):
    """A layer that runs blocks by `run_block`, which may have them recomputed."""

    gradient_checkpointing = False

    def run_block(self, block: keras.layers.Layer, x, *, training: bool | None, **options):
        """Returns `block(x, **options)`.

        Args:
            block: a layer; it may have random seeds and moving statistics.
            x: its input.
            training: as this layer's `call` got it; only if it is true is anything recomputed.
            **options: further arguments; floating tensors among them get gradients.
        """
        # in a stateless scope there is nothing to differentiate, or variables have other values than their own
        if not training or not self.gradient_checkpointing or keras.src.backend.in_stateless_scope():
            return block(x, **options)
        return _recomputed(block, x, options)


def _recomputed(block: keras.layers.Layer, x, options: dict):
    # what is no argument of the function that Keras repeats gets no gradient
    tensors = {name: value for name, value in options.items() if _is_differentiable(value)}
    values_before: list[tuple] = []
    updates: list[tuple] = []
    pattern: list = []

    def run(x, *values):
        with _WithheldUpdates(values_before) as scope:
            outputs = block(x, training=True, **options | dict(zip(tensors, values, strict=True)))
        if not pattern:
            updates.extend(scope.updates.values())
            pattern.append(keras.tree.map_structure(lambda output: output is not None, outputs))
        return [output for output in keras.tree.flatten(outputs) if output is not None]

    outputs = iter(keras.remat(run)(x, *tensors.values()))
    # the recomputation has to draw from the seeds that this pass drew from, and may not update statistics again;
    # ops.convert_to_tensor would return the variables themselves
    values_before.extend((variable, ops.copy(variable)) for variable, _ in updates)
    for variable, value in updates:
        variable.assign(value)
    return keras.tree.map_structure(lambda is_there: next(outputs) if is_there else None, pattern[0])


def _is_differentiable(value) -> bool:
    return ops.is_tensor(value) and keras.backend.is_float_dtype(keras.backend.standardize_dtype(value.dtype))


class _WithheldUpdates(keras.StatelessScope):
    """Inside, what is assigned to variables is only noted, as `id` -> variable and value.

    Args:
        values: variables and the values that they have inside.
    """

    def __init__(self, values: list[tuple]):
        super().__init__(values)
        self.updates: dict[int, tuple] = {}

    def add_update(self, update):
        super().add_update(update)
        variable, _ = update
        self.updates[id(variable)] = update
