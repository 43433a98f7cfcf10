"""Which keys a query attends to: the index arithmetic of neighborhood attention, for all users of it.

Along an axis of length L with dilation d, the positions fall into d groups of equal remainder modulo d. A query at
position i is the p-th of group g, p = i // d, g = i % d, and attends to `kernel_size` neighbours of its group: those
around it, or, near a border, the first or the last ones. Windows are shifted at borders, never cut. Of an even kernel
size, one more key lies to the left than to the right.

Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (arXiv:2204.07143), and Hassani and Shi, Dilated
Neighborhood Attention Transformer, 2022 (arXiv:2209.15001).
"""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

PerAxis = int | Sequence[int]


def per_axis(name: str, value: PerAxis, axes: int) -> tuple[int, ...]:
    """Returns `value` as one integer per axis.

    Raises:
        ValueError: it is no integer of at least 1, nor one such for each of `axes` axes.
    """
    values: Any = (value,) * axes if type(value) is int or isinstance(value, numbers.Integral) else value
    if type(values) is tuple and len(values) == axes and all(type(entry) is int and entry >= 1 for entry in values):
        return values  # the rest asks abstract classes, which takes as long as attention of a small map
    is_sequence = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_sequence or len(values) != axes or not all(_is_positive(entry) for entry in values):
        raise ValueError(f"{name} is {value!r}; give an integer of 1 or more, or {axes} of them, one per axis")
    return tuple(int(entry) for entry in values)


def _is_positive(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def check_fit(length: int, kernel_size: int, dilation: int) -> None:
    """Raises ValueError unless a window of `kernel_size * dilation` positions fits an axis of `length`."""
    if kernel_size * dilation > length:
        raise ValueError(
            f"kernel_size {kernel_size} times dilation {dilation} is {kernel_size * dilation}, more than the "
            f"{length} positions of the axis; pad the input to that length, or take a smaller window"
        )


def key_positions(length: int, kernel_size: int, dilation: int = 1) -> np.ndarray:
    """Returns the positions of each query's keys along one axis, ascending.

    Args:
        length: positions of the axis.
        kernel_size: keys per query.
        dilation: distance between neighbouring keys, in positions.

    Returns:
        (length, kernel_size) int64.

    Raises:
        ValueError: the window does not fit the axis.

    >>> key_positions(5, 3).tolist()
    [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    >>> key_positions(5, 2, dilation=2).tolist()
    [[0, 2], [1, 3], [0, 2], [1, 3], [2, 4]]
    """
    check_fit(length, kernel_size, dilation)
    position = np.arange(length)
    group, slot = position % dilation, position // dilation
    group_length = (length - group + dilation - 1) // dilation
    first = np.clip(slot - kernel_size // 2, 0, group_length - kernel_size)
    return (first[:, None] + np.arange(kernel_size)) * dilation + group[:, None]


def bias_positions(length: int, kernel_size: int, dilation: int = 1) -> np.ndarray:
    """Returns where each pair of query and key looks up the bias table along one axis.

    The entry is the distance from the query to the key, in steps of the dilation, plus `kernel_size - 1`.

    Args:
        length, kernel_size, dilation: as of `key_positions`.

    Returns:
        (length, kernel_size) int64, each 0..2 * kernel_size - 2.

    >>> bias_positions(5, 3).tolist()
    [[2, 3, 4], [1, 2, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2]]
    """
    steps = (key_positions(length, kernel_size, dilation) - np.arange(length)[:, None]) // dilation
    return steps + kernel_size - 1
