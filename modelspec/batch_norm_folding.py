"""Batch normalization merged into the convolution beside it, for inference: on weights by checkpoint key, in float64.

The statistics are constants then, so that normalizing is one more linear map; in training it is not.
"""

from collections.abc import Callable, Mapping

import numpy as np

_BEFORE = ("depth_wise_conv", "proj")  # convolutions whose output `norm` normalizes


def fold_batch_norm(tensors: Mapping[str, np.ndarray], epsilon: float) -> tuple[dict[str, np.ndarray], list[str]]:
    """Merges the batch normalizations that stand next to a convolution into it.

    Args:
        tensors: checkpoint key -> array of all weights.
        epsilon: of the normalizations.

    Returns:
        All weights, and the paths of the normalizations that do nothing anymore: their weights say so.
    """
    folded, paths = dict(tensors), []
    suffix = ".running_mean"
    for path in (key.removesuffix(suffix) for key in tensors if key.endswith(suffix)):
        found = _neighbour(path, tensors)
        if found is None:
            continue
        convolution, merged = found
        scale, shift = _scale_and_shift(tensors, path, epsilon)
        _put(folded, convolution, *merged(*_convolution(tensors, convolution), scale, shift))
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1 - epsilon)):
            folded[f"{path}.{name}"] = np.full_like(tensors[f"{path}.{name}"], value)
        paths.append(path)
    return folded, paths


def _neighbour(path: str, tensors: Mapping[str, np.ndarray]) -> tuple[str, Callable] | None:
    """Returns the convolution beside a normalization, and how the two are merged; None if there is none."""
    parent, _, name = path.rpartition(".")
    if name == "norm1":
        return f"{parent}.fc1", _normalized_before
    if name.isdecimal():
        return f"{parent}.{int(name) - 1}", _normalized_after
    beside = (f"{parent}.{convolution}" for convolution in _BEFORE if f"{parent}.{convolution}.weight" in tensors)
    return next(((convolution, _normalized_after) for convolution in beside), None)


def _scale_and_shift(tensors: Mapping[str, np.ndarray], path: str, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    gamma, beta, mean, variance = (
        tensors[f"{path}.{name}"].astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _convolution(tensors: Mapping[str, np.ndarray], path: str) -> tuple[np.ndarray, np.ndarray]:
    return tensors[f"{path}.weight"].astype(np.float64), tensors[f"{path}.bias"].astype(np.float64)


def _normalized_after(
    weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return weight * scale[:, None, None, None], bias * scale + shift


def _normalized_before(
    weight: np.ndarray, bias: np.ndarray, scale: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    # 1x1 and without padding, or what is added would miss the border
    return weight * scale[None, :, None, None], bias + np.einsum("oikl,i->o", weight, shift)


def _put(tensors: dict[str, np.ndarray], path: str, weight: np.ndarray, bias: np.ndarray) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        tensors[f"{path}.{name}"] = value.astype(tensors[f"{path}.{name}"].dtype)
