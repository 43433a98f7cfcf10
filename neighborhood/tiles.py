"""How neighborhood attention is cut into tiles, for implementations made of a framework's own operations.

Along an axis, each dilation group (see `neighborhood.windows`) is cut into tiles of neighbouring queries. All keys that
a tile's windows reach, its halo, lie side by side in the group. So attention is a batch of small dense ones, of tiles
with their halos, in which keys outside of a query's window are masked. Memory is proportional to the keys of the
windows: a tile is about as long as a window, and its halo less than two and a half.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from neighborhood.windows import check_fit

_NONE = -(2**20)  # the slot of a key outside the window: stays negative when slots are combined


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """The tiles of one axis, all dilation groups one after another; arrays of integers.

    Attributes:
        tiles: number of tiles.
        tile: queries of a tile.
        halo: keys of a tile.
        queries: (tiles * tile,) position of each query; the last tile of a group repeats its last one.
        keys: (tiles * halo,) position of each key; likewise.
        outputs: (length,) where each position is among `queries`.
        slots: (tiles, tile, halo) which key of a query's window a key is; negative where it is none.
        biases: (tiles, tile, halo) where query and key look up the bias table; clipped to it.
        picks: (tiles, tile, kernel_size) where the keys of a query's window are in the halo.
    """

    tiles: Any
    tile: int
    halo: int
    queries: Any
    keys: Any
    outputs: Any
    slots: Any
    biases: Any
    picks: Any


def axis_tiles(length, kernel_size: int, dilation: int, xp=np) -> AxisTiles:
    """Cuts one axis into tiles.

    Args:
        length: positions; an integer, or a scalar tensor where the framework does not know it yet.
        kernel_size: keys per query.
        dilation: distance between neighbouring keys, in positions.
        xp: where `arange`, `minimum`, `maximum`, `where` and `reshape` come from, as numpy has them.

    Raises:
        ValueError: the window does not fit an axis of known length.
    """
    longest = (length + dilation - 1) // dilation
    if isinstance(length, int):
        check_fit(length, kernel_size, dilation)
        per_group = max(1, (longest + kernel_size // 2) // kernel_size)
        tile = -(-longest // per_group)
        halo = min(tile + kernel_size - 1, longest)
    else:
        per_group = (longest + kernel_size - 1) // kernel_size
        tile, halo = kernel_size, 2 * kernel_size - 1

    tiles = dilation * per_group
    number = xp.arange(tiles)
    group = number // per_group
    group_length = (length - group + dilation - 1) // dilation
    begin = (number % per_group) * tile  # the tile's first query, in its group
    zero = 0 * group_length
    halo_begin = xp.maximum(xp.minimum(begin - kernel_size // 2, group_length - halo), zero)

    begin, halo_begin, group, group_length = (x[:, None, None] for x in (begin, halo_begin, group, group_length))
    query = xp.minimum(begin + xp.arange(tile)[None, :, None], group_length - 1)  # (tiles, tile, 1)
    start = xp.maximum(xp.minimum(query - kernel_size // 2, group_length - kernel_size), 0 * query)
    key = halo_begin + xp.arange(halo)[None, None, :]  # (tiles, 1, halo)
    slot = key - start
    outside = (slot < 0) | (slot >= kernel_size)
    bias = key - query + kernel_size - 1
    position = xp.arange(length)
    return AxisTiles(
        tiles=tiles,
        tile=tile,
        halo=halo,
        queries=xp.reshape(query * dilation + group, (-1,)),
        keys=xp.reshape(xp.minimum(key, group_length - 1) * dilation + group, (-1,)),
        outputs=(position % dilation) * (per_group * tile) + position // dilation,
        slots=xp.where(outside, 0 * slot + _NONE, slot),
        biases=xp.maximum(xp.minimum(bias, 0 * bias + 2 * kernel_size - 2), 0 * bias),
        picks=start - halo_begin + xp.arange(kernel_size)[None, None, :],
    )


def combine(tiles: list[AxisTiles], name: str, sizes: Sequence[int], xp=np):
    """Combines an array of each axis into one of all axes.

    Args:
        tiles: the axes.
        name: of an attribute of shape (tiles, tile, keys): slots, biases or picks.
        sizes: of the space that the array indexes, along each axis.
        xp: where `repeat` and `tile` come from, as numpy has them.

    Returns:
        (tiles of all axes, queries of a tile, keys) indices into the flattened space, the last axis being the fastest.
    """
    combined = getattr(tiles[0], name)
    shape = (tiles[0].tiles, tiles[0].tile, combined.shape[-1])
    for axis, size in zip(tiles[1:], sizes[1:], strict=True):
        part = getattr(axis, name)
        own = (axis.tiles, axis.tile, part.shape[-1])
        combined = combined * size
        for dimension, times in enumerate(own):
            combined = xp.repeat(combined, times, dimension)
        combined = combined + xp.tile(part, shape)
        shape = tuple(ours * theirs for ours, theirs in zip(shape, own, strict=True))
    return combined
