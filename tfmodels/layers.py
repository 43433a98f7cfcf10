"""Layers that the families share. Twin: `ptmodels/layers.py`.

Keras' own layers, told the sizes of their inputs, so that a model has all its variables as soon as it is constructed,
and corrected where Keras computes something else than PyTorch. All of them work channels-last.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from neighborhood.attention_layer import check_layer, describe_input
from neighborhood.windows import PerAxis
from tfmodels.ops import neighborhood_attention
from tfmodels.replicas import draw_uniform, moments_of_all_replicas, num_replicas


def _gelu(x):
    # Keras' exact GELU holds a float32 constant, 5e-9 off in float64; and ONNX exporters know erf, not erfc. In
    # this order LiteRT knows it; after a product with a bias, of two axes, TensorFlow computes it within the product.
    reshape = _reshape_of_product(x)
    flat = x if reshape is None else reshape.inputs[0]
    y = 0.5 * flat * (1.0 + ops.erf(flat * 0.5**0.5))
    # asking x for its shape would keep x, and then nothing is computed within the product
    return y if reshape is None else ops.reshape(y, reshape.inputs[1])


def _reshape_of_product(x):
    """Returns the operation of a graph in which `_product` gave (rows, features) their axes back; or None."""
    operation = getattr(x, "op", None)  # eager tensors have none
    if operation is None or operation.type != "Reshape" or operation.inputs[0].op.type != "BiasAdd":
        return None
    return operation if len(operation.inputs[0].shape) == 2 else None


def _gelu_tanh(x):
    return 0.5 * x * (1.0 + ops.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))  # sqrt(2 / pi)


def _selu(x):
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return scale * ops.where(x > 0, x, alpha * ops.expm1(ops.minimum(x, ops.zeros_like(x))))


ACTIVATIONS: dict[str, Callable] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": ops.relu,
    "selu": _selu,
    "silu": ops.silu,
}


def get_activation(activation: str | Callable) -> Callable:
    """Returns the function that a config's `hidden_act` names; a function is returned as it is."""
    return activation if callable(activation) else ACTIVATIONS[activation]


def l2_normalize(x, axis: int):
    """Divides by the L2 norm along `axis`, the norm floored at 1e-12 as torch does (Keras floors its square)."""
    norm = ops.sqrt(ops.sum(ops.square(x), axis=axis, keepdims=True))
    floor = ops.convert_to_tensor(1e-12, dtype=x.dtype)
    return x / ops.maximum(norm, floor)


class LayerWithOutput(keras.layers.Layer):
    """A layer that may hold a sublayer named `output`, as checkpoints do.

    Keras reserves the name on its layers, and its saving passes over reserved names without a word: the sublayer is
    saved under `output_layer` instead.
    """

    output: Any = None

    @property
    def output_layer(self):
        return self.output


_rows_in_products = contextvars.ContextVar("rows_in_products", default=True)


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Within the context, products are traced with all axes, and 1x1 convolutions as such.

    Converters know these; tf2onnx mistakes the shape of what is reshaped twice.
    """
    token = _rows_in_products.set(False)
    try:
        yield
    finally:
        _rows_in_products.reset(token)


def _product(call, inputs):
    """Calls a matrix product with rows, since TensorFlow adds a bias within it only if no reshaping is between them.

    Args:
        call: (rows, in_features) -> (rows, out_features).
        inputs: (..., in_features).

    Returns:
        (..., out_features).
    """
    if len(inputs.shape) == 2:
        return call(inputs)
    *leading, in_features = ops.shape(inputs)
    outputs = call(ops.reshape(inputs, (-1, in_features)))
    return ops.reshape(outputs, (*leading, outputs.shape[-1]))


class Dense(keras.layers.Dense):
    """`y = x W + b`. Input: (..., in_features). Output: (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, use_bias: bool = True):
        super().__init__(out_features, use_bias=use_bias, kernel_initializer="zeros")
        self.build((None, in_features))

    def call(self, inputs, training=None):
        if not _rows_in_products.get():
            return super().call(inputs, training=training)
        return _product(lambda rows: super(Dense, self).call(rows, training=training), inputs)


