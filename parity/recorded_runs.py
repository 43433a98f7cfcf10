"""Runs kept in files, so that another machine, another version or another framework can be compared later.

A run is an `.npz` of arrays: `pixel_values` and what a model gave for them (`logits`, `model.hidden_states.0`, ...),
with a prefix for each case where there are several. `about`, a JSON text, says which model and weights they are of.
"""

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.atomic_file import atomic_file
from parity.errors import ComparisonError

Arrays = dict[str, np.ndarray]
KINDS = ("logits", "hidden_states", "attentions")
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """What a model gave on some images.

    Attributes:
        path: the file.
        cases: name ("" if there is only one) -> (pixel_values (B, C, H, W), the arrays by name).
        about: `model`, `sha256` of the weights, `dtype`, `versions`; empty if the file does not say.
    """

    path: str
    cases: dict[str, tuple[np.ndarray, Arrays]]
    about: dict[str, Any]


def write_run(path: str | os.PathLike, pixel_values: np.ndarray, outputs: Arrays, about: dict[str, Any]) -> None:
    """Writes a run, atomically.

    Args:
        path: the file.
        pixel_values: (B, C, H, W).
        outputs: what the model gave, by name.
        about: `model`, `sha256`, `dtype`, `versions`.
    """
    arrays = {"pixel_values": pixel_values, "about": np.array(json.dumps({"format": _FORMAT, **about}))}
    for name, array in outputs.items():
        if name.partition(".")[0] in KINDS:
            arrays[name if name == "logits" else f"model.{name}"] = array
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # an array could be named `allow_pickle`; ours are not


def read_run(path: str | os.PathLike) -> RecordedRun:
    """Reads a run.

    Raises:
        ValueError: the file cannot be read, is no such file, or holds nothing to compare.
    """
    try:
        with open(Path(path).expanduser(), "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
            about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a recorded run (.npz): {error}") from error
    if not isinstance(about, dict) or about.get("format", _FORMAT) != _FORMAT:
        raise ValueError(f"{path} is a recorded run of another format; this version reads format {_FORMAT}")
    cases = {}
    for name in arrays:
        prefix = name.removesuffix("pixel_values")
        if prefix == name or (prefix and not prefix.endswith(".")):
            continue
        found = {}
        for key, array in arrays.items():
            short = key.removeprefix(prefix).removeprefix("model.")
            if key.startswith(prefix) and short.partition(".")[0] in KINDS:
                found[short] = array
        if found:
            cases[prefix.removesuffix(".")] = arrays[name], found
    if not cases:
        raise ValueError(f"{path} holds no pixel_values with {', '.join(KINDS)}, so there is nothing to compare")
    return RecordedRun(os.fspath(path), cases, about)


def require_same_weights(run: RecordedRun, model: str, sha256: str) -> list[str]:
    """Returns notes on where a run comes from.

    Raises:
        ComparisonError: it was made with other weights.
    """
    if "sha256" not in run.about:
        return [f"{run.path} does not say which weights it was made with."]
    if run.about["sha256"] != sha256:
        raise ComparisonError(f"{run.path} was made with other weights (of {run.about.get('model')}) than {model}'s")
    versions = ", ".join(f"{name} {version}" for name, version in run.about.get("versions", {}).items())
    return [f"The reference is {run.path}, made with {versions}."]
