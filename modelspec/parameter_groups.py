"""How training treats the parameters of a model, by checkpoint key: weight decay, depth, and what is frozen.

Both halves ask here, so that they agree. A parameter belongs to a stage (`"stem"`, `"stage1"`, ..., `"head"`), by which
models are frozen, and to a layer, by which learning rates decay: 0 for the stem, then one number per block, then one
for the last norm and the head. What leads from one stage to the next (downsampling) belongs to the next stage and to
its first layer.

Sources: layer-wise decay of Bao et al., BEiT, 2021 (arXiv:2106.08254), section 3; what is not decayed as in the
training code of the originals, which exempt all vectors and the bias tables.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from modelspec.checkpoints.keys import Shape
from modelspec.configs import ModelConfig

# Besides vectors (biases, norms): tables and factors that stand for none of the weights of a product.
_NOT_DECAYED = re.compile(
    r"(^|\.)(rpb|layer_scale\w*|cls_token|mask_token|position_embeddings|running_mean|running_var|num_batches_tracked)$"
)
_STEMS = re.compile(r"(patch_embed|embeddings)\.")


class Place(NamedTuple):
    """Where a parameter is: `stage` 0 is the stem, the last one the head; `layer` counts blocks, see the module."""

    stage: int
    layer: int


def stage_names(config: ModelConfig) -> list[str]:
    """Returns the stages of a model, from `"stem"` to `"head"`; every layer of ViT-MSN is one.

    >>> from modelspec.configs import SwiftFormerConfig
    >>> stage_names(SwiftFormerConfig())
    ['stem', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
    """
    return ["stem", *(f"stage{stage + 1}" for stage in range(len(_depths(config)))), "head"]


def num_layers(config: ModelConfig) -> int:
    """Returns the number of blocks."""
    return sum(_depths(config))


def has_weight_decay(key: str, shape: Shape) -> bool:
    """Whether weight decay applies to a parameter: to weights of products, not to vectors, tables, scales and tokens.

    >>> has_weight_decay("classifier.weight", (10, 64)), has_weight_decay("classifier.bias", (10,))
    (True, False)
    """
    return len(shape) > 1 and not _NOT_DECAYED.search(key)


def place_of(config: ModelConfig, key: str) -> Place:
    """Returns the stage and the layer of a parameter.

    Args:
        config: a config of one of the four families.
        key: of its checkpoint, with the base model's prefix or without.

    Raises:
        ValueError: the family has no such key.
    """
    own = key.removeprefix(f"{config.base_model_prefix}.")
    depths = _depths(config)
    if _STEMS.match(own):
        return Place(0, 0)
    if own.startswith("encoder."):
        stage, block = _block_of(config, own)
        if not (0 <= stage < len(depths) and 0 <= block < depths[stage]):
            raise ValueError(f"{key!r} is no parameter of this {config.model_type}, whose stages have {depths} blocks")
        return Place(stage + 1, sum(depths[:stage]) + block + 1)
    if re.match(r"(layernorm|norm|head|dist_head|classifier|hidden_states_norms)\.", own):
        return Place(len(depths) + 1, sum(depths) + 1)
    raise ValueError(f"{key!r} is no parameter of a {config.model_type}")


def learning_rate_scale(config: ModelConfig, key: str, layer_decay: float) -> float:
    """Returns the factor on a parameter's learning rate: `layer_decay` once for every layer above its own.

    Raises:
        ValueError: `layer_decay` is not above 0 and at most 1; the key is unknown.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay!r}; it must be above 0 and at most 1")
    return layer_decay ** (num_layers(config) + 1 - place_of(config, key).layer)


def frozen_keys(config: ModelConfig, keys: Iterable[str], upto: str) -> set[str]:
    """Returns those of a model's keys that belong to a stage up to and with `upto`.

    Args:
        keys: of the model's checkpoint.
        upto: one of `stage_names(config)`.

    Raises:
        ValueError: there is no such stage; a key is unknown.
    """
    names = stage_names(config)
    if upto not in names:
        raise ValueError(f"upto is {upto!r}; the stages are {', '.join(names)}")
    return {key for key in keys if place_of(config, key).stage <= names.index(upto)}


def _depths(config: ModelConfig) -> list[int]:
    return [1] * config.num_hidden_layers if config.model_type == "vit_msn" else list(config.depths)


def _block_of(config: ModelConfig, key: str) -> tuple[int, int]:
    """Stage and block, from 0, of a key that begins with `encoder.`; downsampling is the next stage's first block."""
    numbers = [int(part) for part in key.split(".") if part.isdecimal()]
    if len(numbers) < (2 if ".blocks." in key or ".layers." in key else 1):
        return -1, -1
    if config.model_type == "vit_msn":
        return numbers[0], 0
    if config.model_type == "swiftformer":
        stages = []  # of each entry of `network`
        for stage in range(len(config.depths)):
            stages += [stage, stage + 1] if config.has_downsampling(stage) else [stage]
        stage = stages[numbers[0]] if numbers[0] < len(stages) else -1
        return (stage, numbers[1]) if ".blocks." in key else (stage, 0)
    return (numbers[0], numbers[1]) if ".layers." in key else (numbers[0] + 1, 0)
