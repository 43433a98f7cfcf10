"""Bicubic resizing that equals torch's, for any size, inside a graph.

`tf.image` and `keras.ops.image` use the Keys kernel with a = -0.5; `torch.nn.functional.interpolate` uses a = -0.75 and
repeats the border.
"""

from keras import ops

from modelspec.bicubic import tap_weights


def bicubic_matrix(in_size: int, out_size, dtype: str):
    """Returns the (out_size, in_size) matrix that resizes one axis, as torch with `align_corners=False`.

    Args:
        in_size: static size of the axis.
        out_size: wanted size, an integer or a scalar integer tensor.
        dtype: floating dtype of the matrix.
    """
    scale = ops.cast(in_size, dtype) / ops.cast(out_size, dtype)
    centers = (ops.cast(ops.arange(out_size), dtype) + 0.5) * scale - 0.5
    first = ops.floor(centers)
    fraction = centers - first
    matrix = 0.0
    for tap, weight in zip((-1, 0, 1, 2), tap_weights(fraction), strict=True):
        index = ops.clip(ops.cast(first, "int32") + tap, 0, in_size - 1)
        matrix = matrix + weight[:, None] * ops.one_hot(index, in_size, dtype=dtype)
    return matrix


def resize_bicubic(grid, height, width):
    """Resizes a (H, W, C) grid of static size to (height, width, C)."""
    dtype = "float32" if grid.dtype in ("float16", "bfloat16") else grid.dtype
    rows = bicubic_matrix(grid.shape[0], height, dtype)
    columns = bicubic_matrix(grid.shape[1], width, dtype)
    return ops.cast(ops.einsum("yh,hwc,xw->yxc", rows, ops.cast(grid, dtype), columns), grid.dtype)
