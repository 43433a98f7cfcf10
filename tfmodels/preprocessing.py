"""The image processor as a layer, with the same bits. Twin: `ptmodels/preprocessing.py`."""

import os
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from modelspec.images import ImageProcessor
from modelspec.images.byte_images import check_images, choose_format, snapshot
from modelspec.images.reading import LUMA_WEIGHTS
from modelspec.images.resampling import (
    BLOCK,
    NEAREST,
    block_weights,
    cached_positions,
    cached_weights,
    height_comes_first,
    nearest_positions,
)


@keras.saving.register_keras_serializable(package="twinzoo")
class ImagePreprocessor(keras.layers.Layer):
    """Turns images into pixel values as `modelspec.ImageProcessor` does, bit for bit; in graphs too.

    Input: one image (H, W, C) or a batch of one size (B, H, W, C), uint8, of 1 or 3 channels; a single image comes out
    without the batch axis too. H, W and B may be unknown until a graph runs. Output: (C, h, w) or (B, C, h, w) float32,
    or channels last if `data_format` says so. As for arrays given to the reference, gray becomes RGB, or RGB gray,
    unless `do_convert_rgb` is False. One thing can differ: what XLA compiles from a graph that does not know the sizes
    adds in another order, and `resample=0` may then pick a neighbouring pixel.

    Args:
        processor: what to do; it is copied.
        data_format: `"channels_first"` or `"channels_last"`, of the output; None for the processor's.
        input_data_format: the same of the input; None for the processor's, and `"channels_last"` if that is None.
        name: of the layer.

    Raises:
        ValueError: a bad argument, or images of another dtype or shape.
        tf.errors.InvalidArgumentError: images turn out to be empty in a graph.
    """

    def __init__(
        self,
        processor: ImageProcessor,
        *,
        data_format: str | None = None,
        input_data_format: str | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name, trainable=False, dtype="float32", autocast=False)
        self.processor = snapshot(processor)
        self.data_format = choose_format("data_format", data_format, processor.data_format)
        self.input_data_format = choose_format(
            "input_data_format", input_data_format, processor.input_data_format, "channels_last"
        )
        self.byte_table = self.processor.byte_table()  # (C, 256)
        self.built = True

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, revision: str | None = None, **overrides: Any
    ) -> "ImagePreprocessor":
        """Reads a `preprocessor_config.json`; arguments and errors are those of `ImageProcessor.from_pretrained`."""
        return cls(ImageProcessor.from_pretrained(source, revision=revision, **overrides))

    def call(self, images):
        images = tf.convert_to_tensor(images)
        rank = images.shape.rank
        shape = None if rank is None else images.shape.as_list()
        check_images(images.dtype.name, shape, self.input_data_format, self.processor)
        batch = images if rank == 4 else images[None]
        if self.input_data_format == "channels_first":
            batch = tf.transpose(batch, (0, 2, 3, 1))  # (B, H, W, C)
        batch = convert_channels(batch, self.processor.num_channels)
        if self.processor.do_resize:
            size = self.processor.size
            batch = resize(batch, size["height"], size["width"], self.processor.resample)
        values = self._look_up(batch)
        return values if rank == 4 else values[0]

    def _look_up(self, batch):
        """Rescales and normalises (B, H, W, C) uint8 to float32, laid out as `data_format` says."""
        offsets = np.arange(batch.shape[-1], dtype=np.int32) * 256
        if self.data_format == "channels_first":
            batch, offsets = tf.transpose(batch, (0, 3, 1, 2)), offsets[:, None, None]
        return tf.gather(self.byte_table.reshape(-1), tf.cast(batch, tf.int32) + offsets)

    def get_config(self) -> dict:
        return {
            "processor": self.processor.to_dict(),
            "data_format": self.data_format,
            "input_data_format": self.input_data_format,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict):
        return cls(**{**config, "processor": ImageProcessor.from_dict(config["processor"])})


