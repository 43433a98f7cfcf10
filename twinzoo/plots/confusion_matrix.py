"""Which classes a model takes for which."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

_COLORS = "Blues"
_BLANK = "#f4f1ea"
_WITH_COUNTS = 20  # classes at most whose counts are written into the squares
_TICKS = 40  # names at most along a side
_LONGEST = 24  # characters of a name


def plot_confusion_matrix(matrix: ArrayLike, labels: Sequence[str]) -> Figure:
    """Draws a confusion matrix: a row per true class, a column per predicted one, colours in percent of the row.

    Up to 20 classes, the squares also say their counts. Of many classes, only some are named along the sides, and the
    colours are spread at the low end, so that a few mistakes among hundreds of columns can be seen.

    Args:
        matrix: (n, n) integer counts; a row without any is left blank.
        labels: n class names.

    Returns:
        A matplotlib figure, `figure.savefig("confusion.png")`; its title gives the accuracy.

    Raises:
        ValueError: the matrix is not square, or not of counts, or there are more or fewer labels than classes.
    """
    counts = _counts(matrix)
    n = len(counts)
    if len(labels) != n:
        raise ValueError(f"labels has {len(labels)} names; the matrix is of {n} classes")
    totals = counts.sum(axis=1, keepdims=True)
    percent = np.ma.masked_invalid(100 * np.divide(counts, totals, where=totals > 0, out=np.full((n, n), np.nan)))
    side = min(10.0, 3.0 + 0.42 * n)
    figure = Figure(figsize=(side + 0.8, side), dpi=100 if n <= _TICKS else 200, layout="compressed")
    axis = figure.subplots()
    colors = matplotlib.colormaps[_COLORS].with_extremes(bad=_BLANK)
    norm = matplotlib.colors.PowerNorm(1 if n <= _WITH_COUNTS else 1 / 3, 0, 100)
    image = axis.imshow(percent, cmap=colors, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, shrink=0.7, aspect=30, pad=0.02)
    if n > _WITH_COUNTS:
        bar.set_ticks([0, 1, 5, 20, 50, 100])
    bar.set_label("percent of the true class", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _name_classes(axis, labels, side / n)
    if n <= _WITH_COUNTS:
        _write_counts(axis, counts, percent)
    images, right = int(counts.sum()), int(np.trace(counts))
    rate = f"accuracy {100 * right / images:.1f} %, {right:,} of {images:,} images" if images else "no images"
    axis.set_title(rate, fontsize=11)
    return figure


def _counts(matrix: ArrayLike) -> np.ndarray:
    """(n, n) int64."""
    array = np.asarray(matrix)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise ValueError(f"matrix has shape {array.shape}; give (n, n), a row and a column per class")
    if array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(f"matrix is of {array.dtype} from {array.min()}; give integer counts, 0 or more")
    return array.astype(np.int64)


def _name_classes(axis: Axes, labels: Sequence[str], room: float) -> None:
    """Names classes along both sides, the columns' upright where `room`, inches of a column, is too small."""
    n = len(labels)
    places = range(0, n, math.ceil(n / _TICKS))
    names = [_shorten(str(labels[place])) for place in places]
    size = 9 if n <= _WITH_COUNTS else 7
    upright = max(map(len, names)) * size / 100 > room
    axis.set_xticks(places, names, fontsize=size, parse_math=False, rotation=90 if upright else 0)
    axis.set_yticks(places, names, fontsize=size, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1].rstrip() + "…"


def _write_counts(axis: Axes, counts: np.ndarray, percent: np.ma.MaskedArray) -> None:
    size = min(9.0, 26 / max(2, len(str(counts.max()))))
    for (row, column), count in np.ndenumerate(counts):
        if percent[row, column] is not np.ma.masked:
            color = "white" if percent[row, column] > 55 else "#303030" if count else "#b8b8b8"
            axis.text(column, row, str(count), ha="center", va="center", color=color, fontsize=size)
