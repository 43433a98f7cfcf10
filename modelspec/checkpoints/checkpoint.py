"""What a weight file holds, whatever its format."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np

FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds.

    Attributes:
        path: the file, or the index of its shards.
        tensors: key -> array; bfloat16 (which NumPy lacks) is widened to float32, without loss.
        dtype: the name of the floating dtype that most elements have in the file, e.g. `"bfloat16"`.
        metadata: the file's own text annotations.
        format: `"safetensors"`, `"torch"` or `"h5"`.
        dialect: whose names the keys were in, see `modelspec.checkpoints.dialects`; here they are the reference's.
        pretraining: what only pretraining needs: MSN's projection head and prototypes, under the file's names.
    """

    path: str
    tensors: dict[str, np.ndarray]
    dtype: str
    metadata: dict[str, str]
    format: str = "safetensors"
    dialect: str = "transformers"
    pretraining: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def widen_bfloat16(halves: np.ndarray) -> np.ndarray:
    """Returns the float32 values of bfloat16 numbers given as uint16: the upper halves of float32 ones."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def narrow_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Returns float32 values as bfloat16, in uint16: rounded to the nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def main_dtype(elements: dict[str, int]) -> str:
    """Returns the floating dtype that has most of the elements; float32 if there is none."""
    floats = {name: count for name, count in elements.items() if name in FLOAT_BYTES}
    return max(floats, key=floats.__getitem__) if floats else "float32"


def digest(entries: Iterable[tuple[str, str, tuple[int, ...], np.ndarray | bytes]], metadata: dict[str, str]) -> str:
    """Returns the sha256 of named tensors, as hexadecimal digits.

    It covers every key, dtype, shape and byte, and the metadata but for an entry `sha256`.

    Args:
        entries: (key, dtype, shape, bytes), in the order of the keys; bytes may be a flat array of uint8.
        metadata: the file's text annotations.
    """
    total = hashlib.sha256()
    annotations = {name: text for name, text in metadata.items() if name != "sha256"}
    total.update(json.dumps(annotations, sort_keys=True).encode())
    for key, dtype, shape, data in entries:
        total.update(json.dumps([key, dtype, list(shape)]).encode())
        total.update(data)  # type: ignore[arg-type]  # NumPy says that arrays are buffers from Python 3.12 on only
    return total.hexdigest()


def digest_arrays(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the sha256 of named arrays, whatever order they come in; see `digest`."""
    arrays = ((key, np.ascontiguousarray(tensors[key])) for key in sorted(tensors))
    return digest(((key, str(array.dtype), array.shape, array.tobytes()) for key, array in arrays), {})
