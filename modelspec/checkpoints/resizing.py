"""Tables of positions for another window or image size than the file's, by bicubic interpolation.

As the authors of DiNAT made the models with windows of 11 of those with 7, and as ViT's positions are resized.
"""

import math

import numpy as np

from modelspec import bicubic
from modelspec.checkpoints.keys import Shape


def resized(key: str, value: np.ndarray, shape: Shape) -> np.ndarray | None:
    """Returns `value` interpolated to `shape`; None where `key` is no table or the shapes differ in something else.

    Args:
        key: the reference's name.
        value: (heads, 2 K - 1, 2 K - 1) for a bias table, (1, 1 + N, C) for position embeddings of N = n * n patches.
        shape: likewise.
    """
    if value.ndim != 3 or len(shape) != 3 or value.dtype.kind != "f":
        return None
    if key.endswith(".rpb") and value.shape[0] == shape[0] and value.size and shape[1] == shape[2]:
        return bicubic.resize(value, *shape[1:])
    if key.endswith("position_embeddings") and value.shape[::2] == shape[::2]:
        patches = [value.shape[1] - 1, shape[1] - 1]
        sides = [math.isqrt(max(count, 0)) for count in patches]
        if 0 in sides or [side**2 for side in sides] != patches:
            return None
        grid = value[0, 1:].reshape(sides[0], sides[0], -1).transpose(2, 0, 1)
        grid = bicubic.resize(grid, sides[1], sides[1]).transpose(1, 2, 0).reshape(1, sides[1] ** 2, -1)
        return np.concatenate([value[:, :1], grid], 1)
    return None
