"""Pillow's resizing of 8-bit images as arithmetic, so that a framework can do it and give the same bits.

Each axis is resized by itself, and rounded to 8 bits before the other: an output is a weighted sum of neighbouring
inputs. A filter, widened by the scale when an image shrinks (antialiasing), gives the weights in float64; they are
divided by their sum and rounded to multiples of 2**-22. Products with bytes and their sums are then exact in float64,
in whatever order they are added.

The weights come in blocks, of 8 outputs each that read the same inputs: a batch of small dense matrices, which is how
frameworks multiply a band matrix fast.

Source: Pillow 11 to 13, by experiment; the tests compare with the Pillow that is installed.
"""

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

BLOCK = 8  # outputs: larger blocks multiply more zeros, smaller ones read more inputs twice
NEAREST = 0
_STEPS = 2.0**22  # of weights, per unit

# What the formulas below need of an array library. `opaque` hides a constant from optimisers that would turn a division
# by it into a product with its rounded inverse; `cumsum` adds along the last axis, one by one from the first.
NUMPY = SimpleNamespace(
    **{name: getattr(np, name) for name in ("abs", "ceil", "floor", "max", "maximum", "minimum", "where")},
    sin=np.vectorize(math.sin, otypes=[np.float64]),  # the C library's, as Pillow's; NumPy may have its own
    cos=np.vectorize(math.cos, otypes=[np.float64]),
    arange=functools.partial(np.arange, dtype=np.float64),
    cumsum=functools.partial(np.cumsum, axis=-1),
    opaque=float,
)


