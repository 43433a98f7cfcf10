"""Reading a safetensors file into NumPy, with errors that name the file and the reason."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from modelspec.checkpoints.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds.

    Attributes:
        path: the file.
        tensors: key -> array; bfloat16 (which NumPy lacks) is widened to float32, without loss.
        dtype: the name of the floating dtype that most elements have in the file, e.g. `"bfloat16"`.
        metadata: the file's own text annotations.
    """

    path: str
    tensors: dict[str, np.ndarray]
    dtype: str
    metadata: dict[str, str]


_FLOAT_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_safetensors(path: str | Path) -> Checkpoint:
    """Reads every tensor of `path`.

    Raises:
        CheckpointError: the file is empty, truncated, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    tensors, elements = {}, {}
    try:
        with safe_open(str(path), framework="np") as file:
            for key in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                view = file.get_slice(key)
                dtype = view.get_dtype()
                if dtype == "BF16":
                    tensors[key] = _read_bfloat16(path, key)
                else:
                    tensors[key] = np.array(file.get_tensor(key))
                if dtype in _FLOAT_NAMES:
                    elements[dtype] = elements.get(dtype, 0) + tensors[key].size
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
    dtype = _FLOAT_NAMES[max(elements, key=elements.get)] if elements else "float32"
    return Checkpoint(str(path), tensors, dtype, metadata)


def _read_bfloat16(path: str | Path, key: str) -> np.ndarray:
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_length))[key]
        begin, end = entry["data_offsets"]
        file.seek(8 + header_length + begin)
        halves = np.frombuffer(file.read(end - begin), "<u2")
    # bfloat16 is the upper half of a float32
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
