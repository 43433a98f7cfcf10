"""Which published variant a file's keys and shapes are of."""

import numpy as np

from modelspec.checkpoints.errors import CheckpointError
from modelspec.checkpoints.keys import Shape, parameter_shapes
from modelspec.configs.base import ModelConfig
from modelspec.configs.catalog import get_config, list_models

_PREFIXES = ("nat.", "dinat.", "swiftformer.", "vit.")
_ENCODERS = ("embeddings.", "encoder.", "patch_embed.")
_OPTIONAL = ("num_batches_tracked", "mask_token")


def matching_variants(shapes: dict[str, Shape], model_type: str | None = None) -> list[str]:
    """Returns the names of the variants whose encoder has the keys and shapes of `shapes`.

    There may be several: NAT and DiNAT have the same, and dilations leave no trace in the weights. Heads are not
    looked at.

    Args:
        shapes: key -> shape, under the reference's names, with or without a prefix.
        model_type: look among the variants of this family only.
    """
    found = _encoder(shapes)
    variants = {name: get_config(name) for name in list_models()}
    return [
        name
        for name, config in variants.items()
        if model_type in (None, config.model_type) and _encoder(parameter_shapes(config, "Model")) == found
    ]


def infer_config(config_class: type[ModelConfig], tensors: dict[str, np.ndarray], path: str) -> ModelConfig:
    """Returns the config of the one variant of a family that a file without `config.json` is of.

    The number of labels is the head's in the file, and 2 where it has none.

    Raises:
        CheckpointError: it is of no variant or of several; the message names them.
    """
    shapes = {key: value.shape for key, value in tensors.items()}
    names = matching_variants(shapes, config_class.model_type)
    if len(names) != 1:
        if names:
            found = f"of {' or '.join(names)}, which weights cannot tell apart; pass config=get_config({names[0]!r})"
        else:
            found = "of no published size; pass config="
        raise CheckpointError(f"{path} has no config.json beside it, and its weights are {found}")
    return get_config(names[0], num_labels=number_of_labels(config_class, shapes) or 2)


def number_of_labels(config_class: type[ModelConfig], shapes: dict[str, Shape]) -> int | None:
    """Returns how many labels the head in a file has; None without a head."""
    heads = [shapes[f"{key}.weight"] for key in config_class.num_labels_keys if f"{key}.weight" in shapes]
    return heads[0][0] if heads and len(heads[0]) == 2 else None


def _encoder(shapes: dict[str, Shape]) -> dict[str, Shape]:
    bare = {}
    for key, shape in shapes.items():
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        if key.startswith(_ENCODERS) and key.rpartition(".")[2] not in _OPTIONAL:
            bare[key] = tuple(shape)
    return bare
