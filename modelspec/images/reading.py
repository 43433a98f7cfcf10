"""From whatever holds an image (a file, bytes, a Pillow image, an array, a tensor) to an array (H, W, C)."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

DATA_FORMATS = ("channels_first", "channels_last")
_PILLOW_MODES = {1: "L", 3: "RGB"}
LUMA_WEIGHTS = (19595, 38470, 7471)  # of red, green and blue in 2**16 parts of gray, which Pillow rounds half up
# Pillow opens the 16-bit gray files of these formats in mode "I" (PNG: before Pillow 11), whose range says nothing.
_DEEP_GRAY_FORMATS = ("PNG", "PPM")


def iterate_images(images: Any) -> Iterator[tuple[str, Any]]:
    """Walks through one image, a list, a nested list or a batch, and names each image for error messages.

    Args:
        images: anything `read_image` takes; an array or tensor (B, ...) of four axes; or a list or tuple of these.

    Yields:
        Pairs (name, image): a path as it is written, or `"image 2 of the batch"`, counted from 0. Arrays and tensors
        come as NumPy arrays of fewer than four axes, or of more than four, which `read_image` refuses.

    Raises:
        ValueError: an object that is no image.
    """
    for index, image in enumerate(_flatten(images)):
        if isinstance(image, (str, os.PathLike)):
            yield os.fspath(image), image
        else:
            yield f"image {index} of the batch", image


def _flatten(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flatten(image)
    elif hasattr(images, "__array__") and not isinstance(images, Image.Image):
        array = _as_array(images)
        if array.ndim == 4:
            yield from array
        else:
            yield array
    else:
        yield images


def _as_array(tensor: Any) -> np.ndarray:
    # A torch tensor that requires gradients or lives on a GPU refuses __array__; asking it by method needs no torch.
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
    try:
        return np.asarray(tensor)
    except Exception as error:
        raise ValueError(f"{type(tensor).__name__} cannot be read as an array: {error}") from error


def read_image(
    image: Any,
    *,
    name: str = "image",
    num_channels: int = 3,
    convert: bool = True,
    input_data_format: str | None = None,
) -> np.ndarray:
    """Returns `image` as an array (H, W, num_channels), in colour or in gray.

    Pillow images and files: an EXIF orientation is applied, so that the array is upright as viewers show it; of a file
    with several frames the first counts; of 16-bit gray the upper 8 bits are kept; `Image.convert` gives the colours.
    Arrays: gray is replicated. In both, what an alpha channel or a palette makes transparent shows white, as in the
    reference (transformers 5; version 4 dropped the alpha channel, which lays open what it hid).

    Args:
        image: a path, the bytes of an image file, a Pillow image of any mode, or an array or tensor (H, W), (H, W, C)
            or (C, H, W) of C = 1, 3 or 4 channels, of any real dtype.
        name: what an error message calls the image.
        num_channels: 3 for RGB, 1 for gray.
        convert: False refuses an image that is not already RGB (or gray, for `num_channels=1`).
        input_data_format: `"channels_first"` or `"channels_last"`, for arrays with three axes. None infers it: the axis
            that has `num_channels` entries, else 1, 3 or 4, holds the channels; if both ends do, the first.

    Returns:
        (H, W, num_channels): uint8 for Pillow images and files; an array keeps its dtype, but bool becomes uint8.

    Raises:
        ValueError: the image is missing, broken, empty, too large for Pillow's limit against decompression bombs, has
            NaN or infinite values, or a shape, dtype or type not named above.
    """
    if isinstance(image, (str, os.PathLike, bytes, bytearray)):
        # Pillow's plugins raise almost any type of exception for a damaged file, so all of them are translated.
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, (bytes, bytearray)) else Path(image)) as opened:
                return _read_pillow(opened, num_channels, convert)
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {_reason(error)}") from error
    if isinstance(image, Image.Image):
        try:  # a lazily opened file is decoded only here
            return _read_pillow(image, num_channels, convert)
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {_reason(error)}") from error
    if hasattr(image, "__array__"):
        return _read_array(_as_array(image), name, num_channels, convert, input_data_format)
    raise ValueError(
        f"{name} is of type {type(image).__name__}; give a path, bytes, a Pillow image, an array or a tensor"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is empty, or of no format that Pillow knows"
    return str(error) or type(error).__name__


def _read_pillow(image: Image.Image, num_channels: int, convert: bool) -> np.ndarray:
    mode = _PILLOW_MODES[num_channels]
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _DEEP_GRAY_FORMATS)
    if not convert and image.mode != mode:
        raise ValueError(f"its mode is {image.mode} but do_convert_rgb=False allows only {mode}")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 255):  # so written, NaN is refused too
            raise ValueError(
                f"mode {image.mode} holds values from {values.min()} to {values.max()}; scale them to 0..255"
            )
    elif image.mode == "La":
        image = image.convert("LA")
    if {"A", "a"} & set(image.getbands()) or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    pixels = np.asarray(image.convert(mode))
    if pixels.size == 0:
        raise ValueError(f"its size is {image.width} x {image.height} pixels")
    return pixels.reshape(*pixels.shape[:2], num_channels)


def _read_array(
    image: np.ndarray, name: str, num_channels: int, convert: bool, input_data_format: str | None
) -> np.ndarray:
    if image.dtype.kind not in "buif":
        raise ValueError(f"{name} has dtype {image.dtype}; allowed are bool, integers and floating-point numbers")
    if image.ndim not in (2, 3):
        raise ValueError(
            f"{name} has shape {image.shape}; allowed are (H, W), (H, W, C), (C, H, W) and batches of these"
        )
    if image.size == 0:
        raise ValueError(f"{name} has shape {image.shape}: it is empty")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"{name} has NaN or infinite values")
    if image.dtype.kind == "b":
        image = image.astype(np.uint8)
    if image.ndim == 2:
        image = image[:, :, None]
    elif _channels_lead(image.shape, name, num_channels, input_data_format):
        image = np.moveaxis(image, 0, -1)  # (H, W, C)
    channels = image.shape[-1]
    if channels == num_channels:
        return image
    if not convert:
        raise ValueError(f"{name} has {channels} channels but do_convert_rgb=False allows only {num_channels}")
    if channels == 4:
        image = _on_white(image)
    if num_channels == 3:
        return image if channels == 4 else np.repeat(image, 3, axis=-1)
    if image.dtype != np.uint8:
        raise ValueError(f"{name} is a colour image of dtype {image.dtype}; only uint8 is converted to gray")
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))[:, :, None]


def _on_white(image: np.ndarray) -> np.ndarray:
    """Blends (H, W, 4) onto white, which is 255, or 1 for floats of 0..1. Returns (H, W, 3) of the same dtype."""
    whole = image.dtype.kind != "f"
    white = 255 if whole or image.max() > 1 else 1.0
    alpha = image[:, :, 3:] / white
    blended = alpha * image[:, :, :3] + (1 - alpha) * white
    return (np.round(blended) if whole else blended).astype(image.dtype)


def _channels_lead(shape: tuple[int, ...], name: str, num_channels: int, input_data_format: str | None) -> bool:
    """Says whether an image of `shape` is (C, H, W) rather than (H, W, C)."""
    ends = {"channels_first": shape[0], "channels_last": shape[-1]}
    if input_data_format is not None:
        ends = {input_data_format: ends[input_data_format]}
    for allowed in ((num_channels,), (1, 3, 4)):
        for data_format, channels in ends.items():
            if channels in allowed:
                return data_format == "channels_first"
    raise ValueError(f"{name} has shape {shape}; {' or '.join(ends)} needs 1, 3 or 4 channels there")
