"""Reading a checkpoint that is cut into several files, beside an index that says which key is where."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from modelspec.checkpoints.checkpoint import Checkpoint
from modelspec.checkpoints.errors import CheckpointError

_FILE_NAME = re.compile(r"[\w-][\w.-]*")


def read_sharded(path: str | Path, read: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Reads all shards that the index `path` names; `read` reads one.

    Raises:
        CheckpointError: the index is damaged, names a file outside its folder or one that is not there, or a shard
            does not hold the keys that the index says.
    """
    path = Path(path)
    weight_map, metadata = _read_index(path)
    shards = {}
    for name in dict.fromkeys(weight_map.values()):
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names the shard {name}, which is not there")
        shards[name] = read(path.parent / name)
    tensors: dict[str, np.ndarray] = {}
    for name, shard in shards.items():
        expected = {key for key, file in weight_map.items() if file == name}
        if expected != shard.tensors.keys():
            wrong = sorted(expected ^ shard.tensors.keys())
            raise CheckpointError(f"{path} and {name} disagree about {', '.join(wrong[:5])}")
        tensors |= shard.tensors
    elements: dict[str, int] = {}
    for shard in shards.values():
        elements[shard.dtype] = elements.get(shard.dtype, 0) + sum(value.size for value in shard.tensors.values())
    if "sha256" in metadata and metadata["sha256"] != index_digest(
        weight_map, metadata, {name: shard.metadata.get("sha256", "") for name, shard in shards.items()}
    ):
        raise CheckpointError(f"{path} is damaged or its shards are of another save: they do not fit its sha256")
    first = next(iter(shards.values()))
    return Checkpoint(str(path), tensors, max(elements, key=elements.__getitem__), first.metadata, format=first.format)


def index_digest(weight_map: dict[str, str], metadata: dict, shards: dict[str, str]) -> str:
    """Returns the sha256 of an index: of its contents but for itself, and of its shards' sha256."""
    contents = [weight_map, {name: value for name, value in metadata.items() if name != "sha256"}, shards]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def shard_names(path: str | Path) -> list[str]:
    """Returns the files that the index `path` names. Raises CheckpointError as `read_sharded` does."""
    return list(dict.fromkeys(_read_index(Path(path))[0].values()))


def _read_index(path: Path) -> tuple[dict[str, str], dict]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable index of shards: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    metadata = index.get("metadata", {}) if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is no index of shards: it has no weight_map")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path} says that {key} is in {name!r}; only the name of a file beside it is allowed"
            )
    return weight_map, metadata
