"""Photographs as arrays, and maps laid over them."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_COLORS = "inferno"
_LARGEST = 1024  # pixels of a side; figures show no more, and many panels of a camera's image would fill the memory


def to_rgb(image: Any) -> np.ndarray:
    """Returns a photograph as (H, W, 3) floats in 0..1.

    Args:
        image: a PIL image, or an array (H, W, 3) or (H, W) of uint8 or of floats in 0..1.

    Raises:
        ValueError: an array of another shape.
    """
    array = np.asarray(image)
    if array.dtype == np.uint8:
        array = array / 255.0
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise ValueError(f"image has shape {array.shape}; give (H, W, 3) or (H, W)")
    return np.clip(array[..., :3].astype(float), 0.0, 1.0)


def to_panel(image: Any) -> np.ndarray:
    """As `to_rgb`, with sides of at most 1024 pixels."""
    photograph = to_rgb(image)
    factor = _LARGEST / max(photograph.shape[:2])
    if factor >= 1:
        return photograph
    size = [max(1, round(length * factor)) for length in photograph.shape[1::-1]]
    shrunk = Image.fromarray(np.uint8(np.rint(255 * photograph))).resize(size, Image.Resampling.BOX)
    return np.asarray(shrunk) / 255.0


def to_array(tensor: Any) -> np.ndarray:
    """Returns either half's tensor as a NumPy array; torch's as float64, since NumPy has no bfloat16."""
    return tensor.detach().cpu().double().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)


def draw_photograph(axis: Axes, photograph: np.ndarray) -> None:
    """Draws (H, W, 3) floats in 0..1, without ticks."""
    axis.imshow(photograph)
    axis.set_axis_off()


def draw_heat(axis: Axes, photograph: np.ndarray, heat: np.ndarray, covered: tuple[float, float] | None = None) -> None:
    """Lays a coarse map over a photograph: the stronger, the brighter and the less transparent.

    Args:
        axis: matplotlib's axes.
        photograph: (H, W, 3) floats in 0..1.
        heat: (H', W') floats, not negative; colours are percent of its largest.
        covered: how many rows and columns of `heat` the photograph covers; all by default.
    """
    height, width = photograph.shape[:2]
    rows, columns = covered or heat.shape
    largest = heat.max()
    coarse = Image.fromarray(np.float32(100 * heat / largest if largest > 0 else heat))
    fine = coarse.resize((width, height), Image.Resampling.BICUBIC, box=(0, 0, columns, rows))
    percent = np.clip(np.asarray(fine), 0, 100)
    gray = photograph.mean(axis=-1, keepdims=True)
    draw_photograph(axis, 0.4 * photograph + 0.35 * gray)
    axis.imshow(percent, cmap=_COLORS, vmin=0, vmax=100, alpha=0.75 * (percent / 100) ** 0.7)


def add_heat_bar(figure: Figure, axes: Any) -> None:
    """Adds the legend of the colours of `draw_heat` to the right of `axes`."""
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 100), _COLORS)
    bar = figure.colorbar(colors, ax=axes, shrink=0.8, aspect=30, pad=0.01)
    bar.set_label("percent of largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
