"""How much of a difference rounding explains: the reference again, with everything moved by a random half ulp.

The float64 model runs several times with every weight, and all that goes into and comes out of every layer, moved by up
to half a unit in the last place of the dtype in question; and some times in that dtype itself, since long sums round
more than their terms do. How far its arrays move at most is their *rounding floor*: what any right implementation in
that dtype may differ by.
"""

import contextlib
from collections.abc import Iterator

import numpy as np

from parity.blocks import Arrays, Comparing
from parity.taps import Call, Tap

RUNS = 16
OWN_RUNS = 8  # in the dtype itself, with weights that are moved by so many units, since those are rounded off again
OWN_UNITS = 64.0
OTHER_ORDER = 2.0  # sums in another order, down to one after the other, round up to so many times as much (measured)
MANTISSA_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
_SMALLEST_EXPONENT = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}


def moved(array: np.ndarray, dtype: str, generator: np.random.Generator, units: float = 1.0) -> np.ndarray:
    """Returns a float64 array with each number moved by up to half of `units` in the last place of `dtype`."""
    _, exponents = np.frexp(array)
    exponents = np.maximum(exponents - 1, _SMALLEST_EXPONENT[dtype])
    draws = np.float32(units) * (generator.random(array.shape, dtype=np.float32) - np.float32(0.5))
    steps = np.ldexp(draws.astype(np.float64), exponents - (MANTISSA_BITS[dtype] - 1))
    return array + np.where(array == 0.0, 0.0, steps)  # zeros are exact: padding, or what ReLU gives


class Moving:
    """Moves what goes into layers and comes out, and tells another observer; an observer."""

    def __init__(self, observer: Comparing, dtype: str, generator: np.random.Generator):
        self.observer = observer
        self.dtype = dtype
        self.generator = generator

    def entering(self, call: Call, parent: str, arrays: Arrays) -> Arrays:
        arrays = self._moved(arrays)
        replaced = self.observer.entering(call, parent, arrays)
        return arrays if replaced is None else self._moved(replaced)

    def leaving(self, call: Call, arrays: Arrays) -> Arrays:
        arrays = self._moved(arrays)
        replaced = self.observer.leaving(call, arrays)
        return arrays if replaced is None else replaced

    def _moved(self, arrays: Arrays) -> Arrays:
        return [moved(array, self.dtype, self.generator) for array in arrays]


@contextlib.contextmanager
def moved_weights(tap: Tap, dtype: str, generator: np.random.Generator, units: float = 1.0) -> Iterator[None]:
    """Moves the weights of a float64 model, as `moved` does, for as long as the context lasts."""
    import torch

    tensors = _weights(tap)
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(torch.from_numpy(moved(tensor.numpy(), dtype, generator, units)))
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, kept, strict=True):
                tensor.copy_(values)


def share_weights(wide: Tap, narrow: Tap) -> None:
    """Gives the same weights to a float64 model and to one of a narrower dtype, which rounds them."""
    import torch

    with torch.no_grad():
        for first, second in zip(_weights(wide), _weights(narrow), strict=True):
            second.copy_(first)
            first.copy_(second)


def _weights(tap: Tap) -> list:
    tensors = [*tap.model.parameters(), *tap.model.buffers()]
    return [tensor for tensor in tensors if tensor.is_floating_point()]
