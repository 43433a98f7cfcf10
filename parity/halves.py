"""Making a model of either half from the same config and weights, and calling it.

    build(config, weights, dtype) -> model
    tap(half, config, weights, dtype, pixel_values) -> Tap

Args:
    config: of a classifier; it is copied, since a call with labels writes into it.
    weights: checkpoint key -> array, complete.
    dtype: `"float64"` or `"float32"`, of weights and computing.
    pixel_values: (B, C, H, W) float32.

Everything runs on the CPU and in evaluation mode.
"""

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from modelspec.configs import ModelConfig
from modelspec.extras import how_to_install
from parity.quiet_import import import_tensorflow
from parity.taps import KerasTap, Tap, TorchTap

Arrays = dict[str, np.ndarray]


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
        raise ImportError(f"the {half} half needs {error.name}: {how_to_install(extra)}") from error


def build_torch(config: ModelConfig, weights: Arrays, dtype: str) -> Any:
    """Makes the PyTorch model, in evaluation mode."""
    from ptmodels.auto import model_class

    return model_class(config.model_type).from_weights(copy.deepcopy(config), weights, dtype=dtype).eval()


def build_keras(config: ModelConfig, weights: Arrays, dtype: str) -> Any:
    """Makes the Keras model."""
    import keras

    from tfmodels.auto import model_class

    with keras.device("cpu:0"):
        return model_class(config.model_type).from_weights(copy.deepcopy(config), weights, dtype=dtype)


BUILD: dict[str, Callable[[ModelConfig, Arrays, str], Any]] = {"torch": build_torch, "keras": build_keras}


def tap(half: str, config: ModelConfig, weights: Arrays, dtype: str, pixel_values: np.ndarray) -> Tap:
    """Returns a model that runs on the images when its tap does; `tap.run` takes options of the forward pass."""
    model = BUILD[half](config, weights, dtype)
    return tap_torch(model, pixel_values) if half == "torch" else tap_keras(model, pixel_values)


def tap_torch(model: Any, pixel_values: np.ndarray) -> TorchTap:
    """Taps a model of the PyTorch half."""
    import torch

    images = torch.from_numpy(pixel_values)

    def run(**options: Any) -> Any:
        options = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
        return model(pixel_values=images, **options)

    return TorchTap(model, run)


def tap_keras(model: Any, pixel_values: np.ndarray) -> KerasTap:
    """Taps a model of the Keras half."""
    import keras

    def run(**options: Any) -> Any:
        with keras.device("cpu:0"):
            return model(pixel_values=pixel_values, training=False, **options)

    return KerasTap(model, run)


def forget_models() -> None:
    """Frees what Keras keeps of models that are no longer used."""
    import keras

    keras.backend.clear_session()
    gc.collect()
