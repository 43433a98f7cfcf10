"""Where a classifier sees what argues for a class, over a photograph."""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from modelspec.configs import ModelConfig
from twinzoo.plots.photographs import add_heat_bar, draw_heat, draw_photograph, to_array, to_panel

_HALVES = ("ptmodels", "tfmodels")


def plot_grad_cam(image: Any, model: Any, pixel_values: Any, label: int | None = None) -> Figure:
    """Draws the Grad-CAM of a class over a photograph, next to the photograph; the title gives name and probability.

    What is lit are the parts of the last stage's map, of ViT-MSN the patches that the last layer attends to, that
    raise the logit of the class. The model is left as it was, and runs in inference mode.

    Args:
        image: a PIL image, or an array (H, W, 3) or (H, W) of uint8 or of floats in 0..1; what `pixel_values` show of
            it is the whole.
        model: either half's `...ForImageClassification`.
        pixel_values: the same image as the model takes it: (1, C, H, W), or (1, H, W, C) of a Keras model with
            `data_format="channels_last"`.
        label: index of the class; the predicted one by default.

    Returns:
        A matplotlib figure: `figure.savefig("grad_cam.png")`.

    Raises:
        ValueError: another kind of model, several images, or no such class.
    """
    pixels = to_array(pixel_values)
    heat, logits = _half(model).grad_cam_and_logits(model, pixels, label)
    photograph = to_panel(image)
    height, width = photograph.shape[:2]
    figure = Figure(figsize=(2 * 3.2 + 0.7, 3.2 * height / width + 0.55), layout="constrained")
    axes = figure.subplots(1, 2)
    draw_photograph(axes[0], photograph)
    axes[0].set_title("photograph", fontsize=9)
    draw_heat(axes[1], photograph, heat, _covered(model, pixels, heat))
    axes[1].set_title("Grad-CAM" if heat.any() else "Grad-CAM: nothing argues for it", fontsize=9)
    add_heat_bar(figure, axes)
    index = int(np.argmax(logits) if label is None else label)
    figure.suptitle(_verdict(model.config, logits, index), fontsize=11, parse_math=False)
    return figure


def _half(model: Any) -> ModuleType:
    """Returns the `grad_cam` module of the half that the model's class stems from."""
    for cls in type(model).__mro__:
        half = cls.__module__.partition(".")[0]
        if half in _HALVES:
            return importlib.import_module(f"{half}.grad_cam")
    raise ValueError(
        f"model is a {type(model).__name__}; give a ForImageClassification model of {' or '.join(_HALVES)}"
    )


def _covered(model: Any, pixels: np.ndarray, heat: np.ndarray) -> tuple[float, float]:
    """How many of the map's rows and columns lie within the image: the last ones may stand out of it."""
    stride = model.feature_info[-1]["reduction"]
    size = pixels.shape[1:3] if getattr(model, "data_format", "") == "channels_last" else pixels.shape[2:]
    return tuple(min(cells, length / stride) for cells, length in zip(heat.shape, size, strict=True))


def _verdict(config: ModelConfig, logits: np.ndarray, label: int) -> str:
    """The class and its probability, or the number that a regression gives."""
    name = config.id2label[label]
    name = name if len(name) <= 60 else name[:59].rstrip() + "…"
    problem = config.problem_type or ("regression" if len(logits) == 1 else "single_label_classification")
    if problem == "regression":
        return f"{name}: {logits[label]:.4g}"
    if problem == "multi_label_classification":
        probability = 0.5 * (1 + np.tanh(0.5 * logits[label]))
    else:
        probability = np.exp(logits[label] - logits.max()) / np.exp(logits - logits.max()).sum()
    return f"{name}, {100 * probability:.1f} %"
