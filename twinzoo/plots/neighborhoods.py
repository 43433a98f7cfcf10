"""What the queries of neighborhood attention see, over a photograph."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from modelspec.configs import ModelConfig
from neighborhood.windows import key_positions
from twinzoo.plots.photographs import to_rgb

_COLORS = "inferno"
_QUERY = "#35e0ff"


def plot_neighborhoods(
    image: Any,
    attentions: Sequence,
    config: ModelConfig,
    pixel: tuple[int, int],
    *,
    input_size: tuple[int, int] | None = None,
    max_heads: int = 4,
) -> Figure:
    """Draws, over a photograph, the neighborhood that one of its pixels attends to.

    A row per stage, whose last block's dilation the title gives, and a column per head. The square around a key is the
    brighter the more the query, outlined, attends to it.

    Args:
        image: a PIL image, or an array (H, W, 3) or (H, W) of uint8 or of floats in 0..1.
        attentions: a model's `attentions` for this image, of either half: per stage (1, heads, H', W', keys).
        config: the model's config, for windows and dilations.
        pixel: row and column in `image`.
        input_size: height and width of `pixel_values`; those of `image` by default. Maps follow from it, and padding.
        max_heads: at most so many columns.

    Returns:
        A matplotlib figure: `figure.savefig("neighborhoods.png")`.

    Raises:
        ValueError: a pixel outside of the image, or attentions that do not fit `config`.
    """
    photograph = to_rgb(image)
    height, width = photograph.shape[:2]
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(f"pixel is {tuple(pixel)}; the image has {height} rows and {width} columns")
    if len(attentions) != config.num_layers:
        raise ValueError(f"attentions has {len(attentions)} entries; the config has {config.num_layers} stages")
    maps = _map_sizes(config, input_size or (height, width))
    weights = [_weights(stage, entry, config) for stage, entry in enumerate(attentions)]
    columns = min(max_heads, max(entry.shape[0] for entry in weights))
    rows = len(weights)
    figure = Figure(figsize=(2.6 * columns + 0.7, 2.6 * rows * height / width + 0.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for stage, (entry, size) in enumerate(zip(weights, maps, strict=True)):
        token = tuple(
            int(place * length / total) for place, length, total in zip(pixel, size, (height, width), strict=True)
        )
        dilation = config.dilations[stage][-1]
        for head in range(columns):
            axis = axes[stage, head]
            axis.set_axis_off()
            if head >= entry.shape[0]:
                continue
            _draw(axis, photograph, entry[head], token, size, config.kernel_size, dilation)
            axis.set_title(f"stage {stage + 1}, dilation {dilation}, head {head + 1}", fontsize=8)
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 100), _COLORS)
    bar = figure.colorbar(colors, ax=axes, shrink=0.5, aspect=30, pad=0.01)
    bar.set_label("weight, percent of the head's largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _map_sizes(config: ModelConfig, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of each stage's map: the stem halves twice, each downsampling once, rounding up."""
    return [tuple(math.ceil(length / (4 * 2**stage)) for length in size) for stage in range(config.num_layers)]


def _weights(stage: int, entry: Any, config: ModelConfig) -> np.ndarray:
    """One stage's probabilities, as (heads, H', W', keys)."""
    array = np.asarray(entry.detach().cpu() if hasattr(entry, "detach") else entry, dtype=np.float64)
    if array.ndim != 5 or array.shape[0] != 1 or array.shape[-1] != config.kernel_size**2:
        raise ValueError(
            f"attentions of stage {stage + 1} have shape {array.shape}; "
            f"give (1, heads, height, width, {config.kernel_size**2}), of one image"
        )
    return array[0]


def _draw(
    axis: Axes,
    photograph: np.ndarray,
    weights: np.ndarray,
    token: tuple[int, ...],
    size: tuple[int, ...],
    kernel_size: int,
    dilation: int,
) -> None:
    """Draws one head's neighborhood of a token; keys in the padding of a map lie outside of the photograph."""
    height, width = photograph.shape[:2]
    cell = height / size[0], width / size[1]
    gray = photograph.mean(axis=-1, keepdims=True)
    axis.imshow(0.25 * photograph + 0.3 * gray, extent=(0, width, height, 0))
    keys = [
        key_positions(length, kernel_size, dilation)[place]
        for length, place in zip(weights.shape[:2], token, strict=True)
    ]
    window = weights[token].reshape(kernel_size, kernel_size)
    colors = matplotlib.colormaps[_COLORS](window / window.max())
    for i, row in enumerate(keys[0]):
        for j, column in enumerate(keys[1]):
            if row < size[0] and column < size[1]:
                corner = (column * cell[1], row * cell[0])
                strength = 0.35 + 0.6 * window[i, j] / window.max()
                axis.add_patch(Rectangle(corner, cell[1], cell[0], color=colors[i, j], alpha=strength, linewidth=0))
    corner = (token[1] * cell[1], token[0] * cell[0])
    axis.add_patch(Rectangle(corner, cell[1], cell[0], fill=False, edgecolor=_QUERY, linewidth=1.6))
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
