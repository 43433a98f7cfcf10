"""Preprocessing inside the frameworks against Pillow's, and how far their own resizing functions are from it."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from modelspec.agreement import PREPROCESSING_BOUND, Agreement, compare
from modelspec.images import ImageProcessor
from parity.photograph import Photograph

Images = dict[str, np.ndarray]


def cases(processor: ImageProcessor, photograph: Photograph, seed: int) -> Images:
    """Returns the images to process: name -> (H, W, 1 or 3) uint8.

    The photograph; pieces of it that must be enlarged, shrunk along one axis alone, or are one pixel thin; gray, unless
    the processor refuses it; and noise of black and white, where bicubic weights overshoot.

    Args:
        processor: its size decides what has to be enlarged.
        photograph: where the pieces come from.
        seed: of the places and the noise.
    """
    generator = np.random.default_rng(seed)
    pixels = photograph.pixels
    height, width = pixels.shape[:2]
    half = [max(processor.size[side] // 2, 1) for side in ("height", "width")]

    def piece(rows: int, columns: int) -> np.ndarray:
        rows, columns = min(rows, height), min(columns, width)
        top, left = (generator.integers(0, free + 1) for free in (height - rows, width - columns))
        return np.ascontiguousarray(pixels[top : top + rows, left : left + columns])

    found = {
        "photograph": pixels,
        "small": piece(half[0] + 1, half[1]),
        "tall": piece(height, half[1] - 1 or 1),
        "wide": piece(half[0] - 1 or 1, width),
        "row": piece(1, width),
        "column": piece(height, 1),
        "noise": generator.integers(0, 2, (2 * half[0] + 3, 3 * half[1], 3), dtype=np.uint8) * np.uint8(255),
    }
    if processor.num_channels == 1 and processor.do_convert_rgb is False:
        found = {name: image[:, :, 1:2] for name, image in found.items()}
    elif processor.do_convert_rgb is not False:
        found["gray"] = np.ascontiguousarray(pixels[:, :, 1:2])
    return {f"{name} {image.shape[0]}x{image.shape[1]}": image for name, image in found.items()}


def compare_preprocessing(
    processor: ImageProcessor, photograph: Photograph, seed: int
) -> Iterator[tuple[str, str, Agreement]]:
    """Yields (half, name, agreement): every bit of the pixel values must be that of `ImageProcessor`.

    The name is that of the image after how the half was called: `eager.`, or `graph.` for a `tf.function` that was
    traced for images of any size.

    Args:
        processor: what both halves do.
        photograph: see `cases`.
        seed: see `cases`.
    """
    processes = _processes(processor)
    for name, image in cases(processor, photograph, seed).items():
        expected = processor(
            image, return_tensors="np", data_format="channels_first", input_data_format="channels_last"
        ).pixel_values
        for (half, mode), process in processes.items():
            actual = process(image)
            agreement = compare(actual, expected, 1.0, PREPROCESSING_BOUND)
            if actual.dtype != expected.dtype:
                reason = f"dtype {actual.dtype} against {expected.dtype}"
                agreement = dataclasses.replace(agreement, passed=False, reason=reason)
            yield half, f"{mode}.{name}", agreement


def _processes(processor: ImageProcessor) -> dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]]:
    """Returns (half, mode) -> function from (H, W, C) uint8 to (1, C, H, W)."""
    import keras
    import tensorflow as tf
    import torch

    import ptmodels.preprocessing
    import tfmodels.preprocessing

    formats = {"data_format": "channels_first", "input_data_format": "channels_last"}
    layer = tfmodels.preprocessing.ImagePreprocessor(processor, **formats)
    module = ptmodels.preprocessing.ImagePreprocessor(processor, **formats)

    traced = {
        channels: tf.function(layer, input_signature=[tf.TensorSpec((None, None, None, channels), tf.uint8)])
        for channels in (1, 3)
    }

    def of_keras(image: np.ndarray, call: Callable) -> np.ndarray:
        with keras.device("cpu:0"):
            return call(image[None]).numpy()

    return {
        ("keras", "eager"): lambda image: of_keras(image, layer),
        ("keras", "graph"): lambda image: of_keras(image, traced[image.shape[2]]),
        ("torch", "eager"): lambda image: module(torch.from_numpy(image[None])).numpy(),
    }


@dataclasses.dataclass(frozen=True)
class ResizerDistance:
    """How far a framework's own resizing is from Pillow's, in units of 1/255.

    Attributes:
        resizer: the function.
        filter: `"bilinear"` or `"bicubic"`, also Pillow's.
        antialias: its argument.
        dtype: of its input and output.
        task: `"shrink"` or `"enlarge"`, and the sizes.
        maximum: over all pixels and channels.
        mean: the same.
    """

    resizer: str
    filter: str
    antialias: bool
    dtype: str
    task: str
    maximum: float
    mean: float


def measure_other_resizers(photograph: Photograph, size: tuple[int, int] = (224, 224)) -> Iterator[ResizerDistance]:
    """Yields the distances of the frameworks' own functions from Pillow, shrinking the photograph and enlarging a part.

    Bytes come out of Pillow as bytes; functions of float32 are compared as they are, neither rounded nor cut off.

    Args:
        photograph: at least half as large as `size`; the part is its middle.
        size: (height, width) to resize to.

    Raises:
        ValueError: the photograph is smaller than that.
    """
    pixels = photograph.pixels
    half = [length // 2 for length in size]
    margins = [have - want for have, want in zip(pixels.shape[:2], half, strict=True)]
    if min(margins) < 0:
        raise ValueError(f"{photograph.name} is {photograph.size}; it must be at least {half[0]}x{half[1]}")
    top, left = (margin // 2 for margin in margins)
    part = pixels[top : top + half[0], left : left + half[1]]
    for verb, image in (("shrink", pixels), ("enlarge", part)):
        task = f"{verb} {image.shape[0]}x{image.shape[1]} to {size[0]}x{size[1]}"
        for number, name in ((2, "bilinear"), (3, "bicubic")):
            pillow = ImageProcessor(size=size, resample=number, do_rescale=False, do_normalize=False)
            expected = pillow(image, data_format="channels_last").pixel_values[0].astype(np.float64)
            for (resizer, dtype), function in _other_resizers(size, name).items():
                for antialias in (False, True):
                    difference = np.abs(function(image.astype(dtype), antialias) - expected)
                    found = float(difference.max()), float(difference.mean())
                    yield ResizerDistance(resizer, name, antialias, dtype, task, *found)


def _other_resizers(
    size: tuple[int, int], filter: str
) -> dict[tuple[str, str], Callable[[np.ndarray, bool], np.ndarray]]:
    """Returns (function, dtype) -> how it resizes (H, W, 3) of that dtype, with or without antialiasing."""
    import keras
    import tensorflow as tf
    import torch

    def of_tensorflow(image: np.ndarray, antialias: bool) -> np.ndarray:
        return tf.image.resize(image, size, filter, antialias=antialias).numpy()

    def of_keras(image: np.ndarray, antialias: bool) -> np.ndarray:
        resized = keras.ops.image.resize(
            image, size, interpolation=filter, antialias=antialias, data_format="channels_last"
        )
        return keras.ops.convert_to_numpy(resized)

    def of_torch(image: np.ndarray, antialias: bool) -> np.ndarray:
        batch = torch.from_numpy(image.copy()).movedim(-1, 0)[None]
        resized = torch.nn.functional.interpolate(batch, size, mode=filter, antialias=antialias)
        return resized[0].movedim(0, -1).numpy()

    return {
        ("tf.image.resize", "float32"): of_tensorflow,
        ("keras.ops.image.resize", "float32"): of_keras,
        ("torch.nn.functional.interpolate", "float32"): of_torch,
        ("torch.nn.functional.interpolate", "uint8"): of_torch,
    }
