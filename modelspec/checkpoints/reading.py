"""Reading a checkpoint of any format and dialect."""

from pathlib import Path

from modelspec.checkpoints.checkpoint import Checkpoint
from modelspec.checkpoints.dialects import translate
from modelspec.checkpoints.h5_file import read_h5
from modelspec.checkpoints.safetensors_file import read_safetensors
from modelspec.checkpoints.sharded import read_sharded
from modelspec.checkpoints.torch_file import read_torch

_BY_SUFFIX = {
    ".safetensors": read_safetensors,
    **dict.fromkeys((".bin", ".pth", ".pt", ".ckpt"), read_torch),
    **dict.fromkeys((".h5", ".hdf5"), read_h5),
}
_BY_FIRST_BYTES = {b"\x89HDF": read_h5, b"PK\x03\x04": read_torch, b"\x80\x02": read_torch}
SUFFIXES = (*_BY_SUFFIX, ".tar", ".json")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the tensors of `path`, under the reference's names and in its layouts.

    Args:
        path: a safetensors file, a file of `torch.save`, a `tf_model.h5`, or the index (`.json`) of shards.

    Raises:
        CheckpointError: the file is truncated, damaged, or none of these; nothing in it is ever executed.
        OSError: it cannot be opened.
    """
    return translate(_read(Path(path)))


def _read(path: Path) -> Checkpoint:
    if path.suffix == ".json":
        return read_sharded(path, _read_one)
    return _read_one(path)


def _read_one(path: Path) -> Checkpoint:
    reader = _BY_SUFFIX.get(path.suffix.lower())
    if reader is None:
        with open(path, "rb") as file:
            begin = file.read(4)
        reader = next((reader for mark, reader in _BY_FIRST_BYTES.items() if begin.startswith(mark)), read_safetensors)
    return reader(path)
