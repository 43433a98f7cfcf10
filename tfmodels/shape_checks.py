"""Checks of sizes that may be unknown until a graph runs."""

import tensorflow as tf


def assert_image_size(pixel_values, image_size: int):
    """Returns (B, H, W, C) images; H and W must be `image_size`. Sizes unknown at trace time are checked at run time.

    Raises:
        ValueError: the static size is another one.
        tf.errors.InvalidArgumentError: the size turns out to be another one in a graph.
    """
    advice = "pass interpolate_pos_encoding=True for other sizes"
    height, width = pixel_values.shape[1:3]
    if any(size not in (None, image_size) for size in (height, width)):
        raise ValueError(f"pixel_values are {height}x{width}, the model's images {image_size}x{image_size}; {advice}")
    if height is None or width is None:
        message = f"pixel_values are not {image_size}x{image_size}; {advice}"
        check = tf.debugging.assert_equal(tf.shape(pixel_values)[1:3], [image_size, image_size], message)
        with tf.control_dependencies([check]):
            pixel_values = tf.identity(pixel_values)
        pixel_values.set_shape((None, image_size, image_size, None))
    return pixel_values
