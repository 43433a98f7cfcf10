"""Image files are decoded inside a graph to the same bytes as outside of it."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modelspec.exports.photographs import PHOTOGRAPHS, read_photographs
from modelspec.images import read_image
from tfmodels.encoded_images import decode_image

decode = tf.function(decode_image, input_signature=[tf.TensorSpec([], tf.string)])


def picture(size=(61, 43)) -> Image.Image:
    return Image.open(io.BytesIO(read_photographs()[0])).resize(size)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_same(file: bytes) -> None:
    expected = read_image(file)
    np.testing.assert_array_equal(decode(file), expected)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(name):
    assert_same(read_photographs()[PHOTOGRAPHS.index(name)])


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    mode=st.sampled_from(["RGB", "L"]),
    quality=st.integers(1, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    orientation=st.integers(0, 9),
)
def test_jpeg(size, mode, quality, subsampling, progressive, orientation):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x0131] = "maker", orientation, "software"
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive, "exif": exif}
    assert_same(encoded(picture(size).convert(mode), "JPEG", **options))


def test_cmyk_is_off_by_one_at_most():
    file = encoded(picture().convert("CMYK"), "JPEG", quality=60)
    assert np.abs(decode(file).numpy().astype(int) - read_image(file)).max() <= 1


def rgba(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 4), np.uint8))


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["RGBA", "RGB", "LA", "L", "P", "1"]),
    orientation=st.integers(0, 9),
    seed=st.integers(0, 9),
)
def test_png(size, mode, orientation, seed):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = rgba(seed, size)
    image = image.convert("L").convert("1") if mode == "1" else image.convert(mode)
    assert_same(encoded(image, "PNG", exif=exif))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gray_png_of_few_bits(depth):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + bytes(range(0, 256, 17))[: 2 * depth]  # 16 pixels
    header = struct.pack(">IIBBBBB", 16, 3, depth, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(3 * row)), chunk(b"IEND", b""))
    assert_same(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (picture().quantize(16), {"transparency": 3}),
        (picture(), {"transparency": picture().getpixel((0, 0))}),
        (Image.fromarray(np.random.default_rng(0).integers(0, 65536, (20, 30), np.uint16)), {}),
    ],
)
def test_transparent_colours_and_deep_gray_of_png(image, options):
    assert_same(encoded(image, "PNG", **options))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "WEBP"])
def test_other_formats(kind):
    assert_same(encoded(picture(), kind))


def tiff(order: str, entries: list[tuple[int, int, int]]) -> bytes:
    directory = b"".join(struct.pack(f"{order}HHIHH", tag, kind, 1, value, 0) for tag, kind, value in entries)
    mark = {"<": b"II", ">": b"MM"}[order]
    return mark + struct.pack(f"{order}HIH", 42, 8, len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", [1, 5, 6, 8])
def test_exif_of_both_byte_orders(order, orientation):
    block = b"Exif\0\0" + tiff(order, [(0x0100, 3, 7), (0x0112, 3, orientation), (0x0128, 3, 2)])
    file = encoded(picture(), "JPEG", exif=block, comment=b"before or after")
    assert_same(file)
    assert decode(file).shape == ((61, 43, 3) if orientation >= 5 else (43, 61, 3))


@pytest.mark.parametrize("length", [0, 4, 8, 12, 20])
def test_exif_that_breaks_off_tells_nothing(length):
    block = b"Exif\0\0" + tiff("<", [(0x0112, 3, 6)])[:length]
    file = encoded(picture(), "JPEG")
    with_block = file[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + file[2:]
    np.testing.assert_array_equal(decode(with_block), read_image(file))
