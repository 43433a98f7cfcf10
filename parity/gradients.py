"""Gradients of the loss in both halves, by checkpoint key and in the checkpoint's layouts. One signature for both.

    gradients(config, weights, pixel_values, dtype, options) -> {"pixel_values": ..., key: ...}

Args:
    config, weights, pixel_values, dtype: as of `parity.halves`.
    options: keyword arguments of the forward pass; `labels` among them.

The models are in evaluation mode: statistics and dropout are matters of `parity.training`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from modelspec.agreement import GRADIENT_BOUNDS, Agreement, compare_all
from modelspec.configs import ModelConfig
from modelspec.zero_gradients import has_zero_gradient
from parity import halves
from parity.halves import Arrays

# A gradient that is zero by construction may be so much of the largest one: rounding noise.
ZERO_BOUNDS = {"float64": 1e-12, "float32": 1e-6}


def torch_gradients(
    config: ModelConfig, weights: Arrays, pixel_values: np.ndarray, dtype: str, options: Mapping[str, Any]
) -> Arrays:
    """Returns the gradients of the PyTorch half; see the module."""
    import torch

    model = halves.BUILD["torch"](config, weights, dtype)
    images = torch.from_numpy(pixel_values).to(model.dtype).requires_grad_()
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    model(pixel_values=images, **tensors).loss.backward()
    leaves = {"pixel_values": images, **dict(model.named_parameters())}
    return {key: value.grad.numpy() for key, value in leaves.items()}


def keras_gradients(
    config: ModelConfig, weights: Arrays, pixel_values: np.ndarray, dtype: str, options: Mapping[str, Any]
) -> Arrays:
    """Returns the gradients of the Keras half; see the module."""
    import keras
    import tensorflow as tf

    from tfmodels.weights import checkpoint_variables

    model = halves.BUILD["keras"](config, weights, dtype)
    with keras.device("cpu:0"):
        entries = {key: entry for key, entry in checkpoint_variables(model).items() if entry.variable.trainable}
        images = tf.constant(pixel_values.astype(dtype))
        with tf.GradientTape() as tape:
            tape.watch(images)
            loss = model(pixel_values=images, training=False, **options).loss
        found = tape.gradient(loss, [images, *(entry.variable.value for entry in entries.values())])
    gradients = {"pixel_values": found[0].numpy()}
    for (key, entry), gradient in zip(entries.items(), found[1:], strict=True):
        gradients[key] = entry.to_checkpoint(keras.ops.convert_to_numpy(gradient))
    return gradients


GRADIENTS: dict[str, Callable[..., Arrays]] = {"torch": torch_gradients, "keras": keras_gradients}


def compare_gradients(
    config: ModelConfig, actual: Arrays, reference: Arrays, dtype: str, training: bool = False
) -> dict[str, Agreement]:
    """Compares gradients, or moments, by key; what is zero by construction must be it, up to rounding, on both sides.

    Args:
        config: of the model.
        actual, reference: key -> array.
        dtype: what `actual` was computed in.
        training: whether the models were in training mode, where more gradients are zero.
    """
    zero = {key for key in reference if has_zero_gradient(config, key, training)}
    agreements = compare_all(
        {key: value for key, value in actual.items() if key not in zero},
        {key: value for key, value in reference.items() if key not in zero},
        GRADIENT_BOUNDS[dtype],
    )
    largest = max(np.abs(value).max() for value in reference.values())
    for key in sorted(zero & actual.keys()):
        size = float(max(np.abs(actual[key]).max(), np.abs(reference[key]).max()))
        passed = bool(size <= ZERO_BOUNDS[dtype] * largest)
        reason = "" if passed else "it is zero by construction, but computed otherwise"
        agreements[key] = Agreement(
            size, size / largest, 1.0, ZERO_BOUNDS[dtype], passed, reason, "" if passed else "value"
        )
    return agreements
