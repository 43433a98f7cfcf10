"""Neighborhood attention of torch's own operations: any device and dtype. Twin: `tfmodels/composed_attention.py`.

Tiles of queries meet their halos of keys (`neighborhood.tiles`) in dense products, with a mask.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from neighborhood.tiles import Tiles, known_tiles


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
    logits = _logits(scale * query, key, tiles, rel_pos_bias)  # (B, T, heads, Q, L)
    inside = _index_on(tiles.slots, query)[:, None] >= 0
    logits = torch.where(inside, logits, torch.finfo(logits.dtype).min)
    probabilities = logits.softmax(-1).to(value.dtype)
    if dropout is not None:
        probabilities = dropout(probabilities)
    output = _weigh(probabilities, value, tiles)
    if not return_probabilities:
        return output
    return output, _in_windows(probabilities, query, tiles)


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def can_be_fused(query: Tensor, key: Tensor, value: Tensor, *, rel_pos_bias: Tensor | None, scale: float) -> bool:
    """Whether `fused_attention` gives the same, which asks for the numbers themselves.

    Its mask is added, and that keeps a key out unless its product is infinite or not a number.
    """
    tensors = [query, key, value] if rel_pos_bias is None else [query, key, value, rel_pos_bias]
    # no product is larger than that of all numbers' norms, and these are not finite where a number is not
    norms = [torch.linalg.vector_norm(x, dtype=_computed_in(x)).item() for x in tensors]
    return query.numel() > 0 and abs(scale) * norms[0] * norms[1] < 1e30 and all(norm < 1e30 for norm in norms)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    *,
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The same by torch's own fused attention, which keeps no logits; sample by sample, as all share one mask."""
    tiles = _tiles(query, kernel_size, dilation)
    mask = _added_mask(rel_pos_bias, query, tiles)
    outputs = []
    for sample in zip(query.split(1), key.split(1), value.split(1), strict=True):
        query_tiles = _split(sample[0], tiles.queries, tiles.tiles, tiles.tile)[0]
        key_tiles, value_tiles = (_split(x, tiles.keys, tiles.tiles, tiles.halo)[0] for x in sample[1:])
        output = torch.nn.functional.scaled_dot_product_attention(
            query_tiles, key_tiles, value_tiles, attn_mask=mask, scale=scale
        )
        outputs.append(_join(output[None], sample[0], tiles))
    return torch.cat(outputs)


def _added_mask(rel_pos_bias: Tensor | None, query: Tensor, tiles: Tiles) -> Tensor:
    """The bias, and minus infinity for keys outside of a query's window: (T, heads or 1, Q, L)."""
    if rel_pos_bias is None:
        mask = query.new_zeros(tiles.slots.shape, dtype=_computed_in(query))
        return mask.masked_fill_(_index_on(tiles.slots, query) < 0, -torch.inf)[:, None]
    table = rel_pos_bias.flatten(1).to(_computed_in(query))
    table = torch.nn.functional.pad(table, (0, 1), value=-torch.inf)
    entries = _index_on(tiles.masked_biases, query)
    return table.index_select(1, entries.flatten()).unflatten(1, entries.shape).transpose(0, 1)


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
    slots = _index_on(tiles.slots, value)[:, None].long()  # (T, 1, Q, L)
    probabilities = _split(probabilities, tiles.queries, tiles.tiles, tiles.tile)  # (B, T, heads, Q, K)
    probabilities = torch.take_along_dim(probabilities, slots.clamp(min=0)[None], -1)  # (B, T, heads, Q, L)
    return _weigh(torch.where(slots >= 0, probabilities, torch.zeros_like(probabilities)), value, tiles)


class _Namespace:
    """NumPy's functions on tensors, for tiles of a map whose size is not known yet."""

    def __init__(self, device: torch.device):
        self.device = device

    def arange(self, stop: Any, dtype: str) -> Tensor:
        return torch.arange(stop, dtype=getattr(torch, dtype), device=self.device)

    def take(self, x: Tensor, index: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, index)

    def maximum(self, x: Any, y: Any) -> Any:
        return torch.maximum(x, y) if isinstance(x, Tensor) else torch.sym_max(x, y)

    minimum, where, reshape = staticmethod(torch.minimum), staticmethod(torch.where), staticmethod(torch.reshape)


