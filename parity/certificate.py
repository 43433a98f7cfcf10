"""`parity.json`: what a check found, kept in the folder that was checked, and whether it still belongs to the files."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from modelspec.atomic_file import write_text
from modelspec.checkpoints.checkpoint import digest_arrays
from modelspec.configs import ModelConfig

FILE_NAME = "parity.json"


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a folder's `parity.json` is worth.

    Attributes:
        belongs: whether weights and config are those that were checked.
        passed: whether the check passed.
        changed: what is not as it was, of "weights" and "config".
        found: the contents of the file.
    """

    belongs: bool
    passed: bool
    changed: tuple[str, ...]
    found: dict[str, Any]


def digest_config(config: ModelConfig) -> str:
    """Returns the sha256 of a config, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()


def write_certificate(folder: str | os.PathLike, report: dict[str, Any], weights: str, config: str) -> Path:
    """Writes `parity.json` into a folder, atomically.

    Args:
        folder: of the checkpoint.
        report: `Report.to_dict()`.
        weights, config: their sha256.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(folder) / FILE_NAME
    contents = {"sha256": {"weights": weights, "config": config}, **report}
    write_text(path, json.dumps(contents, separators=(",", ":"), allow_nan=False) + "\n")
    return path


def verify(folder: str | os.PathLike) -> Verification:
    """Tells whether the `parity.json` of a folder still belongs to its files; needs no framework.

    Raises:
        ValueError: there is none, or it cannot be read.
        SourceError, CheckpointError: the folder holds no checkpoint that can be read.
    """
    from parity.subjects import checkpoint_subject

    path = Path(folder).expanduser() / FILE_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        digests = {name: found["sha256"][name] for name in ("weights", "config")}
        seed, passed, count = found["environment"]["seed"], bool(found["passed"]), len(found["results"])
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {FILE_NAME}: it was not checked, or the result was not kept") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of parity check: {error}") from error
    subject = checkpoint_subject(folder, seed)
    now = {"weights": digest_arrays(subject.weights()), "config": digest_config(subject.config)}
    changed = tuple(name for name in digests if digests[name] != now[name])
    return Verification(not changed, passed and count > 0, changed, found)
