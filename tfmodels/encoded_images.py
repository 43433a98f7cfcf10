"""Image files inside a graph, decoded to the bytes that `modelspec.images.read_image` gives."""

import tensorflow as tf

_ORIENTATION = 0x0112  # tag of EXIF
_APP1, _START_OF_SCAN = 0xE1, 0xDA  # markers of JPEG
_PNG_DEPTH, _PNG_COLOUR_TYPE = 24, 25  # where these bytes stand


def decode_image(image_bytes):
    """Returns the pixels (H, W, 3) uint8 of a JPEG, PNG, GIF, BMP or WebP file, as `modelspec.images.read_image` does.

    Gray becomes RGB, what is transparent shows white, of 16 bits the upper 8 are kept, and the EXIF orientation of JPEG
    and of PNG (where it stands before the pixels) is applied. All bytes are the same, but of CMYK some differ by one.
    WebP is left to the TensorFlow that runs it: 2.21 refuses an alpha channel and several frames, and its EXIF
    orientation is not applied.

    Args:
        image_bytes: a scalar string tensor, the content of a file.

    Raises:
        tf.errors.InvalidArgumentError: when it runs, it is no such file.
    """
    return tf.cond(tf.io.is_jpeg(image_bytes), lambda: _read_jpeg(image_bytes), lambda: _read_other(image_bytes))


def _read_jpeg(image_bytes):
    file = _Bytes(image_bytes)
    # Pillow's choices, so the same bytes
    pixels = tf.io.decode_jpeg(image_bytes, channels=3, dct_method="INTEGER_ACCURATE", fancy_upscaling=True)
    return _upright(pixels, _orientation(file, *_exif_of_jpeg(file)))


def _read_other(image_bytes):
    is_png = tf.equal(tf.strings.substr(image_bytes, 0, 8), b"\x89PNG\r\n\x1a\n")
    return tf.cond(is_png, lambda: _read_png(image_bytes), lambda: _read_gif_or_bmp(image_bytes))


def _read_png(image_bytes):
    file = _Bytes(image_bytes)
    pixels = tf.cast(tf.io.decode_png(image_bytes, channels=4), tf.int32)
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    # TensorFlow fills the alpha channel of gray in 1, 2 or 4 bits with the largest number of these bits
    filling = tf.bitwise.left_shift(1, file.at(_PNG_DEPTH)) - 1
    filled = tf.logical_and(tf.equal(file.at(_PNG_COLOUR_TYPE), 0), tf.equal(alpha, filling))
    pixels = _on_white(colours, tf.where(filled, 255, alpha))
    return _upright(pixels, _orientation(file, *_exif_of_png(file)))


def _read_gif_or_bmp(image_bytes):
    return tf.io.decode_image(image_bytes, channels=3, expand_animations=False)


def _on_white(colours, alpha):
    """Composites (H, W, 3) onto white as Pillow does, in whole numbers; returns (H, W, 3) uint8."""
    blended = (colours * alpha + 255 * (255 - alpha)) * 128 + 0x80 * 128  # 7 bits more than a byte times a byte
    return tf.cast(tf.bitwise.right_shift(tf.bitwise.right_shift(blended, 8) + blended, 8 + 7), tf.uint8)


def _upright(pixels, orientation):
    """Applies an EXIF orientation, 1 to 8, to (H, W, 3)."""

    def is_one_of(*orientations: int):
        return tf.reduce_any(tf.equal(orientation, orientations))

    pixels = tf.cond(orientation >= 5, lambda: tf.transpose(pixels, (1, 0, 2)), lambda: pixels)
    pixels = tf.cond(is_one_of(3, 4, 7, 8), lambda: tf.reverse(pixels, [0]), lambda: pixels)
    pixels = tf.cond(is_one_of(2, 3, 6, 7), lambda: tf.reverse(pixels, [1]), lambda: pixels)
    pixels.set_shape([None, None, 3])
    return pixels


class _Bytes:
    """A file's bytes by position; beyond its end they are zero."""

    def __init__(self, image_bytes):
        read = tf.cast(tf.io.decode_raw(image_bytes, tf.uint8), tf.int32)
        self.size = tf.size(read)
        self._padded = tf.concat([read, [0]], 0)

    def at(self, position):
        """The bytes at some positions, as int32."""
        inside = tf.logical_and(position >= 0, position < self.size)
        return tf.gather(self._padded, tf.where(inside, position, self.size))

    def number(self, position, size: int, little=False):
        """The whole numbers of `size` bytes at some positions; `little`: the first byte is the lowest."""
        parts = [self.at(position + i) for i in range(size)]
        large = sum(part * 256 ** (size - 1 - i) for i, part in enumerate(parts))
        small = sum(part * 256**i for i, part in enumerate(parts))
        return tf.where(little, small, large)

    def spells(self, position, text: bytes):
        """Whether `text` stands at a position."""
        return tf.reduce_all(tf.equal(self.at(position + tf.range(len(text))), list(text)))


def _exif_of_jpeg(file: _Bytes):
    """Returns where the TIFF header of the EXIF block begins and where the block ends; 0 and 0 if there is none."""

    def goes_on(position, begin, end):
        marker = file.at(position + 1)
        inside = tf.logical_and(position + 4 < file.size, tf.equal(file.at(position), 0xFF))
        return tf.logical_and(tf.logical_and(inside, tf.not_equal(marker, _START_OF_SCAN)), tf.equal(begin, 0))

    def step(position, begin, end):
        marker = file.at(position + 1)
        is_exif = tf.logical_and(tf.equal(marker, _APP1), file.spells(position + 4, b"Exif\0\0"))
        length = tf.where(tf.equal(marker, 0xFF), 1, 2 + file.number(position + 2, 2))  # 0xFF fills
        return position + length, tf.where(is_exif, position + 10, begin), tf.where(is_exif, position + length, end)

    return tf.while_loop(goes_on, step, (tf.constant(2), tf.constant(0), tf.constant(0)))[1:]


def _exif_of_png(file: _Bytes):
    """Returns the same of a PNG, if the EXIF chunk stands before the pixels."""

    def goes_on(position, begin, end):
        inside = tf.logical_and(position + 8 < file.size, tf.logical_not(file.spells(position + 4, b"IDAT")))
        return tf.logical_and(inside, tf.equal(begin, 0))

    def step(position, begin, end):
        is_exif = file.spells(position + 4, b"eXIf")
        content = position + 8
        length = tf.clip_by_value(file.number(position, 4), 0, file.size)
        return content + length + 4, tf.where(is_exif, content, begin), tf.where(is_exif, content + length, end)

    return tf.while_loop(goes_on, step, (tf.constant(8), tf.constant(0), tf.constant(0)))[1:]


def _orientation(file: _Bytes, header, end):
    """Returns the orientation, 1 to 8, that the EXIF block from `header` to `end` tells; 1 if it tells none."""
    little = tf.equal(file.at(header), ord("I"))
    directory = header + file.number(header + 4, 4, little)
    entries = directory + 2 + 12 * tf.range(file.number(directory, 2, little))
    inside = tf.logical_and(entries >= header, entries + 12 <= end)
    tells = tf.logical_and(tf.equal(file.number(entries, 2, little), _ORIENTATION), inside)
    values = tf.where(tells, file.number(entries + 8, 2, little), 0)
    told = tf.reduce_max(tf.concat([values, [0]], 0))
    return tf.where(tf.logical_and(told >= 1, told <= 8), told, 1)
