"""Neighborhood attention of torch's own operations: any device and dtype. Twin: `tfmodels/composed_attention.py`.

Tiles of queries meet their halos of keys (`neighborhood.tiles`) in dense products, with a mask. NaN and infinity in a
value may reach queries of the same tile whose windows do not hold it: zero times NaN is NaN.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from neighborhood.tiles import AxisTiles, axis_tiles, combine


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    *,
    rel_pos_bias: Tensor | None = None,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None = None,
    return_probabilities: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `ptmodels.ops.neighborhood_attention`, of checked arguments."""
    tiles = _tiles(query, kernel_size, dilation)
    logits = _logits(scale * query, key, tiles, rel_pos_bias)  # (B, tiles, heads, queries, halo)
    inside = _combine(tiles, "slots", kernel_size, value.device)[:, None] >= 0
    logits = torch.where(inside, logits, torch.finfo(logits.dtype).min)
    probabilities = logits.softmax(-1).to(value.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    output = _weigh(probabilities, value, tiles)
    if not return_probabilities:
        return output
    return output, _in_windows(probabilities, query, tiles)


def window_logits(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    *,
    rel_pos_bias: Tensor | None = None,
) -> Tensor:
    """Returns the products of each query with its keys, plus the bias: (B, *spatial, heads, keys)."""
    tiles = _tiles(query, kernel_size, dilation)
    return _in_windows(_logits(query, key, tiles, rel_pos_bias).to(query.dtype), query, tiles)


def attend(probabilities: Tensor, value: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Returns the sums of each query's values, weighted by (B, *spatial, heads, keys)."""
    tiles = _tiles(value, kernel_size, dilation)
    spread = _queries(probabilities, tiles)
    slots = _combine(tiles, "slots", kernel_size, value.device)[:, None]
    spread = torch.take_along_dim(spread, slots.clamp(min=0)[None], -1)  # (B, tiles, heads, queries, halo)
    return _weigh(torch.where(slots >= 0, spread, torch.zeros_like(spread)), value, tiles)


class _Namespace:
    """The functions that `axis_tiles` needs, for lengths that are not known yet."""

    def __init__(self, device: torch.device):
        self.device = device

    def arange(self, stop) -> Tensor:
        return torch.arange(stop, device=self.device)

    minimum, maximum, where = map(staticmethod, (torch.minimum, torch.maximum, torch.where))
    reshape, repeat, tile = map(staticmethod, (torch.reshape, torch.repeat_interleave, torch.tile))


def _tiles(x: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> list[AxisTiles]:
    """Cuts the spatial axes of (B, *spatial, heads, head_dim)."""
    lengths = x.shape[1:-2]
    xp = np if all(isinstance(length, int) for length in lengths) else _Namespace(x.device)
    return [axis_tiles(*axis, xp) for axis in zip(lengths, kernel_size, dilation, strict=True)]


def _combine(tiles: list[AxisTiles], name: str, sizes: Sequence[int], device: torch.device) -> Tensor:
    known = isinstance(tiles[0].queries, np.ndarray)
    return _tensor(combine(tiles, name, sizes, np if known else _Namespace(device)), device)


def _tensor(index, device: torch.device) -> Tensor:
    return torch.as_tensor(index, device=device)


def _split(x: Tensor, parts: list[tuple]) -> Tensor:
    """Gathers (B, *spatial, heads, channels) into (B, tiles, heads, elements of a tile, channels).

    `parts` holds, per axis, the positions to gather, the number of tiles and the elements of one.
    """
    batch, heads, channels = x.shape[0], x.shape[-2], x.shape[-1]
    count, elements = 1, 1
    for (positions, number, size), length in zip(parts, x.shape[1:-2], strict=True):
        x = x.reshape(batch * count * elements, length, -1).index_select(1, _tensor(positions, x.device))
        x = x.reshape(batch * count, elements, number, -1).transpose(1, 2)  # (.., tiles, elements, size * rest)
        count, elements = count * number, elements * size
        x = x.reshape(batch * count, elements, -1)
    return x.reshape(batch, count, elements, heads, channels).transpose(2, 3)


def _join(x: Tensor, tiles: list[AxisTiles], lengths: Sequence[int]) -> Tensor:
    """Puts (B, tiles, heads, queries, channels) back as (B, *spatial, heads, channels)."""
    batch, count, heads, elements, channels = x.shape
    x = x.transpose(2, 3)
    for axis in reversed(tiles):
        count, elements = count // axis.tiles, elements // axis.tile
        x = x.reshape(batch * count, axis.tiles, elements, -1).transpose(1, 2)
        x = x.reshape(batch * count * elements, axis.tiles * axis.tile, -1).index_select(
            1, _tensor(axis.outputs, x.device)
        )
    return x.reshape(batch, *lengths, heads, channels)


def _queries(x: Tensor, tiles: list[AxisTiles]) -> Tensor:
    return _split(x, [(axis.queries, axis.tiles, axis.tile) for axis in tiles])


def _keys(x: Tensor, tiles: list[AxisTiles]) -> Tensor:
    return _split(x, [(axis.keys, axis.tiles, axis.halo) for axis in tiles])


def _logits(query: Tensor, key: Tensor, tiles: list[AxisTiles], rel_pos_bias: Tensor | None) -> Tensor:
    """(B, tiles, heads, queries, halo), in float32 at least."""
    logits = torch.matmul(_queries(query, tiles), _keys(key, tiles).transpose(-1, -2))
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if rel_pos_bias is not None:
        logits = logits + _bias(rel_pos_bias, tiles).to(logits.dtype)
    return logits


def _weigh(probabilities: Tensor, value: Tensor, tiles: list[AxisTiles]) -> Tensor:
    return _join(torch.matmul(probabilities, _keys(value, tiles)), tiles, value.shape[1:-2])


def _bias(table: Tensor, tiles: list[AxisTiles]) -> Tensor:
    """Looks up (heads, 2 * kernel_size - 1 per axis) as (tiles, heads, queries, halo)."""
    heads = table.shape[0]
    count, elements, halo = 1, 1, 1
    x = table
    for axis, entries in zip(tiles, table.shape[1:], strict=True):
        x = x.reshape(count * heads * elements * halo, entries, -1)
        x = x.index_select(1, _tensor(axis.biases, x.device).reshape(-1))
        x = x.reshape(count, heads * elements * halo, axis.tiles, -1).transpose(1, 2)
        count = count * axis.tiles
        x = x.reshape(count * heads * elements, halo, axis.tile, -1).transpose(1, 2)
        elements, halo = elements * axis.tile, halo * axis.halo
    return x.reshape(count, heads, elements, halo)


def _in_windows(x: Tensor, query: Tensor, tiles: list[AxisTiles]) -> Tensor:
    """Picks a window's keys out of (B, tiles, heads, queries, halo): (B, *spatial, heads, keys)."""
    picks = _combine(tiles, "picks", [axis.halo for axis in tiles], x.device)
    x = torch.take_along_dim(x, picks[:, None][None], -1)
    return _join(x, tiles, query.shape[1:-2])
