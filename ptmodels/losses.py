"""The losses of the three problem types. Twin: `tfmodels/losses.py`."""

import torch
from torch.nn import functional

from modelspec.configs import ModelConfig
from modelspec.problem_types import resolve_problem_type


def image_classification_loss(config: ModelConfig, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of a classification head, a scalar.

    Args:
        config: its `problem_type` names the loss; None is decided by the labels and kept (`resolve_problem_type`).
        labels: (B,) integers for one label of several; (B, num_labels) floats for several at once; (B,) or
            (B, num_labels) floats for regression.
        logits: (B, num_labels).
    """
    labels = labels.to(logits.device)
    problem_type = resolve_problem_type(config, not labels.dtype.is_floating_point)
    if problem_type == "regression":
        return functional.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    if problem_type == "single_label_classification":
        return functional.cross_entropy(logits.reshape(-1, config.num_labels), labels.reshape(-1))
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
