"""The Keras layers compute what torch's do, in float64."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ptmodels.layers
import tfmodels.layers
from tfmodels.interpolation import resize_bicubic

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def float64():
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(previous)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def assert_same(keras_value, torch_value, atol=1e-13):
    value = torch_value.detach().numpy()
    np.testing.assert_allclose(np.asarray(keras_value), value, rtol=1e-13, atol=atol)


@pytest.mark.parametrize("name", tfmodels.layers.ACTIVATIONS)
def test_activations(name):
    x = np.concatenate([np.linspace(-30, 30, 4001), drawn(1000)])
    ours = tfmodels.layers.get_activation(name)(tf.constant(x))
    assert_same(ours, ptmodels.layers.get_activation(name)(torch.from_numpy(x)))


def test_an_activation_may_be_a_function():
    assert tfmodels.layers.get_activation(abs) is ptmodels.layers.get_activation(abs) is abs


@settings(max_examples=20)
@given(
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    kernel_size=st.integers(1, 4),
    strides=st.integers(1, 3),
    padding=st.integers(0, 2),
)
def test_convolutions_pad_as_torch_does(height, width, kernel_size, strides, padding):
    kernel_size = min(kernel_size, height + 2 * padding, width + 2 * padding)
    ours = tfmodels.layers.Conv2D(2, 3, kernel_size, strides=strides, padding=padding)
    theirs = nn.Conv2d(2, 3, kernel_size, stride=strides, padding=padding).double()
    ours.kernel.assign(theirs.weight.detach().numpy().transpose(2, 3, 1, 0))
    ours.bias.assign(theirs.bias.detach().numpy())
    x = drawn(2, height, width, 2)
    assert_same(np.moveaxis(np.asarray(ours(x)), -1, 1), theirs(channels_first(x)))


def test_depthwise_convolution():
    ours = tfmodels.layers.DepthwiseConv2D(5, 3, padding=1)
    theirs = nn.Conv2d(5, 5, 3, padding=1, groups=5).double()
    ours.kernel.assign(theirs.weight.detach().numpy().transpose(2, 3, 0, 1))
    ours.bias.assign(theirs.bias.detach().numpy())
    x = drawn(2, 7, 6, 5)
    assert_same(np.moveaxis(np.asarray(ours(x)), -1, 1), theirs(channels_first(x)))


def batch_norms():
    ours, theirs = tfmodels.layers.BatchNormalization(4, epsilon=1e-3), nn.BatchNorm2d(4, eps=1e-3).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(drawn(4)))
        theirs.bias.copy_(torch.from_numpy(drawn(4, seed=1)))
    ours.gamma.assign(theirs.weight.detach().numpy())
    ours.beta.assign(theirs.bias.detach().numpy())
    return ours, theirs


def assert_same_statistics(ours, theirs):
    assert_same(ours.moving_mean, theirs.running_mean)
    assert_same(ours.moving_variance, theirs.running_var)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked)


@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
def test_batch_normalization_follows_the_statistics_of_torch(jit_compile):
    ours, theirs = batch_norms()

    def call(x):
        return ours(x, training=True)

    run = call if jit_compile is None else tf.function(call, jit_compile=jit_compile)
    for step in range(3):
        x = 3 * drawn(2, 3, 2, 4, seed=step) + 1  # twelve elements per channel: biased and unbiased differ by 9 %
        assert_same(np.moveaxis(np.asarray(run(tf.constant(x))), -1, 1), theirs(channels_first(x)))
        assert_same_statistics(ours, theirs)
    x = drawn(2, 3, 2, 4, seed=9)
    assert_same(np.moveaxis(np.asarray(ours(x, training=False)), -1, 1), theirs.eval()(channels_first(x)))


def test_derivatives_flow_through_the_statistics_of_the_batch():
    ours, theirs = batch_norms()
    x, weights, direction = (drawn(2, 3, 2, 4, seed=seed) for seed in (0, 5, 6))
    inputs, tensor = tf.constant(x), channels_first(x).requires_grad_()
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            loss = tf.reduce_sum(ours(inputs, training=True) * weights)
        first = inner.gradient(loss, [inputs, ours.gamma.value])
        total = tf.reduce_sum(first[0] * direction) + tf.reduce_sum(tf.square(first[1]))
    wanted = torch.autograd.grad(
        (theirs(tensor) * channels_first(weights)).sum(), [tensor, theirs.weight], create_graph=True
    )
    wanted_total = (wanted[0] * channels_first(direction)).sum() + wanted[1].square().sum()
    assert_same(np.moveaxis(first[0].numpy(), -1, 1), wanted[0])
    assert_same(first[1], wanted[1])
    second = outer.gradient(total, inputs).numpy()
    assert_same(np.moveaxis(second, -1, 1), torch.autograd.grad(wanted_total, tensor)[0], atol=1e-12)


def test_frozen_batch_normalization_stays_in_inference():
    ours, theirs = batch_norms()
    ours.trainable = False
    x = drawn(2, 3, 2, 4)
    assert_same(np.moveaxis(np.asarray(ours(x, training=True)), -1, 1), theirs.eval()(channels_first(x)))
    assert_same_statistics(ours, theirs)


def test_one_element_per_channel_gives_no_nan():
    ours, _ = batch_norms()
    assert np.isfinite(np.asarray(ours(drawn(1, 1, 1, 4), training=True))).all()
    assert np.isfinite(np.asarray(ours.moving_variance)).all()


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_keeps_float32_statistics(dtype):
    keras.config.set_dtype_policy(dtype)
    ours = tfmodels.layers.BatchNormalization(4, epsilon=1e-5)
    theirs = nn.BatchNorm2d(4)
    x = np.float32(drawn(8, 5, 5, 4) + 2)
    output = ours(tf.cast(x, ours.compute_dtype), training=True)
    reference = theirs(channels_first(x))
    assert output.dtype == ours.compute_dtype and ours.moving_mean.dtype == "float32"
    np.testing.assert_allclose(np.moveaxis(np.float32(output), -1, 1), reference.detach(), atol=0.05)
    np.testing.assert_allclose(ours.moving_variance, theirs.running_var, rtol=0.02)


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 3, 5, 7), (None, 5, 7), (None, None, None, 7), (2, 7)])
def test_dense_lets_tensorflow_add_the_bias_within_the_product(shape):
    layer = tfmodels.layers.Dense(7, 4)
    layer.kernel.assign(np.random.default_rng(0).standard_normal((7, 4)))
    layer.bias.assign(np.arange(4))
    call = tf.function(layer, input_signature=[tf.TensorSpec(shape, tf.float32)])
    operations = call.get_concrete_function().graph.get_operations()
    (bias_add,) = (operation for operation in operations if operation.type == "BiasAdd")
    assert bias_add.inputs[0].op.type == "MatMul"  # with nothing between, what grappler fuses
    x = np.random.default_rng(1).standard_normal([size or 3 for size in shape], np.float32)
    y = call(tf.constant(x)).numpy()
    assert y.shape == (*x.shape[:-1], 4)
    np.testing.assert_allclose(y, x @ layer.kernel.numpy() + layer.bias.numpy(), rtol=1e-5, atol=1e-5)
    assert layer.compute_output_shape(shape) == (*shape[:-1], 4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (tfmodels.layers.Dense(7, 4), (2, 5, 7)),
        (tfmodels.layers.Dense(7, 4), (None, None, None, 7)),
        (tfmodels.layers.Conv2D(7, 4, kernel_size=1), (2, 3, 5, 7)),
        (tfmodels.layers.Conv2D(7, 4, kernel_size=1), (None, None, None, 7)),
    ],
)
def test_gelu_follows_the_bias_with_nothing_between(layer, shape):
    layer.set_weights([np.random.default_rng(0).standard_normal(each.shape) for each in layer.weights])
    gelu = tfmodels.layers.get_activation("gelu")
    call = tf.function(lambda x: gelu(layer(x)), input_signature=[tf.TensorSpec(shape, tf.float32)])
    (erf,) = (each for each in call.get_concrete_function().graph.get_operations() if each.type == "Erf")
    bias_add = erf.inputs[0].op.inputs[0].op  # erf's argument is that times a constant
    assert bias_add.type == "BiasAdd"
    (reshape,) = (each for each in bias_add.outputs[0].consumers() if each.type == "Reshape")
    assert not reshape.outputs[0].consumers()  # else what comes before GELU were wanted too
    x = np.random.default_rng(1).standard_normal([size or 3 for size in shape], np.float32)
    kernel, bias = layer.get_weights()
    wanted = nn.functional.gelu(torch.from_numpy(x @ kernel.reshape(7, 4) + bias))
    np.testing.assert_allclose(call(tf.constant(x)), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gelu(layer(x)), wanted, rtol=1e-5, atol=1e-5)


def test_layer_normalization():
    ours, theirs = tfmodels.layers.LayerNormalization(6, epsilon=1e-6), nn.LayerNorm(6, eps=1e-6).double()
    x = 1e-3 * drawn(2, 5, 6)  # so small that the epsilon shows
    assert_same(ours(x), theirs(torch.from_numpy(x)))


def derivatives_of_layer_normalization(layer, x, grad, direction, training):
    """First derivatives, and those of a function of them."""
    with tf.GradientTape() as outer:
        outer.watch((x, grad))
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = layer(x, training=training)
        first = inner.gradient(y, [x, *layer.trainable_variables], grad)
        total = tf.reduce_sum(first[0] * direction) + sum(tf.reduce_sum(tf.square(each)) for each in first[1:])
    return y, *first, *outer.gradient(total, [x, grad, layer.trainable_variables[0]])


@pytest.mark.parametrize("shape", [(2, 5, 6), (4, 6), (2, 3, 2, 6)])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_derivatives_of_layer_normalization(shape, known, jit_compile, training):
    ours, theirs = tfmodels.layers.LayerNormalization(6, epsilon=1e-3), nn.LayerNorm(6, eps=1e-3).double()
    for seed, (variable, parameter) in enumerate(zip(ours.weights, theirs.parameters(), strict=True), start=1):
        variable.assign(drawn(6, seed=seed))
        parameter.data = torch.from_numpy(drawn(6, seed=seed))
    x, grad, direction = (drawn(*shape, seed=seed) for seed in (3, 4, 5))
    x *= 0.1

    def call(*inputs):
        return derivatives_of_layer_normalization(ours, *inputs, training)

    if jit_compile is not None:
        signature = [tf.TensorSpec(shape if known else [None] * (len(shape) - 1) + [6], tf.float64)] * 3
        call = tf.function(call, input_signature=signature, jit_compile=jit_compile)
    inputs, grads = (torch.from_numpy(each).requires_grad_() for each in (x, grad))
    y = theirs(inputs)
    first = torch.autograd.grad(y, [inputs, *theirs.parameters()], grads, create_graph=True)
    total = (first[0] * torch.from_numpy(direction)).sum() + sum(each.square().sum() for each in first[1:])
    wanted = y, *first, *torch.autograd.grad(total, [inputs, grads, theirs.weight])
    for value, other in zip(call(*map(tf.constant, (x, grad, direction))), wanted, strict=True):
        np.testing.assert_allclose(value, other.detach(), rtol=1e-12, atol=1e-11)


def test_gradients_of_layer_normalization_in_training_are_its_own():
    layer = tfmodels.layers.LayerNormalization(6, epsilon=1e-6)

    def operations(training):
        @tf.function
        def gradients(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=training)
            return tape.gradient(y, x)

        concrete = gradients.get_concrete_function(tf.TensorSpec((2, 5, 6), tf.float64))
        return {operation.type for operation in concrete.graph.get_operations()}

    assert "MatMul" in operations(training=True) and "Tile" not in operations(training=True)
    assert "MatMul" not in operations(training=False)


def test_layer_normalization_in_training_keeps_half_types_and_no_samples():
    for dtype in ("mixed_float16", "mixed_bfloat16", "float32", "float64"):
        keras.config.set_dtype_policy(dtype)
        layer = tfmodels.layers.LayerNormalization(6, epsilon=1e-6)
        x = tf.cast(drawn(2, 5, 6) + 3.0, layer.compute_dtype)
        y = layer(x, training=True)
        assert y.dtype == x.dtype
        tolerance = 1e-13 if dtype == "float64" else 1e-5 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(tf.cast(y, "float64"), tf.cast(layer(x), "float64"), rtol=tolerance, atol=tolerance)
        assert layer(x[:0], training=True).shape == (0, 5, 6)


LARGE = """
import numpy as np, platform, sys, tensorflow as tf, torch
from benchmarks.profiles import profile_keras
from tfmodels.layers import LayerNormalization
known, onednn = eval(sys.argv[1]), sys.argv[2] == "1"
shape = [size or 2 for size in known]
layer = LayerNormalization(shape[-1], epsilon=1e-6)
theirs = torch.nn.LayerNorm(shape[-1], eps=1e-6).double()
generator = np.random.default_rng(0)
for ours, parameter in zip(layer.weights, theirs.parameters(), strict=True):
    values = generator.standard_normal(shape[-1]).astype(np.float32)
    ours.assign(values)
    parameter.data = torch.from_numpy(values.astype(float))
