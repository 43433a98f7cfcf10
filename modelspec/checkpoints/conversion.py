"""Telling what a file holds, and rewriting it in the canonical form, without a framework."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from modelspec.checkpoints.checkpoint import Checkpoint, narrow_to_bfloat16
from modelspec.checkpoints.dialects import L2_DIALECTS
from modelspec.checkpoints.errors import CheckpointError, SourceError
from modelspec.checkpoints.identify import matching_variants, number_of_labels
from modelspec.checkpoints.keys import Shape, num_parameters, parameter_shapes
from modelspec.checkpoints.matching import LoadReport, match_checkpoint, model_key
from modelspec.checkpoints.reading import read_checkpoint
from modelspec.checkpoints.safetensors_file import RawTensor
from modelspec.checkpoints.source import resolve_weights
from modelspec.checkpoints.writing import MAX_SHARD_SIZE, write_checkpoint
from modelspec.configs.base import DTYPES, ModelConfig, load_config
from modelspec.configs.catalog import get_config, get_variant
from modelspec.images import ImageProcessor

_FAMILIES = {"nat": "nat", "dinat": "dinat", "swiftformer": "swiftformer", "vit": "vit_msn"}


@dataclasses.dataclass(frozen=True)
class Description:
    """What is in a file of weights.

    Attributes:
        path: the file, or the index of its shards.
        format: `"safetensors"`, `"torch"` or `"h5"`.
        dialect: whose names the keys are in, see `modelspec.checkpoints.dialects`.
        dtype: the floating dtype of most elements.
        architecture: `"Model"`, `"ForImageClassification"` or `"Backbone"`.
        family: the `model_type`; None where no config says it and the shapes are of no or of several families.
        variants: published variants with these shapes.
        parameters: elements of the model's parameters, without statistics.
        num_labels: of the head; None without one.
        labels: names of the classes, of `config.json`.
        missing, unexpected, mismatched: keys against the config, or else the first of `variants`; the mismatched with
            the shapes in the file and in the model.
        pretraining: names of tensors that only pretraining needs.
        sha256: whether the file carries one; it was right then.
    """

    path: str
    format: str
    dialect: str
    dtype: str
    architecture: str
    family: str | None
    variants: list[str]
    parameters: int
    num_labels: int | None
    labels: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, Shape, Shape]]
    pretraining: list[str]
    sha256: bool


def describe(source: str | os.PathLike, revision: str | None = None) -> Description:
    """Returns what is in the weights that `source` names (see `resolve_weights`).

    Raises:
        SourceError: there is none, or it cannot be reached.
        CheckpointError: the file is damaged or of no known format.
        ValueError: the `config.json` beside it is not valid.
    """
    checkpoint = read_checkpoint(resolve_weights(source, revision))
    shapes = {key: value.shape for key, value in checkpoint.tensors.items()}
    config = _stated_config(source, revision)
    variants = matching_variants(shapes, config.model_type if config else _family_by_prefix(shapes))
    families = {get_variant(name).model_type for name in variants}
    labels = list(config.id2label.values()) if config else []
    if config is None and variants:
        config = get_config(variants[0], num_labels=_labels_of(get_config(variants[0]), shapes) or 0)
        families = families if len(families) == 1 else set()
    architecture = _architecture(shapes)
    missing, unexpected, mismatched = _compare(config, architecture, shapes) if config else ([], [], [])
    return Description(
        path=checkpoint.path,
        format=checkpoint.format,
        dialect=checkpoint.dialect,
        dtype=checkpoint.dtype,
        architecture=architecture,
        family=config.model_type if config and (families or not variants) else None,
        variants=variants,
        parameters=num_parameters(shapes),
        num_labels=_labels_of(config, shapes) if config else None,
        labels=labels,
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        pretraining=sorted(checkpoint.pretraining),
        sha256="sha256" in checkpoint.metadata,
    )


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    model: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
    **overrides: Any,
) -> LoadReport:
    """Writes the checkpoint `source` into the folder `destination`, in the form that both halves and the Hub read.

    What only pretraining needs (MSN's projection head and prototypes) goes into `pretraining.safetensors`, under the
    file's names.

    Args:
        source: see `resolve_weights`.
        destination: a folder; other files in it are kept.
        model: the published variant, where there is no `config.json` and the shapes cannot tell.
        dtype: of floating tensors, `"float32"` or another; the file's by default.
        max_shard_size: see `write_checkpoint`.
        revision: branch, tag or commit of a Hub repository.
        **overrides: config fields; `kernel_size` or `image_size` resize the tables of positions, `attention_norm` is
            `"l2"` by default for SwiftFormer in the authors' or timm's names.

    Returns:
        What became of the keys.

    Raises:
        SourceError: the source cannot be found or reached.
        CheckpointError: it is damaged, of no known model, or incomplete.
        ValueError, TypeError: a bad argument or config.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)} and auto")
    checkpoint = read_checkpoint(resolve_weights(source, revision))
    shapes = {key: value.shape for key, value in checkpoint.tensors.items()}
    config, variant = _config_for(source, revision, model, checkpoint, shapes)
    if checkpoint.dialect in L2_DIALECTS and not config.states("attention_norm"):
        overrides = {"attention_norm": "l2"} | overrides
    architecture = _architecture(shapes)
    stored = {key: _stored_dtype(value, dtype, checkpoint.dtype) for key, value in checkpoint.tensors.items()}
    written = checkpoint.dtype if dtype == "auto" else dtype
    name = f"{type(config).__name__.removesuffix('Config')}{architecture}"
    config = config.replace(**overrides).replace(architectures=[name], dtype=written)
    tensors, report = match_checkpoint(
        config,
        _expected(config, architecture, shapes),
        checkpoint.tensors,
        checkpoint.path,
        resize=not {"kernel_size", "image_size"}.isdisjoint(overrides),
        dialect=checkpoint.dialect,
    )
    own = {model_key(config, key, tensors): stored[key] for key in stored}
    sizes = {key: _raw_size(value, own[key]) for key, value in tensors.items()}
    write_checkpoint(
        destination,
        config.to_json_string(),
        sizes,
        lambda key: _raw(tensors[key], own[key]),
        processor=_processor(source, revision, variant),
        pretraining={key: _raw(value, str(value.dtype)) for key, value in checkpoint.pretraining.items()},
        max_shard_size=max_shard_size,
    )
    return report


