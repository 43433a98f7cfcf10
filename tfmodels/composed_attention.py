"""Neighborhood attention of Keras' own operations: any device and dtype. Twin: `ptmodels/composed_attention.py`.

Tiles of queries meet their halos of keys (`neighborhood.tiles`) in dense products, with a mask. NaN and infinity in a
value may reach queries of the same tile whose windows do not hold it: zero times NaN is NaN.
"""

from collections.abc import Callable, Sequence

import numpy as np
from keras import backend, ops

from neighborhood.tiles import AxisTiles, axis_tiles, combine


def neighborhood_attention(
    query,
    key,
    value,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    *,
    rel_pos_bias=None,
    scale: float,
    dropout: Callable | None = None,
    return_probabilities: bool = False,
):
    """As `tfmodels.ops.neighborhood_attention`, of checked arguments."""
    tiles = _tiles(query, kernel_size, dilation)
    logits = _logits(scale * query, key, tiles, rel_pos_bias)  # (B, tiles, heads, queries, halo)
    inside = _combine(tiles, "slots", kernel_size)[:, None] >= 0
    lowest = np.finfo(backend.standardize_dtype(logits.dtype)).min
    logits = ops.where(inside, logits, ops.convert_to_tensor(lowest, dtype=logits.dtype))
    probabilities = ops.cast(_softmax(logits), value.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    output = _weigh(probabilities, value, tiles)
    if not return_probabilities:
        return output
    return output, _in_windows(probabilities, query, tiles)


def _softmax(logits):
    if logits.shape[-1] == 1:  # Keras warns of a softmax over a single element
        return ops.exp(logits - logits)
    return ops.softmax(logits)


def window_logits(
    query,
    key,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    *,
    rel_pos_bias=None,
):
    """Returns the products of each query with its keys, plus the bias: (B, *spatial, heads, keys)."""
    tiles = _tiles(query, kernel_size, dilation)
    return _in_windows(ops.cast(_logits(query, key, tiles, rel_pos_bias), query.dtype), query, tiles)


def attend(probabilities, value, kernel_size: Sequence[int], dilation: Sequence[int]):
    """Returns the sums of each query's values, weighted by (B, *spatial, heads, keys)."""
    tiles = _tiles(value, kernel_size, dilation)
    spread = _queries(probabilities, tiles)
    slots = _combine(tiles, "slots", kernel_size)[:, None]
    spread = ops.take_along_axis(spread, ops.maximum(slots, 0)[None], -1)  # (B, tiles, heads, queries, halo)
    return _weigh(ops.where(slots >= 0, spread, ops.zeros_like(spread)), value, tiles)


def _tiles(x, kernel_size: Sequence[int], dilation: Sequence[int]) -> list[AxisTiles]:
    """Cuts the spatial axes of (B, *spatial, heads, head_dim)."""
    lengths = _shape(x)[1:-2]
    known = all(isinstance(length, int) for length in lengths)
    lengths = lengths if known else [ops.convert_to_tensor(length, dtype="int32") for length in lengths]
    return [axis_tiles(*axis, np if known else ops) for axis in zip(lengths, kernel_size, dilation, strict=True)]


def _combine(tiles: list[AxisTiles], name: str, sizes: Sequence[int]):
    known = isinstance(tiles[0].queries, np.ndarray)
    return _tensor(combine(tiles, name, sizes, np if known else ops))


def _tensor(index):
    return ops.convert_to_tensor(index, dtype="int32")


def _shape(x) -> tuple:
    """Sizes as integers where they are known, else as scalar tensors."""
    return ops.shape(x)


def _split(x, parts: list[tuple]):
    """Gathers (B, *spatial, heads, channels) into (B, tiles, heads, elements of a tile, channels).

    `parts` holds, per axis, the positions to gather, the number of tiles and the elements of one.
    """
    batch, *lengths, heads, channels = _shape(x)
    count, elements = 1, 1
    for i, ((positions, number, size), length) in enumerate(zip(parts, lengths, strict=True)):
        rest = _product(lengths[i + 1 :]) * heads * channels
        x = ops.take(ops.reshape(x, (batch * count * elements, length, rest)), _tensor(positions), axis=1)
        x = ops.reshape(x, (batch * count, elements, number, size * rest))
        x = ops.transpose(x, (0, 2, 1, 3))  # (.., tiles, elements, size * rest)
        count, elements = count * number, elements * size
        x = ops.reshape(x, (batch * count, elements, rest))
    return ops.transpose(ops.reshape(x, (batch, count, elements, heads, channels)), (0, 1, 3, 2, 4))


def _join(x, tiles: list[AxisTiles], lengths: Sequence):
    """Puts (B, tiles, heads, queries, channels) back as (B, *spatial, heads, channels)."""
    batch, count, heads, elements, channels = _shape(x)
    x = ops.transpose(x, (0, 1, 3, 2, 4))
    rest = heads * channels
    for axis, length in reversed(list(zip(tiles, lengths, strict=True))):
        count, elements = count // axis.tiles, elements // axis.tile
        x = ops.reshape(x, (batch * count, axis.tiles, elements, axis.tile * rest))
        x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (batch * count * elements, axis.tiles * axis.tile, rest))
        x = ops.take(x, _tensor(axis.outputs), axis=1)
        rest = rest * length
    return ops.reshape(x, (batch, *lengths, heads, channels))


