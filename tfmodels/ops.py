"""Neighborhood attention as an operation. Twin: `ptmodels/ops.py`.

Two implementations: `native`, C++ kernels for the CPU (`neighborhood/csrc`) behind TensorFlow ops of our own, and
`composed`, of Keras' own operations, which runs anywhere. A SavedModel with native operations needs their library:
call `load()` before loading it, or `tf.load_op_library(neighborhood.native.TENSORFLOW_LIBRARY)` where this package is
not installed. Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (arXiv:2204.07143).
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from neighborhood import native
from neighborhood.arguments import check_arguments
from neighborhood.choice import choose
from neighborhood.windows import PerAxis
from tfmodels import composed_attention


def neighborhood_attention(
    query,
    key,
    value,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    rel_pos_bias=None,
    scale: float | None = None,
    dropout: Callable | None = None,
    return_probabilities: bool = False,
    implementation: str = "auto",
):
    """Attention of each position to a window of its neighbours, in one, two or three dimensions.

    Args:
        query, key, value: (B, *spatial, heads, head_dim), of one floating dtype; sizes may be unknown.
        kernel_size: keys per query along each axis; a number, or one per axis.
        dilation: distance between neighbouring keys; a number, or one per axis. `kernel_size * dilation` may not
            exceed the axis.
        rel_pos_bias: (heads, 2 * kernel_size - 1 per axis), added to the logits by the distance from query to key.
        scale: factor on the dot products; head_dim**-0.5 by default.
        dropout: applied to the probabilities.
        return_probabilities: whether to return them too, after dropout.
        implementation: "native", "composed", or "auto": native on the CPU outside of XLA, in float32, float64, float16
            or bfloat16 (the last two computed in float32), when neither dropout nor probabilities are asked for.

    Returns:
        (B, *spatial, heads, head_dim); and, when asked for, the probabilities (B, *spatial, heads, keys), the keys of
        a window row by row.

    Raises:
        ValueError: arguments that do not go together, or a window that does not fit a known size.
        tf.errors.InvalidArgumentError: the same of sizes that are known only when the operation runs.
        RuntimeError: "native" is asked for and cannot be had.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "dropout": dropout,
        "return_probabilities": return_probabilities,
        "implementation": implementation,
    }
    tensors = (query, key, value) if rel_pos_bias is None else (query, key, value, rel_pos_bias)
    if any(isinstance(tensor, keras.KerasTensor) for tensor in tensors):
        return _NeighborhoodAttention(kernel_size, dilation, **options).symbolic_call(*tensors)
    return _neighborhood_attention(*tensors, kernel_size=kernel_size, dilation=dilation, **options)


class _NeighborhoodAttention(keras.Operation):
    """The operation on the symbolic tensors of a functional model."""

    def __init__(self, kernel_size, dilation, **options):
        super().__init__()
        self.options = {"kernel_size": kernel_size, "dilation": dilation, **options}

    def call(self, *tensors):
        return _neighborhood_attention(*tensors, **self.options)

    def compute_output_spec(self, *tensors):
        return keras.src.backend.compute_output_spec(self.call, *tensors)


def _neighborhood_attention(
    query,
    key,
    value,
    rel_pos_bias=None,
    *,
    kernel_size: PerAxis,
    dilation: PerAxis,
    scale: float | None,
    dropout: Callable | None,
    return_probabilities: bool,
    implementation: str,
):
    query = tf.convert_to_tensor(query)
    key, value = (_convert(name, tensor, query) for name, tensor in (("key", key), ("value", value)))
    if not query.dtype.is_floating:
        raise TypeError(f"query is {query.dtype.name}; give a floating dtype")
    shapes = [tuple(tensor.shape) for tensor in (query, key, value) if tensor.shape.rank is not None]
    if len(shapes) < 3:
        raise ValueError("query, key and value must have a known rank: (B, *spatial, heads, head_dim)")
    if rel_pos_bias is not None:
        rel_pos_bias = tf.convert_to_tensor(rel_pos_bias)
    bias_shape = None if rel_pos_bias is None else tuple(rel_pos_bias.shape)
    sizes = check_arguments(shapes[0], shapes[1], shapes[2], kernel_size, dilation, bias_shape)
    if shapes[0][-1] is None:
        raise ValueError(f"query has shape {shapes[0]}; head_dim, its last size, must be known")
    scale = max(shapes[0][-1], 1) ** -0.5 if scale is None else float(scale)

    def obstacle() -> str | None:
        if dropout is not None or return_probabilities:
            return "the kernels keep no probabilities, for dropout or to return them"
        if query.dtype.name not in native.DTYPES:
            return f"the kernels take {', '.join(native.DTYPES)}, and query is {query.dtype.name}"
        if _is_compiled_by_xla():
            return "XLA compiles no operations of others"
        if not _is_on_cpu(query):
            return "the kernels run on the CPU"
        return None

    if choose(implementation, _why_unavailable(), obstacle) == "native":
        biases = () if rel_pos_bias is None else (tf.cast(rel_pos_bias, query.dtype),)
        return _native_attention(query, key, value, *biases, sizes=sizes, scale=scale)
    query, key, value = _after_checks(query, key, value)
    return composed_attention.neighborhood_attention(
        *(query, key, value, *sizes),
        rel_pos_bias=rel_pos_bias,
        scale=scale,
        dropout=dropout,
        return_probabilities=return_probabilities,
    )


