"""Steps of training in both halves, from the same weights, on the same images, with the same samples dropped.

Everything is float64, dropout is off, and stochastic depth drops what a common generator says. The optimizers are the
frameworks' own. Two differences between them are taken out: Keras keeps numbers such as the learning rate in its
default float, so that is float64 here and the numbers are such that float32 holds them; and Keras adds Adam's epsilon
before the correction of the bias, torch after it, so torch gets an epsilon of its own for each step.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from modelspec.agreement import FLOAT64_BOUND, Agreement, compare_all
from modelspec.configs import ModelConfig
from parity import halves
from parity.gradients import compare_gradients
from parity.halves import Arrays

OPTIMIZERS = ("sgd", "adam", "adamw")
STEPS = 10
LEARNING_RATE, MOMENTUM, BETA_1, BETA_2 = 2.0**-12, 0.875, 0.875, 1 - 2.0**-10
EPSILON, WEIGHT_DECAY = 2.0**-20, 2.0**-4
BATCH = 4

Steps = Iterator[dict[str, Arrays]]


def training_batch(pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns four images (B, C, H, W) made of one by mirroring it and turning its channels, and labels (B,)."""
    image = pixel_values[0].astype(np.float64)
    batch = [image, image[:, :, ::-1], image[::-1, ::-1], np.roll(image, 1, axis=0)[:, ::-1, ::-1]]
    return np.ascontiguousarray(np.stack(batch)), np.arange(BATCH) % 2


def without_dropout(config: ModelConfig) -> ModelConfig:
    """Returns the config with stochastic depth, and no other dropping."""
    rates = {name: 0.0 for name in vars(config) if name.endswith("dropout_prob") or name.startswith("drop_")}
    if "drop_path_rate" in rates:
        rates["drop_path_rate"] = 0.25
    return config.replace(**rates)


def torch_steps(
    config: ModelConfig, weights: Arrays, images: np.ndarray, labels: np.ndarray, optimizer: str, options: Mapping
) -> Steps:
    """Yields, after each step, `loss`, `parameters` (and buffers), `first_moments` and `second_moments`, by key."""
    import torch

    from ptmodels.layers import DropPath

    model = halves.BUILD["torch"](config, weights, "float64").train()
    names = dict(model.named_parameters())
    steps: torch.optim.Optimizer
    if optimizer == "sgd":
        steps = torch.optim.SGD(names.values(), LEARNING_RATE, momentum=MOMENTUM)
    else:
        adam = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
        decay: dict[str, Any] = {"weight_decay": WEIGHT_DECAY} if optimizer == "adamw" else {}
        steps = adam(names.values(), LEARNING_RATE, betas=(BETA_1, BETA_2), eps=EPSILON, **decay)
    inputs = torch.from_numpy(images), torch.from_numpy(labels)
    masks = _masks()

    def draw_mask(self: Any, x: Any) -> Any:
        return torch.from_numpy(next(masks)(self.rate, x.ndim))

    with _patched(DropPath, draw_mask):
        for step in range(1, STEPS + 1):
            loss = model(pixel_values=inputs[0], labels=inputs[1], **options).loss
            steps.zero_grad()
            loss.backward()
            if optimizer != "sgd":
                for group in steps.param_groups:
                    group["eps"] = EPSILON / (1 - BETA_2**step) ** 0.5
            steps.step()
            state = {key: steps.state[parameter] for key, parameter in names.items()}
            found = {
                "loss": {"loss": loss.detach().numpy()},
                "parameters": {key: value.detach().numpy().copy() for key, value in model.state_dict().items()},
            }
            places = {"first_moments": "momentum_buffer" if optimizer == "sgd" else "exp_avg"}
            if optimizer != "sgd":
                places["second_moments"] = "exp_avg_sq"
            for kind, place in places.items():
                found[kind] = {key: entry[place].numpy().copy() for key, entry in state.items()}
            yield found


