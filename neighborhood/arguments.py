"""What every implementation of neighborhood attention asks of its arguments."""

from collections.abc import Sequence

from neighborhood.windows import PerAxis, check_fit, per_axis

Size = int | None  # None where a framework does not know it yet

MAX_AXES = 3


def check_arguments(
    query: Sequence[Size],
    key: Sequence[Size],
    value: Sequence[Size],
    kernel_size: PerAxis,
    dilation: PerAxis,
    rel_pos_bias: Sequence[Size] | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Checks the shapes of a call and returns its kernel size and dilation, one entry per spatial axis.

    Args:
        query, key, value: shapes (B, *spatial, heads, head_dim); a size that is no integer is unknown and fits.
        kernel_size, dilation: a number, or one per axis.
        rel_pos_bias: shape (heads, 2 * kernel_size - 1 per axis), or None without a bias.

    Raises:
        ValueError: shapes that do not go together, a window that does not fit.
    """
    axes = len(query) - 3
    if not 1 <= axes <= MAX_AXES:
        raise ValueError(
            f"query has shape {_text(query)}; give (B, *spatial, heads, head_dim), one to three spatial axes"
        )
    for name, shape in (("key", key), ("value", value)):
        if not _fits(shape, query):
            raise ValueError(f"query has shape {_text(query)} and {name} {_text(shape)}; they must be equal")
    kernel_size = per_axis("kernel_size", kernel_size, axes)
    dilation = per_axis("dilation", dilation, axes)
    for length, kernel, step in zip(query[1:-2], kernel_size, dilation, strict=True):
        if isinstance(length, int):
            check_fit(length, kernel, step)
    if rel_pos_bias is not None:
        needed = (query[-2], *(2 * kernel - 1 for kernel in kernel_size))
        if not _fits(rel_pos_bias, needed):
            raise ValueError(
                f"rel_pos_bias has shape {_text(rel_pos_bias)}; these heads and windows need {_text(needed)}"
            )
    return kernel_size, dilation


def _fits(shape: Sequence[Size], expected: Sequence[Size]) -> bool:
    if shape == expected:  # what follows takes as long as attention of a small map
        return True
    return len(shape) == len(expected) and all(
        size == other for size, other in zip(shape, expected, strict=True) if size is not None and other is not None
    )


def _text(shape: Sequence[Size]) -> str:
    return str(tuple(shape))
