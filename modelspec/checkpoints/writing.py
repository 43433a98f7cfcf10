"""Writing a checkpoint folder: the weights, in several files if they are large, the config, the image processor."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modelspec.atomic_folder import atomic_folder
from modelspec.checkpoints.safetensors_file import RawTensor, write_safetensors
from modelspec.checkpoints.sharded import index_digest

_OURS = re.compile(
    r"config\.json|(model|pretraining)\.safetensors|model\.safetensors\.index\.json|model-\d{5}-of-\d{5}\.safetensors"
)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MAX_SHARD_SIZE = "5GB"


def write_checkpoint(
    directory: str | os.PathLike,
    config_text: str,
    sizes: Mapping[str, int],
    tensor: Callable[[str], RawTensor],
    *,
    processor: Any = None,
    pretraining: Mapping[str, RawTensor] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes `config.json`, the weights and, if given, `preprocessor_config.json` into `directory`.

    The folder is replaced as a whole: a reader, or whoever comes after a crash, finds all of the old files or all of
    the new ones. Other files in it are kept. Each file of weights has its sha256 in its metadata, and so has the index
    of several.

    Args:
        directory: made if need be.
        config_text: what `config.json` is to hold.
        sizes: key -> bytes of the tensor, in the order of the model.
        tensor: gives the tensor of a key; called once each, so that one shard at a time is in memory.
        processor: an `ImageProcessor`; without one, a `preprocessor_config.json` that is there stays.
        pretraining: tensors for `pretraining.safetensors`, which is written if there are some.
        max_shard_size: limit of a file's tensors, in bytes or as `"5GB"`; a larger tensor has a file of its own.

    Raises:
        ValueError: `max_shard_size` is no size.
        OSError: something cannot be written; nothing has changed then.
    """
    shards = _shards(sizes, parse_size(max_shard_size))
    with atomic_folder(directory, lambda name: bool(_OURS.fullmatch(name))) as folder:
        digests = {}
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            digests[name] = write_safetensors(folder / name, {key: tensor(key) for key in keys})
            weight_map |= dict.fromkeys(keys, name)
        if len(shards) > 1:
            metadata: dict[str, Any] = {"total_size": sum(sizes.values())}
            metadata["sha256"] = index_digest(weight_map, metadata, digests)
            text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        (folder / "config.json").write_text(config_text, encoding="utf-8")
        if pretraining:
            write_safetensors(folder / "pretraining.safetensors", pretraining)
        if processor is not None:
            processor.save_pretrained(folder)
        _give_permissions(folder)


def parse_size(size: int | str) -> int:
    """Returns a number of bytes given as such or as text, `"5GB"`, `"200MiB"`.

    Raises:
        ValueError: it is neither, or not above 0.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B)", str(size).strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ValueError(
            f"max_shard_size is {size!r}; give a number of bytes above 0, or text such as '5GB' or '200MiB'"
        )
    return max(1, int(float(found[1]) * _UNITS[found[2].upper()]))


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _give_permissions(folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for entry in folder.iterdir():
        entry.chmod(0o666 & ~umask)  # some writers give 0600; a saved model should be as readable as any file