class Conv2D(keras.layers.Conv2D):
    """Convolution with explicit zero padding on all sides, which Keras' "same" does not do for strides.

    Input: (B, H, W, in_channels). Output: (B, floor((H + 2 padding - kernel_size) / strides) + 1, ..., out_channels).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        strides: int = 1,
        padding: int = 0,
        use_bias: bool = True,
    ):
        super().__init__(
            out_channels,
            kernel_size,
            strides=strides,
            padding="valid",
            data_format="channels_last",
            use_bias=use_bias,
            kernel_initializer="zeros",
        )
        self.zero_padding = padding
        self.build((None, None, None, in_channels))

    def call(self, x):
        if _rows_in_products.get() and self.kernel_size == self.strides == (1, 1) and self.zero_padding == 0:
            return _product(self._call_with_rows, x)
        return super().call(_zero_pad(x, self.zero_padding))

    def _call_with_rows(self, rows):
        y = ops.matmul(rows, ops.reshape(self.kernel, self.kernel.shape[2:]))
        return ops.add(y, self.bias) if self.use_bias else y


class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Depth-wise convolution with explicit zero padding. Input and output: (B, H, W, channels)."""

    def __init__(self, channels: int, kernel_size: int, padding: int = 0):
        super().__init__(kernel_size, padding="valid", data_format="channels_last", depthwise_initializer="zeros")
        self.zero_padding = padding
        self.build((None, None, None, channels))

    def call(self, x):
        return super().call(_zero_pad(x, self.zero_padding))


def _zero_pad(x, padding: int):
    if padding == 0:
        return x
    return ops.pad(x, [[0, 0], [padding, padding], [padding, padding], [0, 0]])


class LayerNormalization(keras.layers.LayerNormalization):
    """Normalises the last axis. Input and output: (..., features)."""

    def __init__(self, features: int, epsilon: float):
        super().__init__(axis=-1, epsilon=epsilon)
        self.build((None, features))

    def call(self, inputs, training=None):
        is_tensor = isinstance(inputs, tf.Tensor) and inputs.dtype in (tf.float32, tf.float64)
        if not is_tensor or not _rows_in_products.get():
            return super().call(inputs)
        normalize = _normalize
        if training:
            normalize = _normalize_for_training
        elif _is_large_in_a_graph(inputs):
            normalize = _normalize_at_once
        return normalize(inputs, self.gamma, self.beta, self.epsilon)


def _normalize(x, gamma, beta, epsilon: float):
    """Normalises the last axis. Keras' moments hold the mean constant in the variance: second derivatives are wrong."""
    normalized, _ = _standardize(x, epsilon)
    return normalized * gamma + beta


def _standardize(x, epsilon: float):
    """Returns x with mean 0 and variance 1 along the last axis, and the factor that it was multiplied with."""
    centered = x - tf.reduce_mean(x, axis=-1, keepdims=True)
    inverse = tf.math.rsqrt(tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True) + epsilon)
    return centered * inverse, inverse


def _normalize_for_training(x, gamma, beta, epsilon: float):
    """Normalises the last axis, with gradients in fewer passes over the map than TensorFlow derives."""
    features = x.shape[-1]

    @tf.custom_gradient
    def normalize(rows, gamma, beta):
        normalized, inverse = _standardize(rows, epsilon)

        def gradient(grad):
            products = grad * normalized
            weights = tf.expand_dims(gamma / features, -1)  # of means over a row, as matrix products
            means = tf.matmul(grad, weights), tf.matmul(products, weights)
            grad_rows = (grad * gamma - means[0] - normalized * means[1]) * inverse
            return grad_rows, tf.reduce_sum(products, axis=0), tf.reduce_sum(grad, axis=0)

        return normalized * gamma + beta, gradient

    rows = tf.reshape(x, (-1, features))
    y = normalize(rows, tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta))
    return tf.reshape(y, tf.shape(x))


_FEWEST_AT_ONCE = 100_000  # elements: a map of 28x28 with 128 channels has as many


def _is_large_in_a_graph(x) -> bool:
    """Whether one operation pays: oneDNN prepares it anew in each call, which takes as long as some small ones."""
    if tf.executing_eagerly() or x.dtype != tf.float32:
        return False
    return math.prod(size or 1 for size in x.shape) >= _FEWEST_AT_ONCE


def _normalize_at_once(x, gamma, beta, epsilon: float):
    """Normalises the last axis in a form that TensorFlow computes as one operation, oneDNN's layer normalization.

    It is that of Keras 2: rows are the channels of one image, whose batch is normalized, without scale and offset. The
    form must reach TensorFlow's optimizer as it is, hence placeholders: what is known would be computed before, and
    reshaping twice be made once.
    """
    features = x.shape[-1]
    rows = tf.reshape(x, (-1, features))
    rows = tf.raw_ops.PlaceholderWithDefault(input=rows, shape=rows.shape)
    count = tf.raw_ops.PlaceholderWithDefault(input=tf.shape(rows)[:1], shape=(1,))
    nothing = tf.constant([], x.dtype)
    normalized = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(rows, (1, -1, features, 1)),
        scale=tf.fill(count, tf.constant(1.0, x.dtype)),
        offset=tf.fill(count, tf.constant(0.0, x.dtype)),
        mean=nothing,
        variance=nothing,
        epsilon=epsilon,
        data_format="NCHW",
        is_training=True,
    ).y
    normalized = tf.reshape(normalized, tf.shape(rows)) * gamma + beta
    return tf.reshape(normalized, tf.shape(x))


