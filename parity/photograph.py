"""The photograph that both halves look at."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.exports.photographs import read_photographs
from modelspec.images import ImageProcessor, read_image

_FILTERS = ("nearest", "Lanczos", "bilinear", "bicubic", "box", "Hamming")


@dataclasses.dataclass(frozen=True)
class Photograph:
    """An image and what to call it. `pixels`: (H, W, 3) uint8."""

    name: str
    pixels: np.ndarray

    @property
    def size(self) -> str:
        """Height x width."""
        return _size(*self.pixels.shape[:2])


def read_photograph(path: str | os.PathLike | None = None) -> Photograph:
    """Reads an image file; without one, the cat of scikit-image, or our own cup of coffee where that is not installed.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    if path is not None:
        return Photograph(Path(path).name, read_image(path, name=os.fspath(path)))
    try:
        from skimage.data import chelsea
    except ImportError:  # no extra that runs models installs it
        return Photograph("twinzoo's coffee", read_image(read_photographs()[0]))
    return Photograph("scikit-image's cat", chelsea())


def pixel_values(
    photograph: Photograph, processor: ImageProcessor, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, str]:
    """Preprocesses a photograph.

    Args:
        photograph: what to look at.
        processor: the model's; its values are as published.
        size: (height, width) to resize to instead of the processor's.

    Returns:
        (1, C, H, W) float32, and the preprocessing in words.
    """
    overrides: dict[str, Any] = {} if size is None else {"size": size, "do_resize": True}
    batch = processor(photograph.pixels, data_format="channels_first", input_data_format="channels_last", **overrides)
    values = batch.pixel_values
    steps = [f"{photograph.name}, {photograph.size}"]
    if size is not None or processor.do_resize:
        steps.append(f"resized to {_size(*values.shape[2:])} ({_FILTERS[processor.resample]})")
    if processor.do_rescale:
        steps.append(f"times {_factor(processor.rescale_factor)}")
    if processor.do_normalize:
        steps.append(f"minus {_listed(processor.image_mean)}, over {_listed(processor.image_std)}")
    return values, ", ".join(steps)


def _size(height: int, width: int) -> str:
    return f"{height}x{width}"


def _factor(factor: float) -> str:
    return f"1/{round(1 / factor)}" if abs(round(1 / factor) * factor - 1) < 1e-9 else f"{factor:g}"


def _listed(values: float | list[float]) -> str:
    return " ".join(f"{value:g}" for value in np.atleast_1d(values))