x, grad = (generator.standard_normal(shape).astype(np.float32) + 1 for _ in range(2))

@tf.function(input_signature=[tf.TensorSpec(known)])
def normalized(x):
    return layer(2.0 * x)

@tf.function(input_signature=[tf.TensorSpec(known)] * 2)
def gradients(x, grad):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(2.0 * x)
    return tape.gradient(y, [x, *layer.trainable_variables], grad)

inputs = torch.from_numpy(x.astype(float)).requires_grad_()
wanted = theirs(2.0 * inputs)
wanted_gradients = torch.autograd.grad(wanted, [inputs, *theirs.parameters()], torch.from_numpy(grad.astype(float)))
ours, ours_gradients = normalized(x), gradients(x, grad)
for value, other in zip([ours, *ours_gradients], [wanted, *wanted_gradients], strict=True):
    other = other.detach().numpy()
    error = np.abs(value - other).max() / np.sqrt(np.mean(np.square(other)))
    assert error < 1e-5, error
x[(0,) * (x.ndim - 1)] = np.nan
assert np.isnan(normalized(x)).any(-1).sum() == 1 and np.isnan(normalized(x)).sum() == shape[-1]
names = profile_keras(lambda: normalized(x))
if onednn and platform.machine() == "x86_64":
    assert "MklLayerNorm" in names and "Mean" not in names, names
