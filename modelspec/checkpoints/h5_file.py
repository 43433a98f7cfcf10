"""Reading the weights of a `tf_model.h5`, as transformers' TensorFlow classes wrote it, without TensorFlow."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.checkpoints.checkpoint import Checkpoint, main_dtype
from modelspec.checkpoints.errors import CheckpointError

_MOST_GROUPS = 100_000


def read_h5(path: str | Path) -> Checkpoint:
    """Reads every array of `path`; keys are its paths, with dots for slashes, below the top group and the model's name.

    Raises:
        CheckpointError: the file is truncated, damaged, no HDF5 file, or refers to something outside of itself.
    """
    import h5py

    tensors = {}
    elements: dict[str, int] = {}
    try:
        length = Path(path).stat().st_size
        with h5py.File(path, "r") as file:
            datasets = dict(_datasets(file, "", set()))
            _check_places(datasets, length)
            for name, dataset in datasets.items():
                key = ".".join(name.split("/")[2:])
                if key in tensors or not key:
                    raise CheckpointError(f"its array {name} has no name of its own below the model's")
                tensors[key] = np.asarray(dataset[()])
                elements[str(dataset.dtype)] = elements.get(str(dataset.dtype), 0) + tensors[key].size
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no readable HDF5 file of weights: {error}") from error
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path} is no readable HDF5 file of weights: {error}") from error
    return Checkpoint(str(path), tensors, main_dtype(elements), {}, format="h5")


def _check_places(datasets: dict, length: int) -> None:
    """Checks that arrays lie in the file as they are, side by side; packed or elsewhere they could be of any size."""
    import h5py

    places = []
    for name, dataset in datasets.items():
        size = math.prod(dataset.shape) * dataset.dtype.itemsize
        begin = dataset.id.get_offset()
        if dataset.external or dataset.is_virtual or dataset.chunks or (size and begin is None):
            raise CheckpointError(f"its array {name} is not stored in one piece")
        is_usual = dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype))  # not with another exponent, say
        if dataset.dtype.kind not in "fiu" or not is_usual or size > length - (begin or 0):
            raise CheckpointError(f"its array {name} of {dataset.shape} {dataset.dtype} does not fit the file")
        places.append((begin or 0, (begin or 0) + size, name))
    for (_, end, first), (begin, _, second) in itertools.pairwise(sorted(places)):
        if begin < end:
            raise CheckpointError(f"its arrays {first} and {second} overlap")


def _datasets(group: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    import h5py

    address = h5py.h5o.get_info(group.id).addr
    if address in seen or len(seen) > _MOST_GROUPS:
        raise CheckpointError(f"its group {prefix or '/'} is reached in several ways, or there are too many")
    seen.add(address)
    for name in group:
        link = group.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise CheckpointError(f"{prefix}{name} is a link to something else, which is not followed")
        entry = group[name]
        if isinstance(entry, h5py.Dataset):
            yield f"{prefix}{name}", entry
        elif isinstance(entry, h5py.Group):
            yield from _datasets(entry, f"{prefix}{name}/", seen)
        else:
            raise CheckpointError(f"{prefix}{name} is neither a group nor an array")
