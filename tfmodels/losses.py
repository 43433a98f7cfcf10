"""The losses of the three problem types. Twin: `ptmodels/losses.py`."""

import keras
from keras import ops

from modelspec.configs import ModelConfig
from modelspec.problem_types import resolve_problem_type


def image_classification_loss(config: ModelConfig, labels, logits, sample_weight=None):
    """Returns the mean loss of a classification head, a scalar.

    The mean is Keras' own, which scales with the replicas under a distribution strategy.

    Args:
        config: its `problem_type` names the loss; None is decided by the labels and kept (`resolve_problem_type`).
        labels: (B,) integers for one label of several; (B, num_labels) floats for several at once; (B,) or
            (B, num_labels) floats for regression.
        logits: (B, num_labels).
        sample_weight: (B,) floats, or None.
    """
    labels = ops.convert_to_tensor(labels)
    problem_type = resolve_problem_type(config, not keras.backend.is_float_dtype(labels.dtype))
    half = keras.backend.standardize_dtype(logits.dtype) in ("float16", "bfloat16")
    dtype = "float32" if half else logits.dtype
    if problem_type == "single_label_classification":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
        return loss(ops.reshape(labels, (-1,)), logits, sample_weight=sample_weight)
    if problem_type == "regression":
        loss = keras.losses.MeanSquaredError(dtype=dtype)
        return loss(ops.reshape(labels, ops.shape(logits)), logits, sample_weight=sample_weight)
    loss = keras.losses.BinaryCrossentropy(from_logits=True, dtype=dtype)
    return loss(labels, logits, sample_weight=sample_weight)


def labels_of(x, y):
    """Returns the labels of what Keras trains on: `y`, or the input named `labels`."""
    return x.get("labels") if y is None and isinstance(x, dict) else y


def logits_of(model, y_pred):
    """Returns the logits of what a model gave.

    Raises:
        ValueError: there are none.
    """
    if isinstance(y_pred, dict) and "logits" in y_pred:
        return y_pred["logits"]
    if isinstance(y_pred, tuple) and not model.config.return_dict:
        return next(value for value in y_pred if len(value.shape) == 2)
    raise ValueError(
        f"{type(model).__name__} has no classification head to train; use the ForImageClassification class"
    )
