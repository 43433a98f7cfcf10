"""Photographs on which exports are compared with the live model.

A colour JPEG of 640x480, a PNG that is smaller than what any model looks at, a gray one and one with an alpha channel.
Sources, of scikit-image's samples: coffee (Rachel Michetti, CC0), chelsea (Stéfan van der Walt, CC0), camera (Lav
Varshney, CC0), astronaut (NASA, public domain); cropped and resized here, the alpha channel drawn.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelspec.configs import ModelConfig, get_variant, list_models
from modelspec.images import ImageProcessor

PHOTOGRAPHS = ("large.jpg", "small.png", "gray.png", "transparent.png")
_DEFAULT_SIZE = 224


def read_photographs(size: tuple[int, int] | None = None) -> list[bytes]:
    """Returns the files' bytes, in the order of `PHOTOGRAPHS`.

    Args:
        size: (height, width), if they are to be resized to it, and encoded again; colours and formats stay.
    """
    folder = Path(__file__).with_name("photographs")
    files = [(folder / name).read_bytes() for name in PHOTOGRAPHS]
    return files if size is None else [_resized(file, size) for file in files]


def _resized(file: bytes, size: tuple[int, int]) -> bytes:
    image = Image.open(io.BytesIO(file))
    written = io.BytesIO()
    image.resize(size[::-1]).save(written, image.format)
    return written.getvalue()


def default_size(config: ModelConfig, image_processor: ImageProcessor | None = None) -> tuple[int, int]:
    """Returns (height, width) of the images of a model: its processor's, or the family's if that does not resize."""
    if image_processor is None or not image_processor.do_resize:
        image_processor = _processor_of_family(config)
    return image_processor.size["height"], image_processor.size["width"]


def photographs_as_pixels(
    config: ModelConfig, image_processor: ImageProcessor | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Returns the preprocessed photographs, (4, num_channels, H, W) float32.

    They are resized, and become RGB or gray, even if the processor does neither.

    Args:
        config: of the model.
        image_processor: the model's; that of a published variant of its family by default.
        size: (height, width); `default_size` by default.
    """
    processor = image_processor or _processor_of_family(config)
    size = size or default_size(config, image_processor)
    options: dict[str, Any] = {"do_resize": True, "do_convert_rgb": True, "data_format": "channels_first"}
    pixels = processor(read_photographs(), size=size, **options).pixel_values
    channels = np.arange(config.num_channels) % pixels.shape[1]  # of a model that is not for RGB
    return np.ascontiguousarray(pixels[:, channels])


def _processor_of_family(config: ModelConfig) -> ImageProcessor:
    name = next(name for name in list_models() if get_variant(name).model_type == config.model_type)
    size = getattr(config, "image_size", None) or _DEFAULT_SIZE
    return ImageProcessor(**{**get_variant(name).image_processor, "size": size})
