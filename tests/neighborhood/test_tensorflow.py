"""What TensorFlow expects of an operator: unknown shapes, errors at run time, XLA, SavedModel, second derivatives."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from definition import draw

from neighborhood import native, reference
from tfmodels import ops

IMPLEMENTATIONS = ("native", "composed")


def tensors(shape=(2, 7, 8, 2, 3), kernel_size=(3, 2), biased=True):
    query, key, value, _, table = draw(0, shape, kernel_size, biased)
    return [tf.constant(x) for x in (query, key, value, table) if x is not None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("known", [(None, None, None), (None, 7, None), (2, None, 8)])
def test_sizes_may_be_unknown(implementation, known):
    *inputs, table = tensors()
    inferred = []

    @tf.function(input_signature=[tf.TensorSpec((*known, 2, 3), tf.float64)] * 3)
    def function(query, key, value):
        output = ops.neighborhood_attention(
            query, key, value, (3, 2), (2, 1), rel_pos_bias=table, implementation=implementation
        )
        inferred.append(output.shape)
        return output, tf.gradients(output, [query, key, value])

    expected = ops.neighborhood_attention(*inputs, (3, 2), (2, 1), rel_pos_bias=table)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = ops.neighborhood_attention(*inputs, (3, 2), (2, 1), rel_pos_bias=table)
    output, grads = function(*inputs)
    np.testing.assert_allclose(output, expected, atol=1e-13)
    assert inferred[0].as_list()[-2:] == [2, 3]
    for ours, theirs in zip(grads, tape.gradient(expected, inputs) or [], strict=False):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives_equal_finite_differences(implementation, biased):
    inputs = tensors((1, 4, 5, 1, 2), biased=biased)
    direction = [tf.constant(np.random.default_rng(i).standard_normal(x.shape)) for i, x in enumerate(inputs)]

    def slope(*inputs):
        """The derivative of a function of the output, along `direction`."""
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            bias = inputs[3] if biased else None
            output = ops.neighborhood_attention(
                *inputs[:3], (3, 2), (1, 2), rel_pos_bias=bias, implementation=implementation
            )
            loss = tf.reduce_sum(tf.sin(3.0 * output))
        return sum(tf.reduce_sum(g * d) for g, d in zip(tape.gradient(loss, inputs), direction, strict=True))

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = slope(*inputs)
    second = tape.gradient(value, inputs)
    step = 1e-6
    moved = [slope(*(x + sign * step * d for x, d in zip(inputs, direction, strict=True))) for sign in (1, -1)]
    expected = (moved[0] - moved[1]) / (2 * step)
    actual = sum(tf.reduce_sum(g * d) for g, d in zip(second, direction, strict=True))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_xla_compiles_auto_and_refuses_native():
    *inputs, table = tensors()
    expected = ops.neighborhood_attention(*inputs, (3, 2), rel_pos_bias=table, implementation="composed")

    def function(*inputs):
        return ops.neighborhood_attention(*inputs, (3, 2), rel_pos_bias=table)

    np.testing.assert_allclose(tf.function(function, jit_compile=True)(*inputs), expected, atol=1e-13)
    nested = tf.function(lambda *inputs: tf.function(function)(*inputs), jit_compile=True)
    np.testing.assert_allclose(nested(*inputs), expected, atol=1e-13)
    with pytest.raises(RuntimeError, match="cannot be had: XLA compiles no operations of others"):
        tf.function(
            lambda *inputs: ops.neighborhood_attention(*inputs, (3, 2), implementation="native"), jit_compile=True
        )(*inputs)


def test_symbolic_tensors_make_functional_models():
    query = keras.Input((None, None, 2, 3), dtype="float64")
    output = ops.neighborhood_attention(query, query, query, 3)
    assert output.shape == (None, None, None, 2, 3)
    model = keras.Model(query, output)
    x = tensors()[0]
    np.testing.assert_allclose(model(x), reference.neighborhood_attention(x, x, x, 3), atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sizes_that_do_not_fit_at_run_time_are_an_error(implementation):
    signature = [tf.TensorSpec((None, None, None, 2, 3), tf.float64)] * 3
    function = tf.function(
        lambda *inputs: ops.neighborhood_attention(*inputs, 5, implementation=implementation), input_signature=signature
    )
    x = tf.zeros((1, 4, 8, 2, 3), tf.float64)
    with pytest.raises(tf.errors.InvalidArgumentError, match="kernel_size 5 times dilation 1 is"):
        function(x, x, x)
    x = tf.zeros((1, 6, 8, 2, 3), tf.float64)
    with pytest.raises(tf.errors.InvalidArgumentError):
        function(x, x[:, :5], x)


class Module(tf.Module):
    def __init__(self, implementation):
        super().__init__()
        self.implementation = implementation
        self.table = tf.Variable(tensors()[3])

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 2, 3), tf.float64)])
    def attend(self, x):
        sizes = ((3, 2), (2, 1))
        return ops.neighborhood_attention(x, x, x, *sizes, rel_pos_bias=self.table, implementation=self.implementation)


RELOAD = """
import sys
import numpy as np
import tensorflow as tf
folder, library = sys.argv[1:3]
hidden = ("neighborhood", "tfmodels", "modelspec")

class Finder:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in hidden, name

sys.meta_path.insert(0, Finder())
if library != "none":
    tf.load_op_library(library)
module = tf.saved_model.load(folder)
x = tf.constant(np.load(folder + "/x.npy"))
with tf.GradientTape() as tape:
    tape.watch(x)
    y = module.attend(x)
np.savez(folder + "/results.npz", y=y, grad=tape.gradient(y, x))
"""


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_saved_model_runs_and_differentiates_where_this_package_is_not(tmp_path, implementation):
    module = Module(implementation)
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    tf.saved_model.save(module, str(tmp_path), options=options)
    x = tensors()[0]
    np.save(tmp_path / "x.npy", x)
    library = str(native.TENSORFLOW_LIBRARY) if implementation == "native" else "none"
    process = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path), library],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"NEIGHBORHOOD_THREADS": "2"},
    )
    assert process.returncode == 0, process.stderr
    results = np.load(tmp_path / "results.npz")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = module.attend(x)
    np.testing.assert_allclose(results["y"], y, atol=1e-13)
    np.testing.assert_allclose(results["grad"], tape.gradient(y, x), atol=1e-12)


def test_the_order_in_which_frameworks_load_the_library_does_not_matter():
    code = """
import numpy as np, torch
from ptmodels.ops import neighborhood_attention as of_torch
x = np.random.default_rng(0).standard_normal((1, 5, 5, 1, 4))
first = of_torch(*[torch.tensor(x)] * 3, 3, implementation="native").numpy()
from tfmodels.ops import neighborhood_attention as of_keras
second = of_keras(x, x, x, 3, implementation="native").numpy()
print(np.array_equal(first, second))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "True", process.stderr


def test_what_is_not_known_well_enough_is_named():
    signature = [tf.TensorSpec((None, None, None, 2, None), tf.float32)]
    function = tf.function(lambda x: ops.neighborhood_attention(x, x, x, 3), input_signature=signature)
    with pytest.raises(ValueError, match="head_dim, its last size, must be known"):
        function.get_concrete_function()
    function = tf.function(
        lambda x: ops.neighborhood_attention(x, x, x, 3), input_signature=[tf.TensorSpec(None, tf.float32)]
    )
    with pytest.raises(ValueError, match="must have a known rank"):
        function.get_concrete_function()
