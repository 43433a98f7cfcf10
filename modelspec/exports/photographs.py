"""Photographs on which exports are compared with the live model.

A colour JPEG of 640x480, a PNG that is smaller than what any model looks at, a gray one and one with an alpha channel.
Sources, of scikit-image's samples: coffee (Rachel Michetti, CC0), chelsea (Stéfan van der Walt, CC0), camera (Lav
Varshney, CC0), astronaut (NASA, public domain); cropped and resized here, the alpha channel drawn.
"""

from pathlib import Path
from typing import Any

import numpy as np

from modelspec.configs import ModelConfig, get_variant, list_models
from modelspec.images import ImageProcessor

PHOTOGRAPHS = ("large.jpg", "small.png", "gray.png", "transparent.png")
_DEFAULT_SIZE = 224


def read_photographs() -> list[bytes]:
    """Returns the files' bytes, in the order of `PHOTOGRAPHS`."""
    folder = Path(__file__).with_name("photographs")
    return [(folder / name).read_bytes() for name in PHOTOGRAPHS]


def photographs_as_pixels(
    config: ModelConfig, image_processor: ImageProcessor | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns the preprocessed photographs, (4, num_channels, H, W) float32.

    Args:
        config: of the model.
        image_processor: the model's; that of a published variant of its family by default.
        size: (height, width); the processor's by default.
    """
    processor = image_processor or _processor_of_family(config)
    other: dict[str, Any] = {} if size is None else {"size": size, "do_resize": True}
    pixels = processor(read_photographs(), data_format="channels_first", **other).pixel_values
    channels = np.arange(config.num_channels) % pixels.shape[1]  # of a model that is not for RGB
    return np.ascontiguousarray(pixels[:, channels])


def _processor_of_family(config: ModelConfig) -> ImageProcessor:
    name = next(name for name in list_models() if get_variant(name).model_type == config.model_type)
    size = getattr(config, "image_size", None) or _DEFAULT_SIZE
    return ImageProcessor(**{**get_variant(name).image_processor, "size": size})
