"""Reading and writing safetensors files, with errors that name the file and the reason."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modelspec.checkpoints.checkpoint import Checkpoint, digest, main_dtype, widen_bfloat16
from modelspec.checkpoints.errors import CheckpointError

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


class RawTensor(NamedTuple):
    """A tensor on its way into a file: its dtype's name (`"bfloat16"`), its shape, its bytes in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_safetensors(path: str | Path) -> Checkpoint:
    """Reads every tensor of `path`, and checks the `sha256` of its metadata, if it has one.

    Raises:
        CheckpointError: the file is empty, truncated, no safetensors file, or not what was written.
    """
    from safetensors import SafetensorError, safe_open

    tensors, entries = {}, []
    elements: dict[str, int] = {}
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = dict(file.metadata() or {})
            for key in sorted(file.keys()):
                view = file.get_slice(key)
                dtype = _DTYPES.get(view.get_dtype(), view.get_dtype())
                if dtype == "bfloat16":
                    stored = _read_bfloat16(path, key)
                    tensors[key] = widen_bfloat16(stored)
                else:
                    stored = tensors[key] = np.array(file.get_tensor(key))
                elements[dtype] = elements.get(dtype, 0) + stored.size
                if "sha256" in metadata:
                    entries.append((key, dtype, stored.shape, stored.reshape(-1).view(np.uint8)))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
    if "sha256" in metadata and digest(entries, metadata) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its weights are not those of its sha256")
    return Checkpoint(str(path), tensors, main_dtype(elements), metadata)


def write_safetensors(path: str | Path, tensors: Mapping[str, RawTensor]) -> str:
    """Writes `tensors` to `path`, with their sha256 in the metadata beside `{"format": "pt"}`; returns the sha256."""
    from safetensors import TensorSpec, serialize_file

    metadata = {"format": "pt"}
    metadata["sha256"] = digest(((key, *tensors[key]) for key in sorted(tensors)), metadata)
    buffers = {key: np.frombuffer(raw.data, np.uint8) for key, raw in tensors.items()}
    entries = {
        key: TensorSpec(
            dtype=raw.dtype, shape=list(raw.shape), data_ptr=buffers[key].ctypes.data, data_len=len(raw.data)
        )
        for key, raw in tensors.items()
    }
    serialize_file(entries, str(path), metadata)
    return metadata["sha256"]


def _read_bfloat16(path: str | Path, key: str) -> np.ndarray:
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_length))[key]
        begin, end = entry["data_offsets"]
        file.seek(8 + header_length + begin)
        return np.frombuffer(file.read(end - begin), "<u2").reshape(entry["shape"])
