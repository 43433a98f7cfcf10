"""What the class token of ViT-MSN attends to, over a photograph."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from twinzoo.plots.photographs import add_heat_bar, draw_heat, draw_photograph, to_array, to_panel

_COLUMNS = 7


def plot_attention(
    image: Any, attentions: Sequence, *, grid: tuple[int, int] | None = None, max_heads: int = 12
) -> Figure:
    """Draws what the class token attends to: the heads of the last layer, and the attention rollout of all layers.

    Args:
        image: a PIL image, or an array (H, W, 3) or (H, W) of uint8 or of floats in 0..1; what the model saw of it
            is the whole.
        attentions: a ViT-MSN model's `attentions` for this image, of either half: per layer (1, heads, 1 + N, 1 + N).
        grid: rows and columns of the N patches; a square by default.
        max_heads: at most so many heads.

    Returns:
        A matplotlib figure: `figure.savefig("attention.png")`.

    Raises:
        ValueError: attentions of another shape, or a grid that does not hold N patches.
    """
    layers = _layers(attentions)
    patches = layers[0].shape[-1] - 1
    rows, columns = grid or (math.isqrt(patches),) * 2
    if rows * columns != patches:
        given = f"grid is {rows}x{columns}" if grid else "there is no grid"
        raise ValueError(f"{given}; the attentions are of {patches} patches, and grid is their (rows, columns)")
    if max_heads < 1:
        raise ValueError(f"max_heads is {max_heads}; give 1 or more")
    maps = {f"head {head + 1}": weights[0, 1:] for head, weights in enumerate(layers[-1][:max_heads])}
    maps["rollout"] = _rollout(layers)[0, 1:]
    photograph = to_panel(image)
    height, width = photograph.shape[:2]
    lines = math.ceil((len(maps) + 1) / _COLUMNS)
    across = math.ceil((len(maps) + 1) / lines)
    figure = Figure(figsize=(1.9 * across + 0.6, max(1.6, lines * (1.9 * height / width + 0.25))), layout="constrained")
    axes = figure.subplots(lines, across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    first, *others = axes.flat
    draw_photograph(first, photograph)
    first.set_title("photograph", fontsize=9)
    for axis, (name, heat) in zip(others, maps.items(), strict=False):
        draw_heat(axis, photograph, heat.reshape(rows, columns))
        axis.set_title(name, fontsize=9)
    add_heat_bar(figure, axes)
    return figure


def attention_rollout(attentions: Sequence) -> np.ndarray:
    """How much of each token's output stems from each token of the input, followed through all layers.

    Attention rollout (Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, arXiv:2005.00928): of
    each layer the mean of the heads, half of it and half of the identity for the residual, rows summing to 1; and the
    product over the layers.

    Args:
        attentions: per layer (1, heads, tokens, tokens), of either half.

    Returns:
        (tokens, tokens) float64, rows summing to 1.

    Raises:
        ValueError: attentions of another shape.

    >>> uniform = np.full((1, 2, 2, 2), 0.5)
    >>> attention_rollout([uniform])
    array([[0.75, 0.25],
           [0.25, 0.75]])
    """
    return _rollout(_layers(attentions))


def _rollout(layers: list[np.ndarray]) -> np.ndarray:
    flow = np.eye(layers[0].shape[-1])
    for weights in layers:
        mixed = weights.mean(axis=0) + np.eye(len(flow))
        flow = mixed / mixed.sum(axis=-1, keepdims=True) @ flow
    return flow


def _layers(attentions: Sequence) -> list[np.ndarray]:
    """Each layer's probabilities as (heads, tokens, tokens) float64."""
    if not len(attentions):
        raise ValueError("attentions has no entries; call the model with output_attentions=True")
    arrays = [to_array(entry).astype(np.float64) for entry in attentions]
    for layer, array in enumerate(arrays):
        tokens = arrays[0].shape[-1] if arrays[0].ndim else 0
        if array.ndim != 4 or array.shape[0] != 1 or array.shape[2:] != (tokens, tokens) or tokens < 2:
            raise ValueError(
                f"attentions of layer {layer + 1} have shape {array.shape}; give (1, heads, tokens, tokens), "
                "of one image and with as many tokens in every layer"
            )
    return [array[0] for array in arrays]
