"""Reading the weights of a `tf_model.h5`, as transformers' TensorFlow classes wrote it, without TensorFlow."""

import math
from pathlib import Path

import numpy as np

from modelspec.checkpoints.checkpoint import Checkpoint, main_dtype
from modelspec.checkpoints.errors import CheckpointError

_DEEPEST = 32


def read_h5(path: str | Path) -> Checkpoint:
    """Reads every array of `path`; keys are its paths, with dots for slashes, below the top group and the model's name.

    Raises:
        CheckpointError: the file is truncated, damaged, no HDF5 file, or refers to something outside of itself.
    """
    import h5py

    tensors, elements, total = {}, {}, 0
    try:
        length = Path(path).stat().st_size
        with h5py.File(path, "r") as file:
            for name, dataset in _datasets(file, "", 0):
                count = math.prod(dataset.shape)
                # arrays lie in the file as they are: what is packed, virtual or elsewhere could be of any size
                begin = dataset.id.get_offset()
                if dataset.external or dataset.is_virtual or dataset.chunks or (count and begin is None):
                    raise CheckpointError(f"its array {name} is not stored in one piece")
                if dataset.dtype.kind not in "fiu" or count * dataset.dtype.itemsize > length - (begin or 0):
                    raise CheckpointError(f"its array {name} of {dataset.shape} {dataset.dtype} does not fit the file")
                key = ".".join(name.split("/")[2:])
                if key in tensors or not key:
                    raise CheckpointError(f"its array {name} has no name of its own below the model's")
                total += count * dataset.dtype.itemsize
                if total > length:
                    raise CheckpointError("its arrays share their bytes: they are larger than the file")
                tensors[key] = np.asarray(dataset[()])
                elements[str(dataset.dtype)] = elements.get(str(dataset.dtype), 0) + count
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no readable HDF5 file of weights: {error}") from error
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path} is no readable HDF5 file of weights: {error}") from error
    return Checkpoint(str(path), tensors, main_dtype(elements), {}, format="h5")


def _datasets(group, prefix: str, depth: int):
    import h5py

    if depth > _DEEPEST:
        raise CheckpointError(f"its groups are nested deeper than {_DEEPEST}")
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise CheckpointError(f"{prefix}{name} is a link to something else, which is not followed")
        entry = group[name]
        if isinstance(entry, h5py.Dataset):
            yield f"{prefix}{name}", entry
        elif isinstance(entry, h5py.Group):
            yield from _datasets(entry, f"{prefix}{name}/", depth + 1)
        else:
            raise CheckpointError(f"{prefix}{name} is neither a group nor an array")
