"""The definition of neighborhood attention, in NumPy and float64, as plain as can be; all else is tested against it."""

from collections.abc import Callable

import numpy as np

from neighborhood.arguments import check_arguments
from neighborhood.windows import PerAxis, bias_positions, key_positions


def neighborhood_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    rel_pos_bias: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Attention of each position to a window of its neighbours, in one, two or three dimensions.

    Args:
        query, key, value: (B, *spatial, heads, head_dim), with one to three spatial axes.
        kernel_size: keys per query along each axis; a number, or one per axis.
        dilation: distance between neighbouring keys; a number, or one per axis.
        rel_pos_bias: (heads, 2 * kernel_size - 1 per axis), added to the logits by the distance from query to key.
        scale: factor on the dot products; head_dim**-0.5 by default.

    Returns:
        (B, *spatial, heads, head_dim) float64.

    Raises:
        ValueError: shapes that do not go together, or a window that does not fit.
    """
    sizes = check_arguments(np.shape(query), np.shape(key), np.shape(value), kernel_size, dilation)
    probabilities = attention_probabilities(query, key, kernel_size, dilation, rel_pos_bias=rel_pos_bias, scale=scale)
    value = np.asarray(value, np.float64)
    windows = _windows(value, *sizes)  # (B, *spatial, keys, heads, head_dim)
    return np.einsum("...hk,...khd->...hd", probabilities, windows)


def attention_probabilities(
    query: np.ndarray,
    key: np.ndarray,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    rel_pos_bias: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Returns how much each query attends to each of its keys; arguments and errors as `neighborhood_attention`.

    Returns:
        (B, *spatial, heads, keys) float64, the keys of a window row by row (its last axis is the fastest).
    """
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    bias_shape = None if rel_pos_bias is None else np.shape(rel_pos_bias)
    sizes = check_arguments(query.shape, key.shape, key.shape, kernel_size, dilation, bias_shape)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = np.einsum("...hd,...khd->...hk", scale * query, _windows(key, *sizes))
    if rel_pos_bias is not None:
        logits = logits + _window_bias(np.asarray(rel_pos_bias, np.float64), query.shape[1:-2], *sizes)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _windows(array: np.ndarray, kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> np.ndarray:
    """Gathers (B, *spatial, heads, head_dim) into (B, *spatial, keys, heads, head_dim)."""
    index: tuple = (slice(None), *_per_window(key_positions, array.shape[1:-2], kernel_size, dilation))
    gathered = array[index]  # (B, *spatial, *kernel_size, heads, head_dim)
    return gathered.reshape(*array.shape[:-2], -1, *array.shape[-2:])


def _window_bias(
    table: np.ndarray, spatial: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> np.ndarray:
    """Looks up (*spatial, heads, keys) in the table."""
    index: tuple = (slice(None), *_per_window(bias_positions, spatial, kernel_size, dilation))
    return np.moveaxis(table[index].reshape(table.shape[0], *spatial, -1), 0, -2)


def _per_window(
    positions: Callable[[int, int, int], np.ndarray],
    spatial: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
) -> list[np.ndarray]:
    """Index arrays, one per axis, that broadcast to (*spatial, *kernel_size)."""
    axes = len(spatial)
    index = []
    for axis, (length, kernel, step) in enumerate(zip(spatial, kernel_size, dilation, strict=True)):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = length, kernel
        index.append(positions(length, kernel, step).reshape(shape))
    return index
