"""What the image processors inside the frameworks take: unlike the reference, only images of bytes."""

from collections.abc import Sequence

from modelspec.images.processor import ImageProcessor
from modelspec.images.reading import DATA_FORMATS


def snapshot(processor: ImageProcessor) -> ImageProcessor:
    """Returns a checked copy of a processor, whose fields may since be set.

    Raises:
        ValueError: it is no ImageProcessor, or has a field that is not allowed.
    """
    if not isinstance(processor, ImageProcessor):
        raise ValueError(f"processor is a {type(processor).__name__}; give a modelspec.ImageProcessor")
    return ImageProcessor.from_dict(processor.to_dict())


def choose_format(name: str, *choices: str | None) -> str:
    """Returns the first of the choices that is not None; `name` is the argument's, for the error message."""
    chosen = next(choice for choice in choices if choice is not None)
    if chosen not in DATA_FORMATS:
        raise ValueError(f"{name} is {chosen!r}; allowed are {', '.join(DATA_FORMATS)}")
    return str(chosen)


def check_images(dtype: str, shape: Sequence[int | None] | None, data_format: str, processor: ImageProcessor) -> None:
    """Checks images before they are processed.

    Args:
        dtype: its name, e.g. `"uint8"`.
        shape: (H, W, C), (B, H, W, C) or channels first, as `data_format` says; None for what a graph does not know.
        data_format: `"channels_last"` or `"channels_first"`.
        processor: its channels, and whether it converts images of others.

    Raises:
        ValueError: the images are none that can be processed.
    """
    layout = "(H, W, C) or (B, H, W, C)" if data_format == "channels_last" else "(C, H, W) or (B, C, H, W)"
    if dtype != "uint8":
        raise ValueError(f"images are of dtype {dtype}; allowed is uint8")
    if shape is None or len(shape) not in (3, 4):
        known = "an unknown number of axes" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"images have {known}; allowed are {layout}")
    channels_axis = -1 if data_format == "channels_last" else -3
    channels = shape[channels_axis]
    allowed = (processor.num_channels,) if processor.do_convert_rgb is False else (1, 3)
    if channels not in allowed:
        converting = " with do_convert_rgb=False" if processor.do_convert_rgb is False else ""
        raise ValueError(
            f"images have shape {tuple(shape)}, {'an unknown number of' if channels is None else channels} channels in "
            f"{layout}; allowed are {' and '.join(map(str, allowed))}{converting}"
        )
    if 0 in shape[len(shape) - 3 :]:
        raise ValueError(f"images have shape {tuple(shape)}: they are empty")