def _why_unavailable() -> str | None:
    try:
        load()
    except native.NativeUnavailableError as error:
        return str(error)
    return None


def _convert(name: str, tensor, query: tf.Tensor) -> tf.Tensor:
    tensor = tf.convert_to_tensor(tensor)
    if tensor.dtype != query.dtype:
        raise TypeError(f"query is {query.dtype.name} and {name} {tensor.dtype.name}; they must be equal")
    return tensor


def _after_checks(query, key, value) -> list[tf.Tensor]:
    """Returns the tensors, to be had once sizes that are not known yet are checked (XLA knows them and drops this)."""
    checks = []
    for name, tensor in (("key", key), ("value", value)):
        if not (query.shape.is_fully_defined() and tensor.shape.is_fully_defined()):
            shapes = tf.shape(query), tf.shape(tensor)
            equal = tf.reduce_all(tf.equal(*shapes))
            checks.append(tf.debugging.Assert(equal, [f"query and {name} have different shapes", *shapes]))
    if not checks:
        return [query, key, value]
    with tf.control_dependencies(checks):
        return [tf.identity(tensor) for tensor in (query, key, value)]


def _is_compiled_by_xla() -> bool:
    try:
        from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
    except ImportError:  # not of the public interface
        return False
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _is_on_cpu(query: tf.Tensor) -> bool:
    if tf.executing_eagerly():
        return "CPU" in query.device
    return not tf.config.list_logical_devices("GPU")  # where a graph runs is not settled yet


@functools.cache
def load():
    """Loads the library of the native operations, for models that hold them; returns its module.

    Raises:
        neighborhood.native.NativeUnavailableError: it was not built, or this TensorFlow cannot load it.
    """
    native.load()
    try:
        module = tf.load_op_library(str(native.TENSORFLOW_LIBRARY))
    except (tf.errors.OpError, OSError) as error:
        raise native.NativeUnavailableError(f"{native.TENSORFLOW_LIBRARY.name} cannot be loaded: {error}") from error
    if not hasattr(module, "neighborhood_attention"):
        raise native.NativeUnavailableError("TensorFlow did not take the operations; another copy may be loaded")
    return module


def _native_attention(query, key, value, *biases, sizes, scale: float):
    native.set_threads(tf.config.threading.get_intra_op_parallelism_threads())
    attributes = {"kernel_size": sizes[0], "dilation": sizes[1]}

    @tf.custom_gradient
    def attention(query, key, value, *biases):
        factor = tf.constant(scale, tf.float64)
        output, logsumexp = load().neighborhood_attention(
            query=query, key=key, value=value, rel_pos_bias=biases, scale=factor, **attributes
        )

        @tf.custom_gradient
        def gradients(grad_output, query, key, value, *biases):
            grads = load().neighborhood_attention_grad(
                **{"query": query, "key": key, "value": value, "rel_pos_bias": biases},
                **{"logsumexp": logsumexp, "grad_output": grad_output},
                scale=tf.constant(scale, tf.float64),
                **attributes,
            )
            grads = [*grads[:3], *grads[3]]

            def second_gradients(*grads_of_grads):
                inputs = [tf.identity(tensor) for tensor in (grad_output, query, key, value, *biases)]
                return _second_gradients(*inputs, sizes=sizes, scale=scale, grads=grads_of_grads)

            return grads, second_gradients

        def gradient(grad_output):
            return gradients(grad_output, query, key, value, *biases)

        return output, gradient

    return attention(query, key, value, *biases)


def _second_gradients(grad_output, *inputs, sizes, scale: float, grads):
    """Differentiates the gradients, through the composed implementation."""
    with tf.GradientTape() as outer:
        outer.watch((grad_output, *inputs))
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            query, key, value, *biases = inputs
            output = composed_attention.neighborhood_attention(
                query, key, value, *sizes, rel_pos_bias=biases[0] if biases else None, scale=scale
            )
        first = inner.gradient(output, inputs, output_gradients=grad_output)
    zero = tf.UnconnectedGradients.ZERO
    return outer.gradient(first, (grad_output, *inputs), output_gradients=list(grads), unconnected_gradients=zero)
