"""Folders of digits for the tests."""

import numpy as np
from PIL import Image


def write_digits(folder, count=60, classes=3):
    """Writes the first `count` of scikit-learn's digits below `classes` as PNG files, in a folder per class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = np.flatnonzero(data.target < classes)[:count]
    for number in chosen:
        path = folder / f"digit {data.target[number]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(data.images[number] * 15.9375)).save(path)
    return folder
