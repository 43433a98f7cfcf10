"""From what a user names (a directory, a file, a Hub id, a variant's name) to a file on this disk."""

import os
import re
from pathlib import Path

from modelspec.atomic_folder import recover
from modelspec.checkpoints.errors import MissingFileError, SourceError, UnreachableError
from modelspec.checkpoints.sharded import shard_names
from modelspec.extras import how_to_install

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"),
)
_BESIDE_WEIGHTS = ("config.json", "preprocessor_config.json", "processor_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_file(
    source: str | os.PathLike, filename: str, revision: str | None = None, *, local_files_only: bool = False
) -> str:
    """Returns the local path of `filename` as `source` holds it.

    Args:
        source: a directory; a file, whose directory is then searched (the file itself if it bears the name); a Hub
            id such as `"MBZUAI/swiftformer-xs"`; or the name of a published variant such as `"swiftformer-xs"`.
        filename: for example `"config.json"`.
        revision: branch, tag or commit of the Hub repository.
        local_files_only: look in the Hub's cache only.

    Raises:
        SourceError: (an `OSError`) there is no such file (then a `MissingFileError`), huggingface_hub is not
            installed, or the Hub cannot be reached and its cache does not hold the file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        path = path.parent
    if path.is_dir():
        recover(path)
        if (path / filename).is_file():
            return str(path / filename)
        present = sorted(entry.name for entry in path.iterdir())
        raise MissingFileError(f"{path} holds no {filename}; it holds {', '.join(present) or 'nothing'}")
    text = str(source)
    if not _HUB_ID.fullmatch(text):
        raise SourceError(f"{text!r} is neither a file or directory here nor a Hub id of the form 'owner/name'")
    return _download(_hub_id(text), filename, revision, local_files_only)


def _hub_id(name: str) -> str:
    from modelspec.configs.catalog import get_variant

    try:
        return get_variant(name).hub_id
    except ValueError:
        return name


def _download(hub_id: str, filename: str, revision: str | None, local_files_only: bool) -> str:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise SourceError(
            f"{hub_id!r} is no file or directory here; to read it from the Hub, {how_to_install('hub')}"
        ) from error
    try:
        return hf_hub_download(hub_id, filename, revision=revision, local_files_only=local_files_only)
    except LocalEntryNotFoundError as error:
        raise UnreachableError(
            f"{hub_id!r} is no file or directory here, the Hub cannot be reached, and its cache holds no {filename}"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{hub_id!r} is no file or directory here and no repository on the Hub") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{hub_id!r} has no revision {revision!r} on the Hub") from error
    except EntryNotFoundError as error:
        raise MissingFileError(f"{hub_id!r} holds no {filename} on the Hub") from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise SourceError(f"{filename} of {hub_id!r} cannot be fetched: {error}") from error


def resolve_weights(source: str | os.PathLike, revision: str | None = None) -> str:
    """Returns the local path of the weights that `source` names: a file, or the index of its shards.

    Of a directory or a Hub repository the first of WEIGHTS that is there; the shards of an index come along. A file
    that is itself one of weights, or an index, is taken as it is, whatever its name.

    Raises:
        SourceError: as `resolve_file` does.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.name not in _BESIDE_WEIGHTS:
        return str(path)
    missing: MissingFileError | None = None
    for filename in WEIGHTS:
        try:
            # one attempt to reach the Hub is slow enough; the cache may hold another of the files
            unreachable = isinstance(missing, UnreachableError)
            found = resolve_file(source, filename, revision, local_files_only=unreachable)
        except MissingFileError as error:
            missing = missing or error
            continue
        if filename.endswith(".index.json") and not path.exists():
            for shard in shard_names(found):
                resolve_file(source, shard, revision)
        return found
    assert missing is not None  # WEIGHTS is not empty
    raise missing
