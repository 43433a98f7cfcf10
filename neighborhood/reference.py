"""The definition of neighborhood attention, in NumPy and float64, as plain as can be; all else is tested against it."""

import numpy as np

from neighborhood.windows import PerAxis, bias_positions, key_positions, per_axis


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
    probabilities = attention_probabilities(query, key, kernel_size, dilation, rel_pos_bias=rel_pos_bias, scale=scale)
    value = np.asarray(value, np.float64)
    if value.shape != np.shape(key):
        raise ValueError(f"value has shape {value.shape}; it must be that of key, {np.shape(key)}")
    windows = _windows(value, kernel_size, dilation)  # (B, *spatial, keys, heads, head_dim)
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
    spatial, heads, head_dim = _shape(query, key)
    scale = head_dim**-0.5 if scale is None else scale
    logits = np.einsum("...hd,...khd->...hk", scale * query, _windows(key, kernel_size, dilation))
    if rel_pos_bias is not None:
        logits = logits + _window_bias(np.asarray(rel_pos_bias, np.float64), spatial, heads, kernel_size, dilation)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _shape(query: np.ndarray, key: np.ndarray) -> tuple[tuple[int, ...], int, int]:
    if query.shape != key.shape:
        raise ValueError(f"query has shape {query.shape} and key {key.shape}; they must be equal")
    if query.ndim not in (4, 5, 6):
        raise ValueError(
            f"query has shape {query.shape}; give (B, *spatial, heads, head_dim), one to three spatial axes"
        )
    return query.shape[1:-2], query.shape[-2], query.shape[-1]


def _windows(array: np.ndarray, kernel_size: PerAxis, dilation: PerAxis) -> np.ndarray:
    """Gathers (B, *spatial, heads, head_dim) into (B, *spatial, keys, heads, head_dim)."""
    spatial = array.shape[1:-2]
    index = _per_window(key_positions, spatial, kernel_size, dilation)
    gathered = array[(slice(None), *index)]  # (B, *spatial, *kernel_size, heads, head_dim)
    return gathered.reshape(*array.shape[:-2], -1, *array.shape[-2:])


def _window_bias(
    table: np.ndarray, spatial: tuple[int, ...], heads: int, kernel_size: PerAxis, dilation: PerAxis
) -> np.ndarray:
    """Looks up (*spatial, heads, keys) in the table."""
    needed = (heads, *(2 * k - 1 for k in per_axis("kernel_size", kernel_size, len(spatial))))
    if table.shape != needed:
        raise ValueError(f"rel_pos_bias has shape {table.shape}; these heads and windows need {needed}")
    index = _per_window(bias_positions, spatial, kernel_size, dilation)
    return np.moveaxis(table[(slice(None), *index)].reshape(heads, *spatial, -1), 0, -2)


def _per_window(positions, spatial: tuple[int, ...], kernel_size: PerAxis, dilation: PerAxis) -> list[np.ndarray]:
    """Index arrays, one per axis, that broadcast to (*spatial, *kernel_size)."""
    axes = len(spatial)
    sizes = per_axis("kernel_size", kernel_size, axes), per_axis("dilation", dilation, axes)
    index = []
    for axis, (length, kernel, step) in enumerate(zip(spatial, *sizes, strict=True)):
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = length, kernel
        index.append(positions(length, kernel, step).reshape(shape))
    return index
