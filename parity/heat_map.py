"""A map of differences as a picture: a small PNG whose colours grow evenly lighter with the value."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

SIDE = 320  # of the longer side, in units of the drawing
_LARGEST_CELL = 40
_STEPS = 64  # of the colour bar
_NOT_FINITE = (255, 0, 160)  # a hue that the map lacks


def draw_heat_map(heat: Any, where: str) -> dict[str, Any]:
    """Draws a matrix; 0 is darkest, the largest value lightest, what is no finite number has a colour of its own.

    Args:
        heat: (rows, columns) as nested lists; None is not finite.
        where: the entry of the report that holds it, for the message.

    Returns:
        `image` and `bar` as data URIs, `width` and `height` of the drawing, `rows`, `columns`, `largest` (None if no
        value is finite), its `row` and `column`, and the number of values that are `not_finite`.

    Raises:
        ValueError: it is no matrix of numbers that are 0 or more.
    """
    values = _matrix(heat, where)
    rows, columns = values.shape
    finite = np.isfinite(values)
    largest = float(values[finite].max()) if finite.any() else None
    parts = np.where(finite, values, 0.0) / (largest or 1.0)
    pixels = _colours(parts)
    pixels[~finite] = _NOT_FINITE
    row, column = np.unravel_index(np.argmax(np.where(finite, values, -1.0)), values.shape)
    cell = min(SIDE / max(rows, columns), _LARGEST_CELL)
    return {
        "image": _data_uri(pixels),
        "bar": _data_uri(_colours(np.linspace(1.0, 0.0, _STEPS)[:, None])),
        "width": max(columns * cell, 8.0),
        "height": max(rows * cell, 8.0),
        "rows": rows,
        "columns": columns,
        "largest": largest,
        "row": int(row),
        "column": int(column),
        "not_finite": int((~finite).sum()),
    }


def _matrix(heat: Any, where: str) -> np.ndarray:
    rows = heat if isinstance(heat, list | tuple) else []
    rows = [list(row) if isinstance(row, list | tuple) else [] for row in rows]
    if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
        raise ValueError(f"{where} must be a matrix, one list per row, all of one length")
    for value in (value for row in rows for value in row):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise ValueError(f"{where} holds {value!r}; it must hold numbers that are 0 or more, or null")
    return np.array([[math.nan if value is None else value for value in row] for row in rows], np.float64)


def _colours(parts: np.ndarray) -> np.ndarray:
    """Returns colours (..., 3) uint8 of values in 0..1: from dark violet over teal to light yellow.

    Lightness grows linearly in OKLab (B. Ottosson, 2020), hue turns evenly.
    """
    lightness = 0.22 + 0.74 * parts
    hue = np.deg2rad(300.0 - 200.0 * parts)
    chroma = 0.09 + 0.05 * np.exp(-(((parts - 0.78) / 0.15) ** 2))  # nearly all of it within sRGB
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ],
        axis=-1,
    )
    linear = cones**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = np.clip(linear, 0.0, 1.0)
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255.0 * gamma).astype(np.uint8)


def _data_uri(pixels: np.ndarray) -> str:
    """Returns an image (rows, columns, 3) uint8 as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
