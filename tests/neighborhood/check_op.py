"""Checks TensorFlow's ops of the native library in any TensorFlow, with nothing but NumPy and this repository's files.

    python tests/neighborhood/check_op.py

`make tensorflow-versions` runs it under several versions of TensorFlow, with one and the same library.
"""

import concurrent.futures
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from definition import BOUND, assert_close, attention_and_gradients, draw  # noqa: E402

from neighborhood import native  # noqa: E402

CASES = [
    ((2, 13, 37, 2, 32), (7, 7), (1, 1), True),
    ((1, 16, 17, 3, 24), (4, 6), (3, 2), True),
    ((1, 7, 7, 1, 5), (7, 7), (1, 1), False),
    ((2, 50, 2, 8), (9,), (4,), True),
    ((1, 5, 9, 11, 2, 6), (3, 4, 5), (1, 2, 1), True),
]


def call(module, query, key, value, table, kernel_size, dilation, scale=0.3):
    return module.neighborhood_attention(
        query=query,
        key=key,
        value=value,
        rel_pos_bias=[] if table is None else [table],
        scale=tf.constant(scale, tf.float64),
        kernel_size=kernel_size,
        dilation=dilation,
    )


def differentiable(module, kernel_size, dilation, scale=0.3):
    """The op with its gradient, as tfmodels.ops defines it."""

    @tf.custom_gradient
    def attention(query, key, value, *biases):
        output, logsumexp = call(module, query, key, value, *(biases or (None,)), kernel_size, dilation, scale)

        def gradient(grad_output):
            *grads, grad_biases = module.neighborhood_attention_grad(
                query=query,
                key=key,
                value=value,
                rel_pos_bias=biases,
                logsumexp=logsumexp,
                grad_output=grad_output,
                scale=tf.constant(scale, tf.float64),
                kernel_size=kernel_size,
                dilation=dilation,
            )
            return [*grads, *grad_biases]

        return output, gradient

    return attention


def check_values_and_gradients(module):
    for seed, (shape, kernel_size, dilation, biased) in enumerate(CASES):
        for dtype in native.DTYPES:
            *arrays, grad_output, table = draw(seed, shape, kernel_size, biased, dtype)
            inputs = [tf.constant(x) for x in (*arrays, *([table] if biased else []))]
            function = differentiable(module, kernel_size, dilation)
            for run in (function, tf.function(function)):
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    output = run(*inputs)
                actual = [output, *tape.gradient(output, inputs, output_gradients=tf.constant(grad_output))]
                expected = attention_and_gradients(*arrays, grad_output, table, kernel_size, dilation, 0.3)
                assert_close([x.numpy() for x in actual], expected, BOUND[dtype])


def check_shapes(module):
    for known in (None, (None,) * 5, (None, None, None, 2, 5), (2, 8, 9, 2, 5)):
        function = tf.function(
            lambda x: call(module, x, x, x, None, [3, 4], [2, 1]), input_signature=[tf.TensorSpec(known, tf.float32)]
        )
        shapes = [output.shape for output in function.get_concrete_function().outputs]
        output, logsumexp = function(tf.zeros((2, 8, 9, 2, 5)))
        assert output.shape == (2, 8, 9, 2, 5) and logsumexp.shape == (2, 8, 9, 2)
        expected = (None, None) if known is None else (list(known), list(known[:-1]))
        inferred = tuple(shape.as_list() if shape.rank is not None else None for shape in shapes)
        assert inferred == expected, f"{known}: inferred {inferred}"
    assert call(module, *[tf.zeros((0, 8, 9, 2, 5))] * 3, None, [3, 3], [1, 1])[0].shape == (0, 8, 9, 2, 5)


def check_errors(module):
    x = tf.zeros((2, 8, 9, 2, 5))
    good = {"query": x, "key": x, "value": x, "rel_pos_bias": [], "scale": tf.constant(0.3, tf.float64)}
    good |= {"kernel_size": [3, 4], "dilation": [2, 1]}
    bad = {
        "as many of each": {"kernel_size": [3]},
        "kernel_size has 9 entries": {"kernel_size": [3] * 9, "dilation": [1] * 9},
        "kernel_size has the entry 0": {"kernel_size": [0, 3]},
        "kernel_size has the entry -3": {"kernel_size": [-3, 3]},
        "dilation has the entry -1": {"dilation": [1, -1]},
        "at least minimum 1": {"kernel_size": []},
        "kernel_size 3 times dilation 5 is more than the 8 positions": {"dilation": [5, 1]},
        "rel_pos_bias has 2 tensors": {"rel_pos_bias": [x, x]},
        "rel_pos_bias has shape (2, 8, 9, 2, 5); it must have (2, 5, 7)": {"rel_pos_bias": [x]},
        "key has shape (1, 8, 9, 2, 5)": {"key": x[:1]},
        "value has shape (2, 8, 9, 2, 4)": {"value": x[..., :4]},
        "query has shape (8, 9, 2, 5)": {"query": x[0]},
        "rank 3": {"query": x[0, 0]},
        "scale has shape (2)": {"scale": tf.constant([0.3, 0.3], tf.float64)},
        "expected to be a": {"query": tf.cast(x, tf.float64)},
        "not in the list of allowed values": {name: tf.cast(x, tf.int32) for name in ("query", "key", "value")},
    }
    for message, change in bad.items():
        try:
            module.neighborhood_attention(**(good | change))
        except (tf.errors.InvalidArgumentError, TypeError, ValueError) as error:
            if message != "rank 3":  # refused by the shape function or by the kernel
                assert message in str(error), f"{message!r} is not in {error}"
        else:
            raise AssertionError(f"no error: {message}")


def check_concurrency(module):
    *arrays, _, table = draw(0, *CASES[0][:2], True, "float32")
    expected = call(module, *arrays, table, [7, 7], [1, 1])[0].numpy()
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        for future in [executor.submit(call, module, *arrays, table, [7, 7], [1, 1]) for _ in range(32)]:
            np.testing.assert_array_equal(future.result()[0], expected)


def check_saved_model(module):
    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 2, 5), tf.float64)])
        def attend(self, x):
            return differentiable(module, [3, 4], [2, 1])(x, x, x)

    model, x = Model(), tf.constant(draw(0, (2, 8, 9, 2, 5), (3, 4), False)[0])
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(model, folder, options=tf.saved_model.SaveOptions(experimental_custom_gradients=True))
        loaded = tf.saved_model.load(folder)
        results = []
        for candidate in (model, loaded):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = candidate.attend(x)
            results.append((y.numpy(), tape.gradient(y, x).numpy()))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


def main():
    module = tf.load_op_library(str(native.TENSORFLOW_LIBRARY))
    checks = (check_values_and_gradients, check_shapes, check_errors, check_concurrency, check_saved_model)
    for check in checks:
        check(module)
    print(f"TensorFlow {tf.__version__}: {len(checks)} checks of the native ops pass")


if __name__ == "__main__":
    main()