def block_weights(in_size: Any, out_size: int, resample: int, maths: Any = NUMPY) -> tuple[Any, Any]:
    """Returns the band matrix that resizes one axis, in N = ceil(out_size / 8) blocks.

    Args:
        in_size: float64 scalar, at least 1.
        out_size: at least 1.
        resample: Pillow's number of a filter, but not 0 (nearest).
        maths: the library that computes, with the functions of `NUMPY`.

    Returns:
        positions: (N, L) float64 whole numbers: which inputs each block reads.
        weights: (N, 8, L) float64, of these inputs for each output; the outputs of the last block beyond `out_size`
            mean nothing.
    """
    support, kernel = _FILTERS[resample]
    scale = in_size / maths.opaque(out_size)
    stretch = maths.maximum(scale, 1.0)
    reach = support * stretch
    outputs = np.arange(-(-out_size // BLOCK) * BLOCK, dtype=np.float64).reshape(-1, BLOCK, 1)
    centers = (outputs + 0.5) * scale  # (N, 8, 1)
    first = maths.maximum(maths.floor(centers - reach + 0.5), 0.0)
    end = maths.minimum(maths.floor(centers + reach + 0.5), in_size)
    inputs = first[:, :1] + maths.arange(maths.max(end[:, -1] - first[:, 0]))  # (N, 1, L)
    weights = kernel((inputs - centers + 0.5) * (1.0 / stretch), maths)  # (N, 8, L)
    weights = maths.where((first <= inputs) & (inputs < end), weights, 0.0)
    total = maths.cumsum(weights)[:, :, -1:]
    weights = weights / maths.where(total != 0.0, total, 1.0) * _STEPS
    weights = maths.where(weights < 0.0, maths.ceil(weights - 0.5), maths.floor(weights + 0.5))
    return maths.minimum(inputs[:, 0], in_size - 1.0), weights * (1.0 / _STEPS)


def nearest_positions(in_size: Any, out_size: int, maths: Any = NUMPY) -> Any:
    """Returns which input each output of one axis is: (out_size,) float64 whole numbers; arguments as above."""
    scale = in_size / maths.opaque(out_size)
    # Pillow adds the scale up, so its rounding errors add up too.
    return maths.floor(maths.cumsum(maths.where(np.arange(out_size) == 0, scale * 0.5, scale)))


@functools.lru_cache(maxsize=64)
def cached_weights(in_size: int, out_size: int, resample: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `block_weights`, computed by NumPy: positions (N, L) int32, weights (N, 8, L) float64; read-only."""
    positions, weights = block_weights(np.float64(in_size), out_size, resample)
    return _read_only(positions.astype(np.int32)), _read_only(weights)


@functools.lru_cache(maxsize=64)
def cached_positions(in_size: int, out_size: int) -> np.ndarray:
    """Returns `nearest_positions`, computed by NumPy: (out_size,) int32; read-only."""
    return _read_only(nearest_positions(np.float64(in_size), out_size).astype(np.int32))


def height_comes_first(height: Any, width: Any, out_height: int, out_width: int) -> Any:
    """Says whether Pillow resizes the height before the width; it matters, since each pass rounds.

    Up to version 12 the width always comes first; version 13 begins with a height that loses more than twice as many
    pixels as the width. The Pillow that is installed is asked, once.

    Args:
        height, width: of the image; numbers or integer tensors.
        out_height, out_width: wanted.
    """
    if not _pillow_may_begin_with_height():
        return False
    return (out_height < height) & (height - out_height > 2 * (width - out_width))


def resize(pixels: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resizes (H, W, ...) uint8 as Pillow does, in NumPy: what the frameworks do, written plainly."""
    first = height_comes_first(pixels.shape[0], pixels.shape[1], height, width)
    for axis in (0, 1) if first else (1, 0):
        pixels = _resize_axis(pixels, axis, (height, width)[axis], resample)
    return pixels


def _resize_axis(pixels: np.ndarray, axis: int, out_size: int, resample: int) -> np.ndarray:
    moved = np.moveaxis(pixels, axis, 0)  # (in_size, ...)
    if resample == NEAREST:
        return np.moveaxis(moved[cached_positions(len(moved), out_size)], 0, axis)
    positions, weights = cached_weights(len(moved), out_size, resample)
    read = moved.reshape(len(moved), -1)[positions].astype(np.float64)  # (N, L, rest)
    sums = (weights @ read).reshape(-1, *moved.shape[1:])[:out_size]
    return np.moveaxis(np.clip(np.floor(sums + 0.5), 0, 255).astype(np.uint8), 0, axis)


@functools.cache
def _pillow_may_begin_with_height() -> bool:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 8), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((6, 8), resample=2))
    return np.array_equal(resized, _resize_axis(_resize_axis(pixels, 0, 8, 2), 1, 6, 2))


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


# The filters: x is the distance from the output's centre, in pixels of the smaller image.


def _box(x: Any, maths: Any) -> Any:
    return maths.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _bilinear(x: Any, maths: Any) -> Any:
    return maths.maximum(1.0 - maths.abs(x), 0.0)


def _hamming(x: Any, maths: Any) -> Any:
    x = maths.abs(x)
    # Its two constants are of single precision in Pillow.
    window = float(np.float32(0.54)) + float(np.float32(0.46)) * maths.cos(x * math.pi)
    inner = maths.where(x == 0.0, 1.0, _sinc(x, maths) * window)
    return maths.where(x < 1.0, inner, 0.0)


def _bicubic(x: Any, maths: Any) -> Any:
    x = maths.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return maths.where(x < 1.0, inner, maths.where(x < 2.0, outer, 0.0))


def _lanczos(x: Any, maths: Any) -> Any:
    return maths.where((x >= -3.0) & (x < 3.0), _sinc(x, maths) * _sinc(x / maths.opaque(3.0), maths), 0.0)


def _sinc(x: Any, maths: Any) -> Any:
    angle = maths.where(x == 0.0, 1.0, x * math.pi)
    return maths.where(x == 0.0, 1.0, maths.sin(angle) / angle)


_FILTERS = {1: (3.0, _lanczos), 2: (1.0, _bilinear), 3: (2.0, _bicubic), 4: (0.5, _box), 5: (1.0, _hamming)}
