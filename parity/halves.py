"""Running one half: config, weights and pixels in, named NumPy arrays out. Both functions have one signature.

    run(config, weights, pixel_values, dtype, calls) -> [{name: array}, ...]

Args:
    config: of a classifier; it is copied, since a call with labels writes into it.
    weights: checkpoint key -> array, complete.
    pixel_values: (B, C, H, W) float32.
    dtype: `"float64"` or `"float32"`, of weights and computing.
    calls: the keyword arguments of each forward pass, e.g. `{"output_hidden_states": True}`; arrays in NumPy.

Returns:
    For each call the arrays by name: `logits`, `loss`, `hidden_states.0`, `attentions.0`, ... in `dtype`.

Everything runs on the CPU and in evaluation mode, and the model is gone when the function returns.
"""

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from modelspec.configs import ModelConfig
from parity.quiet_import import import_tensorflow

Arrays = dict[str, np.ndarray]
Run = Callable[[ModelConfig, Arrays, np.ndarray, str, Sequence[Mapping[str, Any]]], list[Arrays]]


def import_frameworks() -> None:
    """Imports both halves, TensorFlow first.

    Raises:
        ImportError: one of the frameworks is not installed; the message says how to get it.
    """
    half, extra = "Keras", "tf"
    try:
        import_tensorflow()
        import tfmodels.auto  # noqa: F401

        half, extra = "PyTorch", "torch"
        import ptmodels.auto  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"the {half} half needs {error.name}: pip install 'twinzoo[{extra}]'") from error


def run_torch(
    config: ModelConfig,
    weights: Arrays,
    pixel_values: np.ndarray,
    dtype: str,
    calls: Sequence[Mapping[str, Any]],
) -> list[Arrays]:
    """Runs the PyTorch half; see the module."""
    import torch

    from ptmodels.auto import model_class

    model = model_class(config.model_type).from_weights(copy.deepcopy(config), weights, dtype=dtype).eval()
    images = torch.from_numpy(pixel_values)
    results = []
    with torch.no_grad():
        for call in calls:
            options = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in call.items()}
            results.append(_by_name(model(pixel_values=images, **options), lambda tensor: tensor.numpy()))
    return results


def run_keras(
    config: ModelConfig,
    weights: Arrays,
    pixel_values: np.ndarray,
    dtype: str,
    calls: Sequence[Mapping[str, Any]],
) -> list[Arrays]:
    """Runs the Keras half; see the module."""
    import keras

    from tfmodels.auto import model_class

    with keras.device("cpu:0"):
        model = model_class(config.model_type).from_weights(copy.deepcopy(config), weights, dtype=dtype)
        results = [
            _by_name(model(pixel_values=pixel_values, training=False, **call), keras.ops.convert_to_numpy)
            for call in calls
        ]
    del model
    keras.backend.clear_session()
    gc.collect()
    return results


HALVES: dict[str, Run] = {"torch": run_torch, "keras": run_keras}


def _by_name(output: Mapping[str, Any], to_numpy: Callable[[Any], np.ndarray]) -> Arrays:
    arrays = {}
    for name, value in output.items():
        if isinstance(value, tuple):
            arrays.update({f"{name}.{index}": to_numpy(entry) for index, entry in enumerate(value)})
        else:
            arrays[name] = to_numpy(value)
    return arrays
