"""The labels and scores that a classifier serves, against what its logits say."""

import numpy as np

from modelspec.agreement import Agreement, compare, failed, root_mean_square
from modelspec.configs import ModelConfig


def compare_labels_and_scores(
    labels: np.ndarray, scores: np.ndarray, logits: np.ndarray, config: ModelConfig, top_k: int, bound: float
) -> dict[str, Agreement]:
    """Compares what was served beside logits with what these mean, which is worked out here once more, in float64.

    The logits are those that were served, and have been compared with the live model's: where two classes are nearly
    the same, live ones of another rounding would put them in another order.

    Args:
        labels, scores: (B, top_k), str and float, as they were served.
        logits: (B, num_labels).
        config: of the live model: its labels, and its `problem_type`.
        top_k: labels of each image.
        bound: the largest difference of scores, as a part of their rms. Labels are the same or are not.

    Returns:
        `{"scores": ..., "labels": ...}`
    """
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]  # the first of equals first, as in TensorFlow
    expected = np.take_along_axis(_scores(logits.astype(np.float64), config.problem_type), order, axis=-1)
    names = np.array([config.id2label[number] for number in range(config.num_labels)])[order]
    return {
        "scores": compare(scores, expected, root_mean_square(expected), bound),
        "labels": _compare_labels(labels, names, bound),
    }


def _scores(logits: np.ndarray, problem_type: str | None) -> np.ndarray:
    """Each label's own probability, or the label's among all; of a regression the values themselves."""
    if problem_type == "regression":
        return logits
    if problem_type == "multi_label_classification":
        return np.exp(-np.logaddexp(0.0, -logits))
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _compare_labels(labels: np.ndarray, expected: np.ndarray, bound: float) -> Agreement:
    if labels.shape != expected.shape:
        return failed(bound, "shape", f"shape {labels.shape} against {expected.shape}")
    wrong = labels != expected
    if wrong.any():
        first = f"{labels[wrong][0]!s} instead of {expected[wrong][0]!s}"
        return failed(bound, "value", f"{wrong.sum()} of {wrong.size} are others, the first {first}")
    return Agreement(0.0, 0.0, 1.0, bound, True)
