"""Bicubic interpolation as torch has it: a = -0.75, borders repeated, pixel centres at halves."""

from typing import Any

import numpy as np

_A = -0.75


def tap_weights(t: Any) -> tuple[Any, Any, Any, Any]:
    """Weights of the neighbours at -1, 0, 1 and 2 for a point at `t` in [0, 1); numbers or any framework's arrays."""
    return _outer(t + 1.0), _inner(t), _inner(1.0 - t), _outer(2.0 - t)


def _inner(x: Any) -> Any:
    return ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1.0


def _outer(x: Any) -> Any:
    return ((_A * x - 5.0 * _A) * x + 8.0 * _A) * x - 4.0 * _A


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes the last two axes of (..., H, W), as `torch.nn.functional.interpolate(mode="bicubic")`; keeps the dtype.

    It computes in float64.
    """
    rows, columns = (_matrix(*sizes) for sizes in zip(array.shape[-2:], (height, width), strict=True))
    return (rows @ array.astype(np.float64) @ columns.T).astype(array.dtype)


def _matrix(in_size: int, out_size: int) -> np.ndarray:
    centers = (np.arange(out_size) + 0.5) * (in_size / out_size) - 0.5
    first = np.floor(centers)
    matrix = np.zeros((out_size, in_size))
    for tap, weight in zip((-1, 0, 1, 2), tap_weights(centers - first), strict=True):
        index = np.clip(first.astype(int) + tap, 0, in_size - 1)
        np.add.at(matrix, (np.arange(out_size), index), weight)
    return matrix
