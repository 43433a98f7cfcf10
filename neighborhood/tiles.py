"""How neighborhood attention is cut into tiles, for implementations made of a framework's own operations.

Along an axis, each dilation group (see `neighborhood.windows`) is cut into tiles of neighbouring queries. All keys that
a tile's windows reach, its halo, lie side by side in the group. So attention is a batch of small dense ones, of tiles
with their halos, in which keys outside of a query's window are masked. Memory is proportional to the keys of the
windows: a tile is about as long as a window, and its halo less than two and a half.

All arrays are indices, of 32 bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from neighborhood.windows import check_fit


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """The tiles of one axis, of all its dilation groups one after another.

    Attributes:
        length: positions of the axis.
        kernel_size: keys per query.
        dilation: distance between neighbouring keys, in positions.
        tiles: number of tiles; a tensor where the length is one.
        tile: queries of a tile.
        halo: keys of a tile.
        queries: (tiles, tile) position of each query; the last tile of a group repeats its last one.
        keys: (tiles, halo) position of each key; likewise.
        outputs: (length,) where each position is among the queries.
        slots: (tiles, tile, halo) which key of a query's window a key is; negative where it is none.
        biases: (tiles, tile, halo) where query and key look up the bias table; clipped to it.
        picks: (tiles, tile, kernel_size) where the keys of a query's window are in the halo.
        starts: (length,) position of the first key of the query at each position.
    """

    length: Any
    kernel_size: int
    dilation: int
    tiles: Any
    tile: int
    halo: int
    queries: Any
    keys: Any
    outputs: Any
    slots: Any
    biases: Any
    picks: Any
    starts: Any


def axis_tiles(length: Any, kernel_size: int, dilation: int, xp: Any = np, fewest: int = 1) -> AxisTiles:
    """Cuts one axis into tiles.

    Args:
        length: positions; an integer, or a scalar tensor where the framework does not know it yet.
        kernel_size: keys per query.
        dilation: distance between neighbouring keys, in positions.
        xp: where `arange`, `minimum`, `maximum` and `where` come from, as numpy has them.
        fewest: tiles of a group, if the length is not known.

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
        if fewest > 1:
            per_group = xp.maximum(per_group, fewest)
        tile, halo = kernel_size, 2 * kernel_size - 1

    number = xp.arange(dilation * per_group, dtype="int32")[:, None]
    group = number // per_group
    group_length = (length - group + dilation - 1) // dilation
    begin = (number % per_group) * tile  # the tile's first query, in its group
    halo_begin = xp.maximum(xp.minimum(begin - kernel_size // 2, group_length - halo), 0 * number)
    query = xp.minimum(begin + xp.arange(tile, dtype="int32")[None], group_length - 1)  # (tiles, tile)
    key = halo_begin + xp.arange(halo, dtype="int32")[None]  # (tiles, halo)
    start = xp.maximum(xp.minimum(query - kernel_size // 2, group_length - kernel_size), 0 * query)
    slot = key[:, None] - start[:, :, None]
    bias = key[:, None] - query[:, :, None] + kernel_size - 1
    position = xp.arange(length, dtype="int32")
    own_group, own = position % dilation, position // dilation
    last = (length - own_group + dilation - 1) // dilation - kernel_size
    return AxisTiles(
        length=length,
        kernel_size=kernel_size,
        dilation=dilation,
        tiles=dilation * per_group,
        tile=tile,
        halo=halo,
        queries=query * dilation + group,
        keys=xp.minimum(key, group_length - 1) * dilation + group,
        outputs=own_group * (per_group * tile) + own,
        slots=xp.where((slot < 0) | (slot >= kernel_size), 0 * slot - 1, slot),
        biases=xp.maximum(xp.minimum(bias, 0 * bias + 2 * kernel_size - 2), 0 * bias),
        picks=(start - halo_begin)[:, :, None] + xp.arange(kernel_size, dtype="int32")[None, None],
        starts=xp.maximum(xp.minimum(own - kernel_size // 2, last), 0 * own) * dilation + own_group,
    )


def _once(method: Callable[[Any], Any]) -> property:
    """A property that is computed once; functools.cached_property holds a lock, which torch.compile cannot follow."""
    name = f"_{method.__name__}"

    def get(self: Any) -> Any:
        if name not in self.__dict__:
            setattr(self, name, method(self))
        return getattr(self, name)

    return property(get, doc=method.__doc__)


class Tiles:
    """The tiles of all axes: every combination of one tile per axis, the last axis being the fastest.

    Queries of a tile, keys of a halo and keys of a window are flattened likewise, and positions index the flattened
    map. With T, Q, L, K and N the numbers of tiles, queries of a tile, keys of a halo, keys of a window and positions:

    Args:
        lengths, kernel_size, dilation: as of `axis_tiles`, one per axis.
        xp: as of `axis_tiles`; `take` and `reshape` too.
        fewest: as of `axis_tiles`.

    Attributes:
        axes: the tiles of each axis.
        tiles, tile, halo: T, Q and L.
        queries: (T * Q,) position of each query.
        keys: (T * L,) position of each key.
        outputs: (N,) where each position is among `queries`.
        slots: (T, Q, L) which key of a query's window a key is; negative where it is none.
        biases: (T, Q, L) where query and key look up the flattened bias table.
        masked_biases: (T, Q, L) the same; one past the table's last where a key is outside of the query's window.
        picks: (T, Q, K) where the keys of a query's window are in the halo.
    """

    def __init__(
        self, lengths: Sequence, kernel_size: Sequence[int], dilation: Sequence[int], xp: Any = np, fewest: int = 1
    ):
        self._xp = xp
        self.axes = [axis_tiles(*axis, xp, fewest) for axis in zip(lengths, kernel_size, dilation, strict=True)]
        self.tiles = _product(axis.tiles for axis in self.axes)
        self.tile = _product(axis.tile for axis in self.axes)
        self.halo = _product(axis.halo for axis in self.axes)

    @_once
    def queries(self) -> Any:
        return self._flat([(axis.queries, (axis.tiles, axis.tile), axis.length) for axis in self.axes])

    @_once
    def keys(self) -> Any:
        return self._flat([(axis.keys, (axis.tiles, axis.halo), axis.length) for axis in self.axes])

    @_once
    def outputs(self) -> Any:
        tile = self._combine([(axis.outputs // axis.tile, (axis.length,), axis.tiles) for axis in self.axes])
        query = self._combine([(axis.outputs % axis.tile, (axis.length,), axis.tile) for axis in self.axes])
        return tile * self.tile + query

    @_once
    def slots(self) -> Any:
        # a key outside along one axis stays negative whatever its slots along the others, and 32 bits hold it
        outside = -_product(axis.kernel_size for axis in self.axes)
        slots = [self._xp.where(axis.slots < 0, 0 * axis.slots + outside, axis.slots) for axis in self.axes]
        return self._combine(
            [(slot, _per_key(axis), axis.kernel_size) for slot, axis in zip(slots, self.axes, strict=True)]
        )

    @_once
    def biases(self) -> Any:
        return self._combine([(axis.biases, _per_key(axis), 2 * axis.kernel_size - 1) for axis in self.axes])

    @_once
    def masked_biases(self) -> Any:
        table = _product(2 * axis.kernel_size - 1 for axis in self.axes)
        return self._xp.where(self.slots < 0, 0 * self.slots + table, self.biases)

    @_once
    def picks(self) -> Any:
        shapes = [(axis.tiles, axis.tile, axis.kernel_size) for axis in self.axes]
        return self._combine([(axis.picks, shape, axis.halo) for axis, shape in zip(self.axes, shapes, strict=True)])

    def _combine(self, parts: list[tuple]) -> Any:
        """Combines, of each axis, an array of indices, its shape and the size that it indexes, dimension by dimension.

        Element [i * other rows + j, ..] of the result is `first[i, ..] * size + second[j, ..]`.
        """
        combined, shape, _ = parts[0]
        for part, own, size in parts[1:]:
            for dimension, (ours, theirs) in enumerate(zip(shape, own, strict=True)):
                position = self._xp.arange(ours * theirs, dtype="int32")
                combined = self._xp.take(combined, position // theirs, dimension)
                part = self._xp.take(part, position % theirs, dimension)
            combined = combined * size + part
            shape = tuple(ours * theirs for ours, theirs in zip(shape, own, strict=True))
        return combined

    def _flat(self, parts: list[tuple]) -> Any:
        return self._xp.reshape(self._combine(parts), (-1,))


def _per_key(axis: AxisTiles) -> tuple:
    return axis.tiles, axis.tile, axis.halo


def _product(sizes: Iterable) -> Any:
    return functools.reduce(lambda product, size: product * size, sizes)


@functools.lru_cache(maxsize=32)
def known_tiles(lengths: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> Tiles:
    """Returns the tiles of a map of known size, as NumPy arrays; a network asks for the same ones again and again."""
    return Tiles(lengths, kernel_size, dilation)