class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization whose statistics follow torch's exactly. Input and output: (B, H, W, features).

    Keras keeps the biased variance of the batch, torch the unbiased one; torch also counts its batches. Normalising
    uses the biased variance in both. `momentum` is Keras': 0.9 here is torch's 0.1. Under a distribution strategy the
    batch is that of all replicas together, in the statistics as in their gradients.
    """

    def __init__(self, features: int, epsilon: float):
        super().__init__(axis=-1, momentum=0.9, epsilon=epsilon)
        self.build((None, None, None, features))

    def build(self, input_shape):
        super().build(input_shape)
        self.num_batches_tracked = self.add_weight(
            name="num_batches_tracked", shape=(), dtype="int64", initializer="zeros", trainable=False
        )

    def call(self, x, training=None):
        if not (training and self.trainable):
            return super().call(x, training=False)
        outputs = self._normalize_by_batch(x)
        self.num_batches_tracked.assign(self.num_batches_tracked + 1)
        return outputs

    def _normalize_by_batch(self, x):
        half = keras.backend.standardize_dtype(x.dtype) in ("float16", "bfloat16")
        inputs = ops.cast(x, "float32") if half else x
        if num_replicas() > 1:
            mean, variance, count = moments_of_all_replicas(inputs, axes=(0, 1, 2))
        else:
            # Keras' moments hold the mean constant in the variance, which second derivatives notice
            mean = ops.mean(inputs, axis=(0, 1, 2))
            variance = ops.mean(tf.math.squared_difference(inputs, mean), axis=(0, 1, 2))
            count = ops.cast(ops.prod(ops.stack(ops.shape(inputs)[:-1])), inputs.dtype)
        unbiased = variance * (count / ops.maximum(count - 1, ops.ones_like(count)))
        for statistic, value in ((self.moving_mean, mean), (self.moving_variance, unbiased)):
            value = ops.cast(value, statistic.dtype)
            statistic.assign(statistic * self.momentum + value * (1.0 - self.momentum))
        gamma, beta = ops.cast(self.gamma, mean.dtype), ops.cast(self.beta, mean.dtype)
        outputs = ops.batch_normalization(
            inputs, mean=mean, variance=variance, axis=-1, offset=beta, scale=gamma, epsilon=self.epsilon
        )
        return ops.cast(outputs, self.compute_dtype)


class Dropout(keras.layers.Dropout):
    """Keras' own; under a distribution strategy each sample loses the elements that it would lose in one process.

    Input and output: (B, ...).
    """

    def call(self, inputs, training=False):
        if not training or self.rate in (0, 1) or num_replicas() == 1:
            return super().call(inputs, training=training)
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        kept = draw_uniform(ops.shape(inputs), dtype, self.seed_generator) >= self.rate
        return ops.where(kept, inputs * (1.0 / (1.0 - self.rate)), ops.zeros_like(inputs))


class DropPath(keras.layers.Layer):
    """Stochastic depth: in training, zeroes whole samples with probability `rate` and scales the others up.

    Input and output: (B, ...). Under a distribution strategy, each sample is dropped or not as it would be in one
    process. Source: Huang et al., Deep Networks with Stochastic Depth, 2016.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator() if rate > 0.0 else None
        self.built = True

    def call(self, x, training=None):
        if not training or self.rate == 0.0:
            return x
        return x * (self.draw_mask(x) / (1.0 - self.rate))

    def draw_mask(self, x):
        """Returns which samples stay, as ones and zeros of shape (B, 1, ...)."""
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        draw = draw_uniform(shape, "float32", self.seed_generator)
        return ops.cast(draw < 1.0 - self.rate, x.dtype)


