"""How a training went, epoch by epoch."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_TRAINING, _VALIDATION, _RATE = "#1f6fb4", "#e0701b", "#5a5a5a"
_KEYS = ("loss", "val_loss", "accuracy", "val_accuracy", "learning_rate")
_MANY = 40  # epochs; beyond, markers would touch each other


def plot_curves(history: Mapping[str, Sequence[float]]) -> Figure:
    """Draws loss, accuracy and learning rate over the epochs, each in a panel of its own if it was recorded.

    A panel's corner names the best epoch: by validation, where there is any.

    Args:
        history: `loss`, `accuracy` (0..1), `val_loss`, `val_accuracy` and `learning_rate`, any of them, each with one
            number per epoch; Keras' `History.history` is such a mapping. What is not finite, as where no validation
            ran, is left out, and the line goes on from its neighbors. Other keys are not drawn.

    Returns:
        A matplotlib figure: `figure.savefig("curves.png")`.

    Raises:
        ValueError: no key is known, there is no epoch, or the lists are not equally long.
    """
    series = {key: np.asarray(history[key], dtype=np.float64) for key in _KEYS if key in history}
    if not series:
        raise ValueError(f"history has the keys {', '.join(history) or 'none'}; give any of {', '.join(_KEYS)}")
    for key, values in series.items():
        if values.ndim != 1 or not values.size:
            raise ValueError(f"history[{key!r}] has shape {values.shape}; give one number per epoch, at least one")
    lengths = {key: len(values) for key, values in series.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise ValueError(f"history has lists of different lengths ({listed}); give one number per epoch in each")
    panels = [name for name in ("loss", "accuracy", "learning_rate") if {name, f"val_{name}"} & series.keys()]
    heights = [1 if name == "learning_rate" else 3 for name in panels]
    figure = Figure(figsize=(7, 0.9 * sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for name, axis in zip(panels, axes, strict=True):
        if name == "learning_rate":
            _draw(axis, series[name], "learning rate", _RATE)
            axis.set_ylabel("learning\nrate")
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            axis.yaxis.set_major_locator(MaxNLocator(3))
        else:
            _draw_measure(axis, name, series)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    count = next(iter(lengths.values()))
    margin = max(0.5, 0.02 * count) if count < _MANY else 0.02 * count
    axes[-1].set_xlim(1 - margin, count + margin)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[-1].set_xlabel("epoch")
    figure.align_ylabels()
    return figure


def _draw_measure(axis: Axes, name: str, series: Mapping[str, np.ndarray]) -> None:
    """Draws the panel of a measure that training and validation have."""
    factor, best, unit = (100, np.argmax, " %") if name == "accuracy" else (1, np.argmin, "")
    note = ""
    for key, label, color in ((name, "training", _TRAINING), (f"val_{name}", "validation", _VALIDATION)):
        values = factor * series.get(key, np.empty(0))
        epochs = _draw(axis, values, label, color)
        if len(epochs):
            epoch = epochs[best(values[epochs - 1])]
            digits = ".1f" if unit else ".3g"
            note = f"best {label}: {values[epoch - 1]:{digits}}{unit}, epoch {epoch}"
    axis.set_ylabel("accuracy, percent" if unit else name)
    axis.set_title(note, loc="right", fontsize=9, color="#404040")
    if axis.lines:
        axis.legend(frameon=False, fontsize=9)


def _draw(axis: Axes, values: np.ndarray, label: str, color: str) -> np.ndarray:
    """Draws the finite ones of an epoch's values each; returns their epochs."""
    epochs = np.flatnonzero(np.isfinite(values)) + 1
    if len(epochs):
        marker = "o" if len(epochs) <= _MANY else None
        axis.plot(epochs, values[epochs - 1], color=color, label=label, marker=marker, markersize=3.5, linewidth=1.6)
    return epochs
