"""Fitting what a file holds to what a model needs, by name and shape."""

import dataclasses
import warnings
from collections.abc import Container, Mapping

import numpy as np

from modelspec.checkpoints.errors import CheckpointError, CheckpointWarning
from modelspec.checkpoints.keys import Shape
from modelspec.checkpoints.resizing import resized
from modelspec.configs.base import ModelConfig

# A file may lack these and still be whole: the counter was added to BatchNorm late and counts nothing that inference
# needs, and published ViT-MSN files hold no mask token.
_OPTIONAL = ("num_batches_tracked", "mask_token")


@dataclasses.dataclass
class LoadReport:
    """What became of a checkpoint's keys; names are the model's, but for `unexpected`, which are the file's.

    Attributes:
        missing: the model has them, the file does not: newly initialised.
        unexpected: the file has them, the model does not: left out.
        mismatched: (key, shape in the file, shape in the model): skipped and newly initialised.
        resized: likewise: interpolated, as asked for.
        dialect: whose names the file's keys were in, see `modelspec.checkpoints.dialects`.
    """

    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[tuple[str, Shape, Shape]] = dataclasses.field(default_factory=list)
    resized: list[tuple[str, Shape, Shape]] = dataclasses.field(default_factory=list)
    dialect: str = "transformers"

    @property
    def newly_initialised(self) -> list[str]:
        """The model's keys that the file did not fill."""
        return self.missing + [key for key, _, _ in self.mismatched]

    def warn(self, path: str) -> None:
        """Gives one `CheckpointWarning` that names what was skipped or newly initialised, if anything was."""
        parts = []
        if self.mismatched:
            skipped = ", ".join(f"{key} {found} (the model has {needed})" for key, found, needed in self.mismatched)
            parts.append(f"skipped for their shape and newly initialised: {skipped}")
        if self.missing:
            parts.append(f"not in the file and newly initialised: {', '.join(self.missing)}")
        if self.unexpected:
            parts.append(f"in the file but not in the model, left out: {', '.join(self.unexpected)}")
        if parts:
            warnings.warn(f"{path}: {'; '.join(parts)}", CheckpointWarning, stacklevel=3)


def match_checkpoint(
    config: ModelConfig,
    expected: Mapping[str, Shape],
    found: dict[str, np.ndarray],
    path: str,
    *,
    replace_head: bool = False,
    resize: bool = False,
    dialect: str = "transformers",
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Returns the arrays that fill the model's keys, and the report of those that do not fit.

    A file with a head loads into a bare model (the prefix is stripped) and a bare file into a model with a head (the
    prefix is added). A head that is missing is reported; a body that is incomplete is an error.

    Args:
        config: the model's config; its prefix and head keys decide what is body and what is head.
        expected: the model's key -> shape.
        found: the file's key -> array.
        path: the file, for messages.
        replace_head: accept a head of another number of labels, and skip it.
        resize: interpolate tables of positions of another window or image size.
        dialect: for the report.

    Raises:
        CheckpointError: the file is of another model, lacks a part of the body, or has a key of another shape or kind.
    """
    report = LoadReport(dialect=dialect)
    renamed: dict[str, str] = {}
    tensors, errors, absent = {}, [], []
    for key in found:
        name = model_key(config, key, expected)
        if name in renamed:
            errors.append(f"{renamed[name]} and {key} are both {name}")
        renamed[name] = key
    for key, shape in expected.items():
        is_head = key.split(".")[0] in config.head_keys
        if key not in renamed:
            report.missing.append(key)
            if not is_head and key.rpartition(".")[2] not in _OPTIONAL:
                absent.append(key)
            continue
        value = found[renamed[key]]
        table = resized(key, value, shape) if resize and value.shape != shape else None
        if table is not None:
            report.resized.append((key, value.shape, shape))
            value = table
        if value.shape != shape:
            if replace_head and key.split(".")[0] in config.num_labels_keys:
                report.mismatched.append((key, value.shape, shape))
            else:
                errors.append(f"{renamed[key]} has shape {value.shape}, the model needs {shape}")
            continue
        wanted = "integers" if key.endswith("num_batches_tracked") else "floating-point numbers"
        if (value.dtype.kind in "iu") != (wanted == "integers") or value.dtype.kind not in "iuf":
            errors.append(f"{renamed[key]} has dtype {value.dtype}, the model needs {wanted}")
            continue
        tensors[key] = value
    report.unexpected = sorted(key for name, key in renamed.items() if name not in expected)
    if absent and not any(key.split(".")[0] not in config.head_keys for key in tensors):
        raise CheckpointError(
            f"{path} is no {config.model_type} checkpoint: it has none of the model's body, "
            f"but {_listed(sorted(found)) or 'no keys'}"
        )
    if absent:
        errors.insert(0, f"it lacks {_listed(absent)}")
    if errors:
        raise CheckpointError(f"{path} does not fit this {config.model_type} config: {_listed(errors, '; ')}")
    return tensors, report


def model_key(config: ModelConfig, key: str, expected: Container[str]) -> str:
    """Returns the model's name of the file's `key`: with the base prefix added, without it, or as it is.

    Each key for itself: transformers 5 writes ViT-MSN classifiers with the prefix on some keys of the body only.
    """
    prefix = f"{config.base_model_prefix}."
    for name in (key, prefix + key, key.removeprefix(prefix)):
        if name in expected:
            return name
    return key


def _listed(names: list[str], separator: str = ", ", most: int = 10) -> str:
    more = len(names) - most
    return separator.join(names[:most]) + (f"{separator}and {more} more" if more > 0 else "")