class NeighborhoodAttention(keras.layers.Layer):
    """Multi-head self-attention of each position to a window of its neighbours, with projections; see its subclasses.

    Input and output: (B, *spatial, embed_dim); sizes may be unknown. With `output_attentions`, also the probabilities
    (B, *spatial, heads, keys), as they were applied. Weights have the names of NATTEN's modules: `qkv`, `proj` and, of
    releases before 0.20, `rpb`.

    Args:
        embed_dim: channels.
        num_heads: attention heads; they divide the channels.
        kernel_size: keys per query along each axis; a number, or one per axis.
        dilation: distance between neighbouring keys; a number, or one per axis.
        rel_pos_bias: whether the logits get a learned bias, by the distance from query to key.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: factor on the dot products; head_dim**-0.5 by default.
        attn_drop, proj_drop: dropout rates, of the probabilities and of the output.
        implementation: of `tfmodels.ops.neighborhood_attention`. A model with a "native" layer is not compiled by XLA,
            of which Keras warns; "auto" takes the composed implementation there.

    Raises:
        ValueError: a bad argument, or an input that does not fit.
    """

    axes: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        dilation: PerAxis = 1,
        *,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        implementation: str = "auto",
        **kwargs,
    ):
        super().__init__(**kwargs)
        rates = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        sizes = check_layer(self.axes, embed_dim, num_heads, kernel_size, dilation, rates, implementation)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.kernel_size, self.dilation = sizes
        self.qk_scale = qk_scale
        self.implementation = implementation
        self.supports_jit = implementation != "native"
        self.qkv = keras.layers.Dense(3 * embed_dim, use_bias=qkv_bias, dtype=self.dtype_policy)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = self.add_weight(
                name="rpb",
                shape=(num_heads, *(2 * size - 1 for size in self.kernel_size)),
                initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            )
        self.attn_drop = Dropout(attn_drop, dtype=self.dtype_policy)
        self.proj = keras.layers.Dense(embed_dim, dtype=self.dtype_policy)
        self.proj_drop = Dropout(proj_drop, dtype=self.dtype_policy)
        self.qkv.build((None, embed_dim))
        self.proj.build((None, embed_dim))
        self.built = True

    def call(self, x, output_attentions: bool = False, training=None):
        if len(x.shape) != self.axes + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; give {describe_input(self.axes, self.embed_dim)}")
        *sizes, _ = ops.shape(x)
        heads = (*sizes, self.num_heads, self.embed_dim // self.num_heads)
        query, key, value = (ops.reshape(part, heads) for part in self.project(x))
        dropout = self._drop_attentions if training and self.attn_drop.rate > 0 else None
        output = neighborhood_attention(
            *(query, key, value, self.kernel_size, self.dilation),
            rel_pos_bias=self.rpb,
            scale=self.qk_scale,
            dropout=dropout,
            return_probabilities=output_attentions,
            implementation=self.implementation,
        )
        output, attentions = output if output_attentions else (output, None)
        output = self.proj(ops.reshape(output, (*sizes, self.embed_dim)))
        output = self.proj_drop(output, training=training)
        return (output, attentions) if output_attentions else output

    def project(self, x):
        """Returns queries, keys and values, each (B, *spatial, embed_dim).

        Of one product for all three, the kernels would need copies.
        """
        qkv = self.qkv
        if type(qkv) is not keras.layers.Dense or qkv.quantization_mode or qkv.lora_enabled:
            return ops.split(qkv(x), 3, axis=-1)
        parts = [ops.matmul(x, kernel) for kernel in ops.split(ops.convert_to_tensor(qkv.kernel), 3, axis=-1)]
        if qkv.bias is None:
            return parts
        biases = ops.split(ops.convert_to_tensor(qkv.bias), 3)
        return [ops.add(part, bias) for part, bias in zip(parts, biases, strict=True)]

    def _drop_attentions(self, probabilities):
        return self.attn_drop(probabilities, training=True)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return super().get_config() | {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "rel_pos_bias": self.rpb is not None,
            "qkv_bias": self.qkv.use_bias,
            "qk_scale": self.qk_scale,
            "attn_drop": self.attn_drop.rate,
            "proj_drop": self.proj_drop.rate,
            "implementation": self.implementation,
        }


@keras.saving.register_keras_serializable("twinzoo")
class NeighborhoodAttention1D(NeighborhoodAttention):
    """Neighborhood attention along a line. Input and output: (B, length, embed_dim)."""

    axes = 1


@keras.saving.register_keras_serializable("twinzoo")
class NeighborhoodAttention2D(NeighborhoodAttention):
    """Neighborhood attention on a map. Input and output: (B, height, width, embed_dim)."""

    axes = 2


@keras.saving.register_keras_serializable("twinzoo")
class NeighborhoodAttention3D(NeighborhoodAttention):
    """Neighborhood attention in a volume. Input and output: (B, depth, height, width, embed_dim)."""

    axes = 3
