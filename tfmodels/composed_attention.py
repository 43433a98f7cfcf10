"""Neighborhood attention of Keras' own operations: any device and dtype. Twin: `ptmodels/composed_attention.py`.

Tiles of queries meet their halos of keys (`neighborhood.tiles`) in dense products, with a mask.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf
from keras import backend, ops

from neighborhood.tiles import Tiles, known_tiles


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
    logits = _logits(scale * query, key, tiles, rel_pos_bias)  # (B, T, heads, Q, L)
    inside = _index(tiles.slots)[:, None] >= 0
    lowest = np.finfo(backend.standardize_dtype(logits.dtype)).min
    logits = ops.where(inside, logits, ops.convert_to_tensor(lowest, dtype=logits.dtype))
    probabilities = ops.cast(_softmax(logits), value.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    output = _weigh(probabilities, value, tiles)
    if not return_probabilities:
        return output
    return output, _in_windows(probabilities, query, tiles)


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
    slots = _index(tiles.slots)[:, None]  # (T, 1, Q, L)
    probabilities = _split(probabilities, tiles.queries, tiles.tiles, tiles.tile)  # (B, T, heads, Q, K)
    probabilities = ops.take_along_axis(probabilities, ops.maximum(slots, 0)[None], -1)  # (B, T, heads, Q, L)
    return _weigh(ops.where(slots >= 0, probabilities, ops.zeros_like(probabilities)), value, tiles)


class _Namespace:
    """NumPy's functions on tensors, for tiles of a map whose size is not known yet.

    TensorFlow's own, as Keras' `take` first looks for negative indices, which makes thrice as many operations of it.
    """

    def arange(self, stop, dtype: str):
        return tf.range(stop, dtype=dtype)

    def take(self, x, index, axis: int):
        return tf.gather(x, index, axis=axis)

    minimum, maximum, where, reshape = map(staticmethod, (tf.minimum, tf.maximum, tf.where, tf.reshape))


def _tiles(x, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tiles:
    """Cuts the spatial axes of (B, *spatial, heads, channels)."""
    lengths = tuple(x.shape[1:-2])
    if None not in lengths:
        return known_tiles(lengths, tuple(kernel_size), tuple(dilation))
    graph, wanted = tf.compat.v1.get_default_graph(), (*lengths, *kernel_size, *dilation)
    shared = getattr(_sharing, "tiles", None)
    for known_graph, known, tiles in shared or ():
        if known_graph is graph and known == wanted:
            return tiles
    checks, sizes = [], ops.shape(x)[1:-2]
    for axis, (length, size, kernel, step) in enumerate(zip(lengths, sizes, kernel_size, dilation, strict=True), 1):
        if length is None:
            message = f"kernel_size {kernel} times dilation {step} is more than the positions of axis {axis} of query"
            checks.append(tf.debugging.Assert(size >= kernel * step, [message, size]))
    with tf.control_dependencies(checks):  # which XLA, knowing the sizes, drops
        sizes = [tf.identity(size) if length is None else size for length, size in zip(lengths, sizes, strict=True)]
    tiles = Tiles(sizes, kernel_size, dilation, _Namespace())
    if shared is not None:
        shared.append((graph, wanted, tiles))
    return tiles


_sharing = threading.local()


@contextlib.contextmanager
def sharing_tiles() -> Iterator[None]:
    """Within the context, which is for maps of one size, what is the same of their tiles is once in a graph.

    Computing tiles of unknown size is half of the graph of a network, those of known size are most of its bytes, and
    the blocks of a stage need the same ones.
    """
    before = vars(_sharing).copy()
    _sharing.tiles, _sharing.constants = [], {}
    try:
        yield
    finally:
        vars(_sharing).clear()
        vars(_sharing).update(before)


def _index(array):
    constants = getattr(_sharing, "constants", None)
    if constants is None or not isinstance(array, np.ndarray) or tf.executing_eagerly():
        return ops.convert_to_tensor(array, dtype="int32")
    graph = tf.compat.v1.get_default_graph()
    if (graph, id(array)) not in constants:  # the array is kept, so that no other gets its number
        constants[graph, id(array)] = ops.convert_to_tensor(array, dtype="int32"), array
    return constants[graph, id(array)][0]


def _split(x, positions, tiles, elements: int):
    """Gathers (B, *spatial, heads, channels) into (B, tiles, heads, elements of a tile, channels)."""
    batch, *_, heads, channels = ops.shape(x)
    x = tf.gather(ops.reshape(x, (batch, -1, heads * channels)), _index(positions), axis=1)
    if heads == 1:  # tf2onnx makes a wrong reshape of a transposition that moves nothing
        return ops.reshape(x, (batch, tiles, 1, elements, channels))
    return ops.transpose(ops.reshape(x, (batch, tiles, elements, heads, channels)), (0, 1, 3, 2, 4))


def _join(x, like, tiles: Tiles):
    """Puts (B, T, heads, Q, channels) back as (B, *spatial, heads, channels), spatial as of `like`."""
    batch, _, heads, _, channels = ops.shape(x)
    x = x if heads == 1 else ops.transpose(x, (0, 1, 3, 2, 4))  # see `_split`
    x = ops.reshape(x, (batch, -1, heads * channels))
    return ops.reshape(tf.gather(x, _index(tiles.outputs), axis=1), (*ops.shape(like)[:-2], heads, channels))


def _logits(query, key, tiles: Tiles, rel_pos_bias):
    """(B, T, heads, Q, L), in float32 at least."""
    query = _split(query, tiles.queries, tiles.tiles, tiles.tile)
    key = _split(key, tiles.keys, tiles.tiles, tiles.halo)
    logits = ops.matmul(query, ops.transpose(key, (0, 1, 2, 4, 3)))
    if backend.standardize_dtype(logits.dtype) in ("float16", "bfloat16"):
        logits = ops.cast(logits, "float32")
    if rel_pos_bias is not None:
        logits = logits + ops.cast(_bias(rel_pos_bias, tiles), logits.dtype)
    return logits


def _bias(table, tiles: Tiles):
    """Looks up (heads, 2 * kernel_size - 1 per axis) as (T, heads, Q, L).

    Per tile: the gradient is then a sum of sums, which rounds less and is found faster than one long sum.
    """
    heads, entries = table.shape[0], ops.reshape(_index(tiles.biases), (tiles.tiles, 1, -1))  # (T, 1, Q * L)
    table = ops.reshape(table, (1, heads, -1))
    table = ops.broadcast_to(table, (tiles.tiles, *table.shape[1:]))
    found = ops.take_along_axis(table, entries, -1)
    return ops.reshape(found, (tiles.tiles, heads, tiles.tile, tiles.halo))


def _softmax(logits):
    if logits.shape[-1] == 1:  # Keras warns of a softmax over a single element
        return ops.exp(logits - logits)
    return ops.softmax(logits)


def _weigh(probabilities, value, tiles: Tiles):
    # zeros of the mask times NaN or infinity would be NaN: these stay out of the product, added where they belong
    finite = ops.where(ops.abs(value) < np.inf, value, ops.zeros_like(value))
    output = ops.matmul(probabilities, _split(finite, tiles.keys, tiles.tiles, tiles.halo))
    return _join(output, value, tiles) + _cover(ops.stop_gradient(value - finite), tiles)


def _cover(x, tiles: Tiles):
    """Adds up x over each query's window, some of it repeatedly, which zero, NaN and infinity do not mind."""
    for axis, along in enumerate(tiles.axes, start=1):
        before = (slice(None),) * axis
        covered = 1  # an element stands for so many keys from its own on
        while covered < along.kernel_size:
            step = min(covered, along.kernel_size - covered)
            shift = step * along.dilation
            x = x[(*before, slice(None, -shift))] + x[(*before, slice(shift, None))]
            covered += step
        x = tf.gather(x, _index(along.starts), axis=axis)
    return x


def _in_windows(x, query, tiles: Tiles):
    """Picks a window's keys out of (B, T, heads, Q, L): (B, *spatial, heads, keys)."""
    picks = _index(tiles.picks)[:, None][None]
    return _join(ops.take_along_axis(x, picks, -1), query, tiles)
