"""Weights drawn in NumPy, seeded per checkpoint key, so that both frameworks get the same numbers.

Each key has its own stream, seeded by the key's name (without the model's prefix) and the seed: a bare model and the
same model under a head draw the same body, whatever the order of the layers.
"""

import hashlib
import math

import numpy as np

from modelspec.checkpoints.keys import Shape, parameter_shapes
from modelspec.configs.base import ModelConfig


def initial_weights(config: ModelConfig, shapes: dict[str, Shape], seed: int) -> dict[str, np.ndarray]:
    """Draws the reference's initialisation for the given keys.

    Linear and convolution weights are normal with std `config.initializer_range` (SwiftFormer: 0.02, cut at +-2),
    biases 0, norms 1 and 0, tokens, positions and bias tables 0, layer scales their configured constant,
    SwiftFormer's `w_g` standard normal.

    Args:
        config: a config of one of the four families.
        shapes: key -> shape, as of `parameter_shapes`; a part of them is fine.
        seed: any non-negative integer.

    Returns:
        key -> float32 array (int64 for `num_batches_tracked`).
    """
    return {key: _initial(config, key, shape, _generator(config, key, seed)) for key, shape in shapes.items()}


def probing_weights(
    config: ModelConfig, seed: int = 0, architecture: str = "ForImageClassification", *, use_mask_token: bool = False
) -> dict[str, np.ndarray]:
    """Draws weights under which every parameter matters, for comparing implementations.

    The reference's initialisation hides errors behind zero biases, unit norms and layer scales of 1e-5. Here matrices
    are normal / sqrt(fan-in), norm weights and running variances spread around 1, layer scales lie in 0.2..1, and
    biases, running means, tokens, positions and bias tables are not zero.

    Returns:
        key -> float32 array (int64 for `num_batches_tracked`) for every key of `parameter_shapes`.
    """
    shapes = parameter_shapes(config, architecture, use_mask_token=use_mask_token)
    return {key: _probing(key, shape, _generator(config, key, seed)) for key, shape in shapes.items()}


def _generator(config: ModelConfig, key: str, seed: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; give an integer >= 0")
    name = key.removeprefix(f"{config.base_model_prefix}.")
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([int(seed), int.from_bytes(digest[:8], "little")])


def _role(key: str, shape: Shape) -> str:
    name = key.rpartition(".")[2]
    if name in ("num_batches_tracked", "running_mean", "running_var", "bias", "w_g"):
        return name
    if name.startswith("layer_scale"):
        return "layer_scale"
    if name in ("cls_token", "mask_token", "position_embeddings", "rpb"):
        return "embedding"
    return "matrix" if len(shape) > 1 else "norm"


def _initial(config: ModelConfig, key: str, shape: Shape, generator: np.random.Generator) -> np.ndarray:
    role = _role(key, shape)
    if role == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if role in ("running_mean", "bias", "embedding"):
        return np.zeros(shape, np.float32)
    if role in ("running_var", "norm"):
        return np.ones(shape, np.float32)
    if role == "layer_scale":
        # SwiftFormer's convolutional blocks start at 1, whatever the configured value
        value = 1.0 if key.endswith(".layer_scale") else config.layer_scale_init_value
        return np.full(shape, value, np.float32)
    values = generator.standard_normal(shape, np.float32)
    if role == "w_g":
        return values
    if config.model_type == "swiftformer":
        return np.clip(values * np.float32(0.02), -2.0, 2.0)
    return values * np.float32(config.initializer_range)


def _probing(key: str, shape: Shape, generator: np.random.Generator) -> np.ndarray:
    role = _role(key, shape)
    if role == "num_batches_tracked":
        return np.array(7, np.int64)
    if role == "norm":
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    if role == "running_var":
        return generator.uniform(0.5, 2.0, shape).astype(np.float32)
    if role == "layer_scale":
        return generator.uniform(0.2, 1.0, shape).astype(np.float32)
    values = generator.standard_normal(shape, np.float32)
    if role in ("bias", "running_mean"):
        return values * np.float32(0.2)
    if role == "embedding":
        return values * np.float32(0.5)
    if role == "w_g":
        return values
    return values * np.float32(1.0 / math.sqrt(math.prod(shape[1:])))