def _product(sizes: Sequence):
    product = 1
    for size in sizes:
        product = product * size
    return product


def _queries(x, tiles: list[AxisTiles]):
    return _split(x, [(axis.queries, axis.tiles, axis.tile) for axis in tiles])


def _keys(x, tiles: list[AxisTiles]):
    return _split(x, [(axis.keys, axis.tiles, axis.halo) for axis in tiles])


def _logits(query, key, tiles: list[AxisTiles], rel_pos_bias):
    """(B, tiles, heads, queries, halo), in float32 at least."""
    logits = ops.matmul(_queries(query, tiles), ops.transpose(_keys(key, tiles), (0, 1, 2, 4, 3)))
    if backend.standardize_dtype(logits.dtype) in ("float16", "bfloat16"):
        logits = ops.cast(logits, "float32")
    if rel_pos_bias is not None:
        logits = logits + ops.cast(_bias(rel_pos_bias, tiles), logits.dtype)
    return logits


def _weigh(probabilities, value, tiles: list[AxisTiles]):
    return _join(ops.matmul(probabilities, _keys(value, tiles)), tiles, _shape(value)[1:-2])


def _bias(table, tiles: list[AxisTiles]):
    """Looks up (heads, 2 * kernel_size - 1 per axis) as (tiles, heads, queries, halo)."""
    heads, *entries = table.shape
    count, elements, halo = 1, 1, 1
    x = table
    for i, axis in enumerate(tiles):
        rest = _product(entries[i + 1 :])
        x = ops.reshape(x, (count * heads * elements * halo, entries[i], rest))
        x = ops.take(x, ops.reshape(_tensor(axis.biases), (-1,)), axis=1)
        x = ops.reshape(x, (count, heads * elements * halo, axis.tiles, axis.tile * axis.halo * rest))
        x = ops.transpose(x, (0, 2, 1, 3))
        count = count * axis.tiles
        x = ops.reshape(x, (count * heads * elements, halo, axis.tile, axis.halo * rest))
        x = ops.transpose(x, (0, 2, 1, 3))
        elements, halo = elements * axis.tile, halo * axis.halo
    return ops.reshape(x, (count, heads, elements, halo))


def _in_windows(x, query, tiles: list[AxisTiles]):
    """Picks a window's keys out of (B, tiles, heads, queries, halo): (B, *spatial, heads, keys)."""
    picks = _combine(tiles, "picks", [axis.halo for axis in tiles])
    x = ops.take_along_axis(x, picks[:, None][None], -1)
    return _join(x, tiles, _shape(query)[1:-2])
