"""The photograph that is looked at when none is given."""

import sys

import numpy as np
import pytest

from modelspec.images import ImageProcessor
from parity.photograph import pixel_values, read_photograph


def test_the_default_is_the_cat_of_scikit_image():
    data = pytest.importorskip("skimage.data")
    photograph = read_photograph()
    assert photograph.name == "scikit-image's cat" and np.array_equal(photograph.pixels, data.chelsea())


def test_without_scikit_image_the_default_comes_with_the_package_and_is_named(monkeypatch):
    for name in ("skimage", "skimage.data"):
        monkeypatch.setitem(sys.modules, name, None)  # import says that there is no such module
    photograph = read_photograph()
    assert photograph.pixels.shape == (480, 640, 3) and photograph.pixels.dtype == np.uint8
    assert photograph.pixels.std(axis=(0, 1)).min() > 30  # in colour and with contrast, so that it tells something
    _, words = pixel_values(photograph, ImageProcessor(size=32))
    assert words.startswith("twinzoo's coffee, 480x640, resized to 32x32 (bilinear), ")
