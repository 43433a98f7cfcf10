"""Tiles hold what the windows of their queries need, and no more than a small factor of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neighborhood.tiles import Tiles, axis_tiles, known_tiles
from neighborhood.windows import bias_positions, key_positions

problems = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(0, 30)).map(
    lambda drawn: (drawn[0] * drawn[1] + drawn[2], drawn[0], drawn[1])
)


def unknown(length: int):
    """A length as of a framework that does not know it yet."""
    return np.int32(length)


@pytest.mark.parametrize("known", [True, False])
@given(problem=problems)
def test_the_halo_of_a_tile_holds_the_windows_of_its_queries(known, problem):
    length, kernel_size, dilation = problem
    tiles = axis_tiles(length if known else unknown(length), kernel_size, dilation)
    keys = np.take_along_axis(np.broadcast_to(tiles.keys[:, None], tiles.slots.shape), tiles.picks, -1)
    queries, expected = tiles.queries.reshape(-1), key_positions(length, kernel_size, dilation)
    np.testing.assert_array_equal(queries[tiles.outputs], np.arange(length))  # every position is somewhere
    np.testing.assert_array_equal(keys.reshape(-1, kernel_size)[tiles.outputs], expected)
    slots = np.take_along_axis(tiles.slots, tiles.picks, -1)
    np.testing.assert_array_equal(slots, np.broadcast_to(np.arange(kernel_size), slots.shape))
    assert ((tiles.slots >= 0).sum(-1) == kernel_size).all()  # nothing else is inside
    entries = np.take_along_axis(tiles.biases, tiles.picks, -1).reshape(-1, kernel_size)[tiles.outputs]
    np.testing.assert_array_equal(entries, bias_positions(length, kernel_size, dilation))


@given(problem=problems)
def test_memory_is_a_small_multiple_of_the_windows(problem):
    length, kernel_size, dilation = problem
    tiles = axis_tiles(length, kernel_size, dilation)
    assert tiles.halo <= 2.5 * kernel_size
    groups_are_short = length // dilation < 4
    assert groups_are_short or tiles.tiles * tiles.tile * tiles.halo <= 6 * length * kernel_size


def test_axes_combine_with_the_last_one_fastest():
    tiles = known_tiles((5, 6), (3, 2), (1, 2))
    grid = np.arange(30).reshape(5, 6)
    np.testing.assert_array_equal(tiles.queries[tiles.outputs], grid.reshape(-1))
    rows, columns = key_positions(5, 3), key_positions(6, 2, 2)
    expected = grid[rows[:, None, :, None], columns[None, :, None, :]].reshape(30, 6)
    keys = tiles.keys.reshape(tiles.tiles, 1, tiles.halo)
    keys = np.take_along_axis(np.broadcast_to(keys, tiles.slots.shape), tiles.picks, -1)
    np.testing.assert_array_equal(keys.reshape(-1, 6)[tiles.outputs], expected)


def test_tiles_of_a_known_map_are_made_once():
    assert known_tiles((7, 9), (3, 3), (1, 1)) is known_tiles((7, 9), (3, 3), (1, 1))
    assert known_tiles((7, 9), (3, 3), (1, 1)).slots.dtype == np.int32


def test_a_window_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="kernel_size 3 times dilation 2 is 6, more than the 5 positions"):
        Tiles((5,), (3,), (2,))


@pytest.mark.parametrize("kernel_size", [(2, 46, 46), (2, 2060), (3, 3)])
def test_masks_hold_for_windows_of_any_size(kernel_size):
    lengths = tuple(size + 1 for size in kernel_size)
    tiles = Tiles(lengths, kernel_size, (1,) * len(kernel_size))
    inside = (tiles.slots >= 0).sum(-1)
    assert (inside == np.prod(kernel_size)).all()