def _tiles(x: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tiles:
    """Cuts the spatial axes of (B, *spatial, heads, channels)."""
    lengths = tuple(x.shape[1:-2])
    if torch.compiler.is_compiling():  # follows neither NumPy nor a cache
        if not torch.compiler.is_exporting():
            # Inductor does not come to an end with tiles of symbolic sizes: it gets one program per size
            lengths = tuple(operator.index(length) for length in lengths)
    elif all(isinstance(length, int) for length in lengths):
        return known_tiles(lengths, tuple(kernel_size), tuple(dilation))
    wanted = (*lengths, *kernel_size, *dilation)
    for known, tiles in _shared or ():
        if len(known) == len(wanted) and all(map(_surely_equal, known, wanted)):
            return tiles
    # an exporter takes a size of 1 for one that stays 1: then the export would be for maps of one tile, or of several
    fewest = 2 if torch.compiler.is_exporting() else 1
    tiles = Tiles(lengths, kernel_size, dilation, _Namespace(x.device), fewest)
    if _shared is not None:
        _shared.append((wanted, tiles))
    return tiles


_shared: list[tuple[tuple, Tiles]] | None = None


@contextlib.contextmanager
def sharing_tiles() -> Iterator[None]:
    """Within the context, which is for one `torch.export.export`, maps of one unknown size share their tiles.

    Computing these is three quarters of what is exported, and the blocks of a stage need the same ones.
    """
    global _shared
    before, _shared = _shared, []
    try:
        yield
    finally:
        _shared = before


def _surely_equal(first: Any, second: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # SymPy with it: for exports alone

    return statically_known_true(first == second)


def _index_on(array: Any, x: Tensor) -> Tensor:
    return array if isinstance(array, Tensor) else torch.as_tensor(array, device=x.device)


def _split(x: Tensor, positions: Any, tiles: Any, elements: int) -> Tensor:
    """Gathers (B, *spatial, heads, channels) into (B, tiles, heads, elements of a tile, channels)."""
    batch, heads, channels = x.shape[0], x.shape[-2], x.shape[-1]
    x = x.flatten(1, -3).flatten(2).index_select(1, _index_on(positions, x))
    return x.reshape(batch, tiles, elements, heads, channels).transpose(2, 3)


def _join(x: Tensor, like: Tensor, tiles: Tiles) -> Tensor:
    """Puts (B, T, heads, Q, channels) back as (B, *spatial, heads, channels), spatial as of `like`."""
    heads, channels = x.shape[2], x.shape[4]
    x = x.transpose(2, 3).flatten(1, 2).flatten(2).index_select(1, _index_on(tiles.outputs, x))
    return x.reshape(*like.shape[:-2], heads, channels)


def _logits(query: Tensor, key: Tensor, tiles: Tiles, rel_pos_bias: Tensor | None) -> Tensor:
    """(B, T, heads, Q, L), in float32 at least."""
    query = _split(query, tiles.queries, tiles.tiles, tiles.tile)
    key = _split(key, tiles.keys, tiles.tiles, tiles.halo)
    logits = torch.matmul(query, key.transpose(-1, -2))
    logits = logits.to(_computed_in(logits))
    if rel_pos_bias is not None:
        logits = logits + _bias(rel_pos_bias, tiles).to(logits.dtype)
    return logits


def _bias(table: Tensor, tiles: Tiles) -> Tensor:
    """Looks up (heads, 2 * kernel_size - 1 per axis) as (T, heads, Q, L).

    Per tile: the gradient is then a sum of sums, which rounds less and is found faster than one long sum.
    """
    entries = _index_on(tiles.biases, table).flatten(1)[:, None].long()  # (T, 1, Q * L)
    table = table.flatten(1).expand(tiles.tiles, -1, -1)
    found = table.gather(-1, entries.expand(-1, table.shape[1], -1))
    return found.unflatten(-1, (tiles.tile, tiles.halo))


def _weigh(probabilities: Tensor, value: Tensor, tiles: Tiles) -> Tensor:
    # zeros of the mask times NaN or infinity would be NaN: these stay out of the product, added where they belong
    finite = torch.where(value.abs() < torch.inf, value, 0.0)
    output = torch.matmul(probabilities, _split(finite, tiles.keys, tiles.tiles, tiles.halo))
    return _join(output, value, tiles) + _cover(value.detach() - finite.detach(), tiles)


def _cover(x: Tensor, tiles: Tiles) -> Tensor:
    """Adds up x over each query's window, some of it repeatedly, which zero, NaN and infinity do not mind."""
    for axis, along in enumerate(tiles.axes, start=1):
        covered = 1  # an element stands for so many keys from its own on
        while covered < along.kernel_size:
            step = min(covered, along.kernel_size - covered)
            x = _add_shifted(x, axis, step * along.dilation)
            covered += step
        x = x.index_select(axis, _index_on(along.starts, x))
    return x


def _add_shifted(x: Tensor, axis: int, shift: int) -> Tensor:
    """Adds to each element the one `shift` positions on; of the last ones, which have none, windows have no use."""
    kept = x.shape[axis] - shift
    if not torch.compiler.is_exporting():
        return x.narrow(axis, 0, kept) + x.narrow(axis, shift, kept)
    positions = torch.arange(x.shape[axis], device=x.device) + shift  # `kept` might be 1, see `_tiles`
    return x + x.index_select(axis, positions.clamp(max=x.shape[axis] - 1))


def _in_windows(x: Tensor, query: Tensor, tiles: Tiles) -> Tensor:
    """Picks a window's keys out of (B, T, heads, Q, L): (B, *spatial, heads, keys)."""
    picks = _index_on(tiles.picks, x)[:, None][None].long()
    return _join(torch.take_along_dim(x, picks, -1), query, tiles)