def keras_steps(
    config: ModelConfig, weights: Arrays, images: np.ndarray, labels: np.ndarray, optimizer: str, options: Mapping
) -> Steps:
    """Yields what `torch_steps` does."""
    import keras
    import tensorflow as tf

    from tfmodels.layers import DropPath
    from tfmodels.weights import checkpoint_variables, read_weights

    masks = _masks()

    def draw_mask(self: Any, x: Any) -> Any:
        return tf.constant(next(masks)(self.rate, len(x.shape)))

    with _float64_keras(), _patched(DropPath, draw_mask), keras.device("cpu:0"):
        model = halves.BUILD["keras"](config, weights, "float64")
        entries = {key: entry for key, entry in checkpoint_variables(model).items() if entry.variable.trainable}
        variables = [entry.variable for entry in entries.values()]
        if optimizer == "sgd":
            steps = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
        else:
            kind = keras.optimizers.AdamW if optimizer == "adamw" else keras.optimizers.Adam
            decay = {"weight_decay": WEIGHT_DECAY} if optimizer == "adamw" else {}
            steps = kind(LEARNING_RATE, beta_1=BETA_1, beta_2=BETA_2, epsilon=EPSILON, **decay)
        steps.build(variables)
        for _ in range(STEPS):
            with tf.GradientTape() as tape:
                loss = model(pixel_values=images, labels=labels, training=True, **options).loss
            steps.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
            found = {"loss": {"loss": keras.ops.convert_to_numpy(loss)}, "parameters": read_weights(model)}
            if optimizer == "sgd":  # Keras' momentum is torch's times minus the learning rate
                moments = {"first_moments": (steps.momentums, -LEARNING_RATE)}
            else:
                moments = {"first_moments": (steps._momentums, 1.0), "second_moments": (steps._velocities, 1.0)}
            for kind, (values, factor) in moments.items():
                found[kind] = {
                    key: entry.to_checkpoint(keras.ops.convert_to_numpy(value) / factor)
                    for (key, entry), value in zip(entries.items(), values, strict=True)
                }
            yield found


def compare_steps(
    config: ModelConfig, weights: Arrays, images: np.ndarray, labels: np.ndarray, optimizer: str, options: Mapping
) -> dict[str, dict[str, Agreement]]:
    """Trains both halves side by side; returns, by kind and key, how they agreed after the step where it was worst."""
    arguments = (config, weights, images, labels, optimizer, options)
    worst: dict[str, dict[str, Agreement]] = {}
    for reference, actual in zip(torch_steps(*arguments), keras_steps(*arguments), strict=True):
        for kind, arrays in reference.items():
            known = worst.setdefault(kind, {})
            if kind.endswith("moments"):
                agreements = compare_gradients(config, actual[kind], arrays, "float64", training=True)
            else:
                agreements = compare_all(actual[kind], arrays, FLOAT64_BOUND)
            for key, agreement in agreements.items():
                if key not in known or not agreement.max_rel <= known[key].max_rel:
                    known[key] = agreement
    return worst


def _mask(draw: np.ndarray, rate: float, axes: int) -> np.ndarray:
    return (draw >= rate).astype(np.float64).reshape((BATCH,) + (1,) * (axes - 1))


def _masks() -> Iterator[Callable[[float, int], np.ndarray]]:
    """Yields functions that draw a mask for a rate and a number of axes: the same ones for both halves."""
    generator = np.random.default_rng(0)
    while True:
        draw = generator.random(BATCH)
        yield functools.partial(_mask, draw)


@contextlib.contextmanager
def _patched(layer: Any, draw_mask: Callable) -> Iterator[None]:
    original = layer.draw_mask
    layer.draw_mask = draw_mask
    try:
        yield
    finally:
        layer.draw_mask = original


@contextlib.contextmanager
def _float64_keras() -> Iterator[None]:
    import keras

    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