def convert_channels(images, num_channels: int):
    """Turns (B, H, W, C) uint8 of gray into RGB, or of RGB into gray as Pillow does, if `num_channels` wants it."""
    if images.shape[-1] == num_channels:
        return images
    if num_channels == 3:
        return tf.repeat(images, 3, axis=-1)
    luma = tf.reduce_sum(tf.cast(images, tf.int32) * LUMA_WEIGHTS, axis=-1, keepdims=True)
    return tf.cast((luma + 2**15) // 2**16, tf.uint8)


def resize(images, height: int, width: int, resample: int):
    """Resizes (B, H, W, C) uint8 as Pillow does; see `modelspec.images.resampling`."""

    def in_order(*axes: int):
        resized = images
        for axis in axes:
            resized = _resize_axis(resized, axis, (height, width)[axis - 1], resample)
        return resized

    first = height_comes_first(_size(images, 1), _size(images, 2), height, width)
    if isinstance(first, bool):
        return in_order(1, 2) if first else in_order(2, 1)
    return tf.cond(first, lambda: in_order(1, 2), lambda: in_order(2, 1))


def _size(images, axis: int):
    """The size of an axis: a number, or a scalar int32 tensor if only the graph will know it; at least 1."""
    size = images.shape[axis]
    if size is None:
        size = tf.shape(images)[axis]
        with tf.control_dependencies([tf.debugging.assert_positive(size, "images are empty")]):
            size = tf.identity(size)
    return size


def _resize_axis(images, axis: int, out_size: int, resample: int):
    in_size = _size(images, axis)
    if isinstance(in_size, int) and in_size == out_size:
        return images
    if resample == NEAREST:
        positions = cached_positions(in_size, out_size) if isinstance(in_size, int) else _nearest(in_size, out_size)
        return tf.gather(images, positions, axis=axis)
    known = isinstance(in_size, int)
    positions, weights = (cached_weights if known else _weights)(in_size, out_size, resample)
    order = (axis, *(other for other in range(4) if other != axis))
    moved = tf.transpose(images, order)  # (in_size, ...)
    read = tf.cast(tf.gather(tf.reshape(moved, (in_size, -1)), positions), tf.float64)  # (N, L, rest)
    sums = tf.matmul(weights, read)  # (N, 8, rest)
    resized = tf.cast(tf.clip_by_value(sums + 0.5, 0.0, 255.0), tf.uint8)  # cut off, hence rounded half up
    shape = tf.concat([[weights.shape[0] * BLOCK], tf.shape(moved)[1:]], 0)
    resized = tf.transpose(tf.reshape(resized, shape)[:out_size], np.argsort(order))
    resized.set_shape([out_size if other == axis else images.shape[other] for other in range(4)])
    return resized


def _weights(in_size, out_size: int, resample: int):
    with tf.device("cpu:0"):  # where its arithmetic is known to equal NumPy's
        size = tf.cast(in_size, tf.float64)
        positions, weights = block_weights(size, out_size, resample, _graph_maths(size))
        return tf.cast(positions, tf.int32), weights


def _nearest(in_size, out_size: int):
    with tf.device("cpu:0"):
        size = tf.cast(in_size, tf.float64)
        return tf.cast(nearest_positions(size, out_size, _graph_maths(size)), tf.int32)


def _graph_maths(in_size) -> SimpleNamespace:
    """TensorFlow's counterpart of `resampling.NUMPY`."""
    one = tf.minimum(in_size, 1.0)  # no optimiser knows that
    return SimpleNamespace(
        **{name: getattr(tf, name) for name in ("abs", "cos", "floor", "maximum", "minimum", "sin")},
        ceil=tf.math.ceil,
        max=tf.reduce_max,
        where=lambda condition, x, y: tf.where(condition, *(tf.convert_to_tensor(v, tf.float64) for v in (x, y))),
        arange=tf.range,
        cumsum=lambda values: tf.cumsum(values, axis=-1),
        opaque=lambda value: one * value,
    )