def _stated_config(source: str | os.PathLike, revision: str | None) -> ModelConfig | None:
    try:
        return load_config(source, revision=revision)
    except SourceError:
        return None


def _config_for(
    source: str | os.PathLike, revision: str | None, model: str | None, checkpoint: Checkpoint, shapes: dict[str, Shape]
) -> tuple[ModelConfig, str | None]:
    """Returns the config of what is in the file, and the name of the variant, if it is one."""
    if model is not None:
        config = get_config(model)
        return config.replace(num_labels=_labels_of(config, shapes) or 0), get_variant(model).name
    stated = _stated_config(source, revision)
    variants = matching_variants(shapes, stated.model_type if stated else _family_by_prefix(shapes))
    if stated is not None:
        return stated, variants[0] if variants else None
    if len(variants) == 1:
        config = get_config(variants[0])
        return config.replace(num_labels=_labels_of(config, shapes) or 0), variants[0]
    where = f"{checkpoint.path} has no config.json beside it"
    if variants:
        raise CheckpointError(f"{where}, and its weights may be of {', '.join(variants)}: say which one (model)")
    raise CheckpointError(f"{where}, and its weights are of no published size: write one first")


def _family_by_prefix(shapes: dict[str, Shape]) -> str | None:
    found = {family for prefix, family in _FAMILIES.items() if any(key.startswith(f"{prefix}.") for key in shapes)}
    return found.pop() if len(found) == 1 else None


def _labels_of(config: ModelConfig, shapes: dict[str, Shape]) -> int | None:
    return number_of_labels(type(config), shapes)


def _architecture(shapes: dict[str, Shape]) -> str:
    if any(key.startswith("hidden_states_norms.") for key in shapes):
        return "Backbone"
    if any(f"{head}.weight" in shapes for head in ("classifier", "head", "dist_head")):
        return "ForImageClassification"
    return "Model"


def _expected(config: ModelConfig, architecture: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return parameter_shapes(config, architecture, use_mask_token=any(key.endswith("mask_token") for key in shapes))


def _compare(
    config: ModelConfig, architecture: str, shapes: dict[str, Shape]
) -> tuple[list[str], list[str], list[tuple[str, Shape, Shape]]]:
    expected = _expected(config, architecture, shapes)
    names = {model_key(config, key, expected): key for key in shapes}
    missing = [key for key in expected if key not in names]
    unexpected = sorted(key for name, key in names.items() if name not in expected)
    mismatched = [
        (key, tuple(shapes[names[key]]), shape)
        for key, shape in expected.items()
        if key in names and tuple(shapes[names[key]]) != tuple(shape)
    ]
    return missing, unexpected, mismatched


def _stored_dtype(value: np.ndarray, wanted: str, main: str) -> str:
    """The dtype to write: as wanted, or the file's, where bfloat16 was widened for reading."""
    if value.dtype.kind != "f":
        return str(value.dtype)
    if wanted != "auto":
        return wanted
    was_narrow = main == "bfloat16" and value.dtype == np.float32 and not (value.view(np.uint32) & 0xFFFF).any()
    return "bfloat16" if was_narrow else str(value.dtype)


def _raw(value: np.ndarray, dtype: str) -> RawTensor:
    data = narrow_to_bfloat16(value.astype(np.float32)) if dtype == "bfloat16" else value.astype(dtype)
    return RawTensor(dtype, value.shape, data.tobytes())


def _raw_size(value: np.ndarray, dtype: str) -> int:
    return value.size * (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)


def _processor(source: str | os.PathLike, revision: str | None, variant: str | None) -> ImageProcessor | None:
    if Path(source).expanduser().exists():
        folder = Path(source).expanduser()
        source = folder if folder.is_dir() else folder.parent
    try:
        return ImageProcessor.from_pretrained(source, revision=revision)
    except OSError:
        return ImageProcessor(**get_variant(variant).image_processor) if variant else None
