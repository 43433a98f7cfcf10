"""The image processor: resize to an exact size, rescale, normalise.

Source: transformers' `ViTImageProcessor` (4.53.3; `ViTImageProcessorPil` of 5.23.0 does the same arithmetic), which
serves all four families. For RGB images without an EXIF orientation the result is equal to it bit for bit.
"""

import inspect
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelspec.atomic_file import write_text
from modelspec.images.reading import DATA_FORMATS, iterate_images, read_image

FILE_NAME = "preprocessor_config.json"
_NESTING_FILE_NAME = "processor_config.json"
_TYPE = "ViTImageProcessor"
_KNOWN_TYPES = (_TYPE, "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor", "ImageProcessor")
_UNSUPPORTED = ("do_center_crop", "do_pad")
_TENSORS = ("np", "pt", "tf")


class ImageBatch(dict):
    """What a processor returns: a dict whose keys are attributes too; `model(**batch)` works.

    pixel_values: (B, C, H, W) float32, or (B, H, W, C) with `data_format="channels_last"`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the batch has no {name!r}; it has {', '.join(self)}") from None

    def to(self, *args: Any, **kwargs: Any) -> "ImageBatch":
        """Moves or casts the torch tensors of this batch in place, as `torch.Tensor.to` does, and returns the batch.

        Raises:
            ValueError: the batch holds arrays of NumPy or TensorFlow; ask the processor for `return_tensors="pt"`.
        """
        for key, value in self.items():
            if not hasattr(value, "to"):
                raise ValueError(f'{key} is a {type(value).__name__}; .to() needs return_tensors="pt"')
        for key, value in self.items():
            self[key] = value.to(*args, **kwargs)
        return self


class ImageProcessor:
    """Turns images into the models' pixel values.

    In this order, each step only if its `do_` is true: Pillow's resize (with antialiasing) to exactly `size`,
    multiplication by `rescale_factor` in float64 and rounding to float32, then (x - image_mean) / image_std in float32.

    Every image ends as RGB, or as gray (Pillow's mode "L") if `image_mean` has one entry; `read_image` says how.

    An argument of None means its default. `num_channels` is that of the result, 3 or 1.

    Args:
        size: pixels: a number for a square, {"height": h, "width": w}, or (h, w).
        resample: Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        image_mean: one number per channel, or one number for all, in units of the rescaled image (0..1).
        image_std: the same; above 0.
        rescale_factor: above 0.
        do_convert_rgb: None and True convert, False refuses an image that is of another mode.
        data_format: `"channels_first"` or `"channels_last"`, of the result.
        input_data_format: the same of array inputs; None infers it per image.

    Raises:
        ValueError: a value that is not allowed; the message names the field.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        *,
        size: int | Mapping[str, int] | Sequence[int] = 224,
        resample: int = 2,
        image_mean: float | Sequence[float] = (0.5, 0.5, 0.5),
        image_std: float | Sequence[float] = (0.5, 0.5, 0.5),
        do_resize: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        do_convert_rgb: bool | None = None,
        data_format: str = "channels_first",
        input_data_format: str | None = None,
    ):
        self.size = _size(_given("size", size))
        self.resample = _resample(_given("resample", resample))
        self.image_mean = _per_channel("image_mean", _given("image_mean", image_mean), above=-math.inf)
        self.image_std = _per_channel("image_std", _given("image_std", image_std), above=0)
        self.do_resize = _flag("do_resize", _given("do_resize", do_resize))
        self.do_rescale = _flag("do_rescale", _given("do_rescale", do_rescale))
        self.rescale_factor = _number("rescale_factor", _given("rescale_factor", rescale_factor), above=0)
        self.do_normalize = _flag("do_normalize", _given("do_normalize", do_normalize))
        self.do_convert_rgb = None if do_convert_rgb is None else _flag("do_convert_rgb", do_convert_rgb)
        self.data_format = _data_format("data_format", _given("data_format", data_format))
        self.input_data_format = (
            None if input_data_format is None else _data_format("input_data_format", input_data_format)
        )
        self._unknown: dict[str, Any] = {}
        lengths = [len(value) for value in (self.image_mean, self.image_std) if isinstance(value, list)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"ImageProcessor.image_std has {lengths[1]} entries but image_mean has {lengths[0]};"
                " give one entry per channel in both"
            )
        self.num_channels = lengths[0] if lengths else 3

    def __call__(self, images: Any, *, return_tensors: str | None = None, **overrides: Any) -> ImageBatch:
        """Processes one image or many.

        Args:
            images: what `read_image` takes, a batch (B, ...) of it, or a list or tuple, also mixed. The values of an
                array are 0..255 as a rule; with `do_rescale=False` they may be 0..1. Floats that are resized pass
                through 8 bits, as in the reference: whole numbers of 0..255, or any of 0..1 (times 255, cut off).
            return_tensors: `"np"` (also None) for NumPy, `"pt"` for torch, `"tf"` for TensorFlow.
            **overrides: any argument of the constructor, for this call only.

        Returns:
            `{"pixel_values": (B, C, H, W)}`, float32 and contiguous, or (B, H, W, C) if `data_format` says so.

        Raises:
            ValueError: no images; an image that cannot be read (the message names the file or the number in the batch);
                sizes that differ without `do_resize`; a value that is not allowed.
            TypeError: an override that is no argument of the constructor.
        """
        if return_tensors is not None and return_tensors not in _TENSORS:
            raise ValueError(
                f"return_tensors is {return_tensors!r}; allowed are None, {', '.join(map(repr, _TENSORS))}"
            )
        pixel_values = self._overridden(overrides)._process(images)
        if return_tensors == "pt":
            import torch

            return ImageBatch(pixel_values=torch.from_numpy(pixel_values))
        if return_tensors == "tf":
            import tensorflow as tf

            return ImageBatch(pixel_values=tf.convert_to_tensor(pixel_values))
        return ImageBatch(pixel_values=pixel_values)

    def preprocess(self, images: Any, **arguments: Any) -> ImageBatch:
        """The same as calling the processor; the reference has both."""
        return self(images, **arguments)

    def _process(self, images: Any) -> np.ndarray:
        processed: list[np.ndarray] = []
        for name, image in iterate_images(images):
            pixels = read_image(
                image,
                name=name,
                num_channels=self.num_channels,
                convert=self.do_convert_rgb is not False,
                input_data_format=self.input_data_format,
            )  # (H, W, C)
            if self.do_rescale and pixels.dtype.kind == "f" and 0 <= pixels.min() and 0 < pixels.max() <= 1:
                warnings.warn(
                    f"{name} seems to be scaled to 0..1 already and is rescaled again; pass do_rescale=False",
                    stacklevel=3,
                )
            if self.do_resize:
                pixels = self._resize(pixels, name)
            pixels = self._scaled(np.moveaxis(pixels, -1, 0))  # (C, H, W)
            if processed and pixels.shape != processed[0].shape:
                raise ValueError(
                    f"{name} is {pixels.shape[1]} x {pixels.shape[2]} pixels (H x W) but the images before it are "
                    f"{processed[0].shape[1]} x {processed[0].shape[2]}; with do_resize=False all must have one size"
                )
            processed.append(pixels)
        if not processed:
            raise ValueError("images is empty; give at least one image")
        batch = np.stack(processed)  # (B, C, H, W)
        return np.ascontiguousarray(np.moveaxis(batch, 1, -1)) if self.data_format == "channels_last" else batch

    def byte_table(self) -> np.ndarray:
        """Returns what each byte of each channel becomes by rescaling and normalising: (num_channels, 256) float32."""
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (self.num_channels, 1, 256))
        return self._scaled(values)[:, 0]

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        """Rescales and normalises (C, H, W) of any real dtype to float32."""
        if pixels.dtype == np.uint8 and pixels[0].size > 256:
            table = self.byte_table()  # the same bits, sooner
            return np.stack([values[channel] for values, channel in zip(table, pixels, strict=True)])
        if self.do_rescale:
            pixels = _rescale(pixels, self.rescale_factor)
        if self.do_normalize:
            # In the image's own dtype if that is a float, as in the reference.
            pixels = pixels if pixels.dtype.kind == "f" else pixels.astype(np.float32)
            mean, std = (np.reshape(value, (-1, 1, 1)) for value in (self.image_mean, self.image_std))
            pixels = (pixels - mean.astype(pixels.dtype)) / std.astype(pixels.dtype)
        return pixels.astype(np.float32, order="C")

    def _resize(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Resizes (H, W, C) of any real dtype; uint8, or float32 for values 0..1 that are not whole numbers."""
        fractions = False
        if pixels.dtype != np.uint8:
            low, high = pixels.min(), pixels.max()
            in_bytes = 0 <= low and high <= 255
            fractions = in_bytes and not np.allclose(pixels, pixels.astype(np.int64))
            if not in_bytes or (fractions and high > 1):
                raise ValueError(
                    f"{name} has values from {low} to {high} of dtype {pixels.dtype}; to be resized it needs whole "
                    "numbers of 0..255, or fractions of 0..1 with do_rescale=False"
                )
            # Cut off, not rounded: as the reference does.
            pixels = (_rescale(pixels, 255) if fractions else pixels).astype(np.uint8)
        channels = pixels.shape[-1]
        source = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))
        height, width = self.size["height"], self.size["width"]
        resized = np.asarray(source.resize((width, height), resample=self.resample)).reshape(height, width, channels)
        return _rescale(resized, 1 / 255) if fractions else resized

    def _overridden(self, overrides: Mapping[str, Any]) -> "ImageProcessor":
        """A processor with some fields changed; built anew, so that attributes set since are checked as well."""
        _refuse_unsupported(overrides)
        given = {key: value for key, value in overrides.items() if value is not None and key not in _UNSUPPORTED}
        changed = type(self)(**{**{name: getattr(self, name) for name in _DEFAULTS}, **given})
        changed._unknown = self._unknown
        return changed

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **overrides: Any) -> "ImageProcessor":
        """Builds a processor from what `to_dict` gives, or from an older form of it.

        Missing fields and None take the defaults, a whole number as `size` means a square, and keys that are not known
        are kept for `to_dict`.

        Args:
            settings: the content of a `preprocessor_config.json`.
            **overrides: fields that replace those in `settings`.

        Raises:
            ValueError: a value that is not allowed, a center crop or padding (which are not supported), or the file of
                another kind of processor that does not rule out a center crop.
            TypeError: an override that is no argument of the constructor.
        """
        unexpected = overrides.keys() - _DEFAULTS.keys() - set(_UNSUPPORTED)
        if unexpected:
            raise TypeError(
                f"ImageProcessor has no field {', '.join(sorted(unexpected))}; it has {', '.join(_DEFAULTS)}"
            )
        # Before anything is checked, so that an override can mend a file that asks for what is not supported.
        settings = {**settings, **{name: value for name, value in overrides.items() if value is not None}}
        _refuse_unsupported(settings)
        kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or _TYPE
        if kind not in _KNOWN_TYPES and settings.get("do_center_crop") is None:
            raise ValueError(
                f"ImageProcessor.image_processor_type is {kind!r}, which may crop by default; allowed are "
                f"{', '.join(_KNOWN_TYPES)}, and others whose file says do_center_crop false"
            )
        processor = cls(**{name: value for name, value in settings.items() if name in _DEFAULTS})
        processor._unknown = {
            name: value
            for name, value in settings.items()
            if name not in _DEFAULTS and name not in ("image_processor_type", "feature_extractor_type")
        }
        return processor

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values, under the reference's names, and the unknown keys that were read.

        `data_format` and `input_data_format` are left out at their defaults: the reference's files lack them.
        """
        checked = self._overridden({})
        settings = {name: getattr(checked, name) for name in _DEFAULTS}
        for name in ("data_format", "input_data_format"):
            if settings[name] == _DEFAULTS[name]:
                del settings[name]
        # A copy by way of JSON: nothing in it is shared with this object.
        return json.loads(json.dumps({**self._unknown, **settings, "image_processor_type": _TYPE}))

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, revision: str | None = None, **overrides: Any
    ) -> "ImageProcessor":
        """Reads `preprocessor_config.json`, or else the part "image_processor" of `processor_config.json`.

        Args:
            source: a directory, one of these files (of any name), or a Hub id.
            revision: branch, tag or commit of the Hub repository.
            **overrides: fields that replace those of the file.

        Raises:
            OSError: there is no such file, or the Hub cannot be reached.
            ValueError: the file is no JSON, or `from_dict` refuses its content; the message names the file.
            TypeError: an override that is no argument of the constructor.
        """
        path = _settings_file(source, revision)
        settings = _read_json(path)
        if isinstance(settings.get("image_processor"), dict):
            settings = settings["image_processor"]
        elif Path(path).name == _NESTING_FILE_NAME:
            raise ValueError(f'{path} has no object "image_processor"')
        try:
            return cls.from_dict(settings, **overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Writes `preprocessor_config.json` into `directory`, which is made if need be; atomic. Returns its path."""
        path = Path(directory) / FILE_NAME
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        return path

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, ImageProcessor) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # its fields can be set

    def __repr__(self) -> str:
        return f"ImageProcessor({json.dumps(self.to_dict(), sort_keys=True)})"


class AutoImageProcessor:
    """Reads the image processor of a checkpoint, under the name that code written for transformers uses."""

    @staticmethod
    def from_pretrained(source: str | os.PathLike, use_fast: bool | None = None, **overrides: Any) -> ImageProcessor:
        """`ImageProcessor.from_pretrained`; `use_fast` is accepted and ignored, there is one implementation."""
        return ImageProcessor.from_pretrained(source, **overrides)


# The field's name -> its default; the constructor's signature is the only place where they are written.
_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(ImageProcessor).parameters.items()}


def _given(name: str, value: Any) -> Any:
    return _DEFAULTS[name] if value is None else value


def _rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    """`pixels * factor`, multiplied in float64 and then rounded to float32: the reference's bits depend on it."""
    return (pixels.astype(np.float64) * factor).astype(np.float32)


def _refusal(field: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"ImageProcessor.{field} is {value!r}; allowed is {allowed}")


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise _refusal(
                name, settings[name], "only False: images are resized to the exact size, never cropped or padded"
            )


def _flag(field: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _refusal(field, value, "True or False")
    return bool(value)


def _number(field: str, value: Any, *, above: float) -> float:
    # The comparison refuses NaN and the infinities, and unlike math.isfinite takes integers of any size. For type
    # checkers numbers.Real has no order.
    if isinstance(value, bool) or not isinstance(value, Real) or not above < value <= sys.float_info.max:  # type: ignore[operator]
        raise _refusal(field, value, "a finite number" + (f" above {above}" if math.isfinite(above) else ""))
    return float(value)


def _per_channel(field: str, value: Any, *, above: float) -> float | list[float]:
    if isinstance(value, Real):
        return _number(field, value, above=above)
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise _refusal(field, value, "a number, or a list of one number (gray) or three (RGB)")
    if len(value) not in (1, 3):
        raise ValueError(f"ImageProcessor.{field} has {len(value)} entries; allowed are 1 (gray) and 3 (RGB)")
    return [_number(f"{field}[{index}]", entry, above=above) for index, entry in enumerate(value)]


def _resample(value: Any) -> int:
    # Not all of Image.Resampling: Pillow 13 has filters that older versions, and the reference's files, do not know.
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= 5:
        raise _refusal(
            "resample", value, "one of 0 (nearest), 1 (Lanczos), 2 (bilinear), 3 (bicubic), 4 (box), 5 (Hamming)"
        )
    return int(value)


def _size(value: Any) -> dict[str, int]:
    if isinstance(value, Mapping):
        sides = [value[key] for key in ("height", "width") if key in value and len(value) == 2]
    elif isinstance(value, (list, tuple)):
        sides = list(value)
    else:
        sides = [value, value]
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, Integral) or side < 1 for side in sides):
        raise _refusal("size", value, 'a positive whole number, {"height": h, "width": w} of them, or (h, w)')
    return {"height": int(sides[0]), "width": int(sides[1])}


def _data_format(field: str, value: Any) -> str:
    if value not in DATA_FORMATS:
        raise _refusal(field, value, " or ".join(map(repr, DATA_FORMATS)))
    return DATA_FORMATS[DATA_FORMATS.index(value)]  # a plain str also where the reference's enum was given


def _settings_file(source: str | os.PathLike, revision: str | None) -> str:
    if Path(source).is_file():
        return os.fspath(source)
    from modelspec.checkpoints.source import resolve_file

    try:
        return resolve_file(source, FILE_NAME, revision=revision)
    except OSError as error:
        try:
            return resolve_file(source, _NESTING_FILE_NAME, revision=revision)
        except OSError:
            raise error from None


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a JSON {type(settings).__name__}; an object is needed")
    return settings