"""


@pytest.mark.parametrize("onednn", ["1", "0"])
@pytest.mark.parametrize("known", ["[3, 14, 14, 256]", "[None, 56, 56, 64]", "[520, 200]"])
def test_large_layer_normalization_of_a_graph_is_one_operation(known, onednn):
    """With and without what fuses it; in a process of its own, as TensorFlow decides at its start."""
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": onednn}
    command = [sys.executable, "-c", LARGE, known, onednn]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e-13, 0.0])
@pytest.mark.parametrize("axis", [1, -1])
def test_l2_normalize_floors_the_norm(axis, scale):
    x = scale * drawn(2, 4, 3)
    assert_same(
        tfmodels.layers.l2_normalize(tf.constant(x), axis), nn.functional.normalize(torch.from_numpy(x), dim=axis)
    )


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    x = np.ones((4000, 3, 2))
    ours, theirs = tfmodels.layers.DropPath(0.25), ptmodels.layers.DropPath(0.25)
    for output in (np.asarray(ours(x, training=True)), theirs.train()(torch.from_numpy(x)).numpy()):
        assert set(np.unique(output)) == {0.0, 1 / 0.75}
        assert (output == output[:, :1, :1]).all()
        assert output.mean() == pytest.approx(1.0, abs=0.05)
    assert ours(x, training=False) is not None and np.array_equal(ours(x, training=False), x)
    assert np.array_equal(theirs.eval()(torch.from_numpy(x)), x)


@settings(max_examples=25)
@given(
    source=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    target=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_bicubic_resizing_is_that_of_torch(source, target):
    grid = drawn(*source, 3)
    reference = nn.functional.interpolate(channels_first(grid[None]), size=target, mode="bicubic", align_corners=False)
    ours = resize_bicubic(tf.constant(grid), *target)
    assert_same(np.moveaxis(np.asarray(ours)[None], -1, 1), reference)


def test_bicubic_resizing_to_a_size_known_only_at_run_time():
    grid = drawn(4, 4, 3)
    run = tf.function(lambda h, w: resize_bicubic(tf.constant(grid), h, w))
    reference = nn.functional.interpolate(channels_first(grid[None]), size=(7, 3), mode="bicubic")
    assert_same(np.moveaxis(run(tf.constant(7), tf.constant(3)).numpy()[None], -1, 1), reference)
