"""Which layer of one model is which of the other: by the names given, by equal names, else by kind, size and order."""

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from parity.taps import Call, Tap

# Class names of both frameworks, in small letters and without the number of axes -> what they do.
_KINDS = {
    "dense": "linear",
    "depthwiseconv": "conv",
    "separableconv": "conv",
    "batchnormalization": "batchnorm",
    "layernormalization": "layernorm",
    "groupnormalization": "groupnorm",
    "maxpooling": "maxpool",
    "averagepooling": "avgpool",
    "globalaveragepooling": "adaptiveavgpool",
    "globalmaxpooling": "adaptivemaxpool",
    "zeropadding": "zeropad",
    "upsampling": "upsample",
}
_ACTIVATIONS = {"activation", "relu", "gelu", "silu", "selu", "sigmoid", "tanh", "softmax", "elu", "leakyrelu", "prelu"}


class _Calls:
    """Notes which layers are called, in which order, and how large what they give is; an observer."""

    def __init__(self) -> None:
        self.sizes: dict[str, tuple[int, ...]] = {}

    def entering(self, call: Call, parent: str, arrays: list[np.ndarray]) -> None:
        pass

    def leaving(self, call: Call, arrays: list[np.ndarray]) -> None:
        self.sizes.setdefault(call[0], tuple(array.size for array in arrays))


def match_layers(first: Tap, second: Tap, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """Runs both models and pairs the layers that they call.

    Args:
        first, second: the models.
        names: layer of the first -> layer of the second, where they are known.

    Returns:
        Layer of the first -> layer of the second, in the order in which the first calls them.

    Raises:
        ValueError: a given name is no layer's, is not called, or is given twice.
    """
    called = []
    for tap in (first, second):
        calls = _Calls()
        tap.run(calls)
        called.append(calls.sizes)
    pairs = dict(names or {})
    for position, (given, tap) in enumerate(zip((list(pairs), list(pairs.values())), (first, second), strict=True)):
        for name in given:
            if name not in called[position]:
                why = "is never called" if name in tap.layers else "there is no such layer"
                some = ", ".join(list(called[position])[:8])
                raise ValueError(
                    f"names: {name!r} of the {('first', 'second')[position]} model: {why}; it calls {some}"
                )
    twice = [name for name, count in collections.Counter(pairs.values()).items() if count > 1]
    if twice:
        raise ValueError(f"names: {twice[0]!r} of the second model is given twice")
    taken = set(pairs.values())
    for name in called[0]:
        if name not in pairs and name in called[1] and name not in taken:
            pairs[name] = name
            taken.add(name)
    rest = [
        [name for name in sizes if name not in known and not tap.children(name)]
        for sizes, known, tap in ((called[0], pairs, first), (called[1], taken, second))
    ]
    described = [
        [(_kind(tap.layers[name]), sizes[name]) for name in left]
        for left, sizes, tap in zip(rest, called, (first, second), strict=True)
    ]
    pairs |= {rest[0][i]: rest[1][j] for i, j in _longest_common(*described)}
    return {name: pairs[name] for name in called[0] if name in pairs}


def _kind(layer: Any) -> str:
    name = re.sub(r"[123]d$", "", type(layer).__name__.lower()).removeprefix("fused")
    return _KINDS.get(name, "activation" if name in _ACTIVATIONS else name)


def _longest_common(first: list, second: list) -> list[tuple[int, int]]:
    """Returns the pairs of indices of a longest common subsequence."""
    lengths = np.zeros((len(first) + 1, len(second) + 1), int)
    for i in reversed(range(len(first))):
        for j in reversed(range(len(second))):
            same = first[i] == second[j]
            lengths[i, j] = lengths[i + 1, j + 1] + 1 if same else max(lengths[i + 1, j], lengths[i, j + 1])
    pairs, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif lengths[i + 1, j] >= lengths[i, j + 1]:
            i += 1
        else:
            j += 1
    return pairs
