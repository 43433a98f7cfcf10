"""What is compared: a published variant under drawn weights, or a checkpoint."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from modelspec.checkpoints import (
    SourceError,
    match_checkpoint,
    parameter_shapes,
    probing_weights,
    read_checkpoint,
    resolve_weights,
)
from modelspec.configs import ModelConfig, get_config, get_variant, load_config
from modelspec.configs.catalog import BILINEAR, IMAGENET_MEAN, IMAGENET_STD
from modelspec.images import ImageProcessor
from parity.variants import extent, reduced


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model to compare.

    Attributes:
        name: what to call it.
        config: of the model as it is compared.
        processor: the preprocessing of its images.
        weights: makes checkpoint key -> array, the same numbers for both halves.
        weights_from: where they come from, in words.
        trained: whether they come from a checkpoint.
        extent: how much of the model is compared, in words.
        notes: sentences for the report.
    """

    name: str
    config: ModelConfig
    processor: ImageProcessor
    weights: Callable[[], dict[str, np.ndarray]]
    weights_from: str
    trained: bool
    extent: str
    notes: tuple[str, ...] = ()


def drawn_subject(name: str, seed: int, *, reduce: bool = False) -> Subject:
    """Returns a published variant under probing weights, whole or reduced.

    Raises:
        ValueError: there is no such variant; the message names similar ones.
    """
    variant = get_variant(name)
    published = get_config(name)
    config = reduced(published) if reduce else published
    return Subject(
        name=variant.name,
        config=config,
        processor=ImageProcessor(**variant.image_processor),
        weights=functools.partial(probing_weights, config, seed),
        weights_from=f"random, drawn with seed {seed}; not trained",
        trained=False,
        extent=extent(config, published),
    )


def checkpoint_subject(source: str | os.PathLike, seed: int, name: str | None = None) -> Subject:
    """Returns the model of a checkpoint; a head that the file lacks is drawn, and a note says so.

    Args:
        source: a directory with `config.json` and `model.safetensors`, a `.safetensors` file, or a Hub id.
        seed: of a drawn head.
        name: the variant that the checkpoint must be of. Its config is used where there is no `config.json`.

    Raises:
        SourceError: the checkpoint cannot be found.
        CheckpointError: the file is truncated, foreign, or does not fit its config.
        ValueError: the checkpoint is not of the variant `name`.
    """
    path = resolve_weights(source)
    config = _config(source, name)
    found = read_checkpoint(path)
    shapes = parameter_shapes(config)
    tensors, report = match_checkpoint(config, shapes, found.tensors, path)
    notes = []
    if report.missing:
        drawn = probing_weights(config, seed)
        tensors.update({key: drawn[key] for key in report.missing})
        notes.append(f"Not in the file, so drawn with seed {seed}: {_few(report.missing)}.")
    if report.unexpected:
        notes.append(f"In the file but not in the model, left out: {_few(report.unexpected)}.")
    drawn_head = any(key.split(".")[0] in config.head_keys for key in report.missing)
    return Subject(
        name=get_variant(name).name if name else _checkpoint_name(source),
        config=config,
        processor=_processor(source, config, name),
        weights=lambda: tensors,
        weights_from=f"from {path} ({found.dtype})" + (" under a random head" if drawn_head else ""),
        trained=True,
        extent="whole",
        notes=tuple(notes),
    )


def _config(source: str | os.PathLike, name: str | None) -> ModelConfig:
    if name is None:
        return load_config(source)
    published = get_config(name)
    try:
        config = load_config(source)
    except SourceError:
        return published
    if parameter_shapes(config, "Model") != parameter_shapes(published, "Model"):
        raise ValueError(f"the checkpoint {source} is no {get_variant(name).name}: its config.json describes another")
    return config


def _processor(source: str | os.PathLike, config: ModelConfig, name: str | None) -> ImageProcessor:
    try:
        return ImageProcessor.from_pretrained(source)
    except OSError:
        pass
    if name is not None:
        return ImageProcessor(**get_variant(name).image_processor)
    size = getattr(config, "image_size", 224)
    return ImageProcessor(size=size, resample=BILINEAR, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))


def _checkpoint_name(source: str | os.PathLike) -> str:
    path = Path(source).expanduser()
    if path.is_file():
        path = path.parent
    return path.resolve().name if path.is_dir() else str(source)


def _few(keys: list[str], most: int = 4) -> str:
    more = len(keys) - most
    return ", ".join(keys[:most]) + (f" and {more} more" if more > 0 else "")
