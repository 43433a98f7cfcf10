"""NAT and DiNAT with another operator: what a user who knows no kernels for it would write, in either framework."""

import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import torch

from neighborhood.windows import bias_positions, key_positions

WAYS = ("dense", "gather")


def attention_layers(model: Any) -> list:
    """Returns the layers of a NAT or DiNAT of either half that call the operator, in the order in which they run."""
    return [block.attention.self for level in model.get_body().encoder.levels for block in level.layers]


def calls_of(model: torch.nn.Module, size: int) -> list[tuple]:
    """Returns, per attention layer of a torch model, (height, width, heads, head_dim, kernel_size, dilation)."""
    calls: list[tuple] = []

    def operator(query, key, value, kernel_size, dilation, **_):
        calls.append((*query.shape[1:], kernel_size, dilation))
        return value

    layers = attention_layers(model)
    before = [type(layer) for layer in layers]
    replace_operator(model, [operator] * len(layers))
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for layer, cls in zip(layers, before, strict=True):
        layer.__class__ = cls
    return calls


def replace_operator(model: Any, operators: list[Callable]) -> None:
    """Gives each attention layer of a model an operator of its own; the rest of the model stays as it is."""
    for layer, operator in zip(attention_layers(model), operators, strict=True):
        cls = type(layer)
        name = "forward" if isinstance(layer, torch.nn.Module) else "call"
        function = getattr(cls, name)
        others = {**function.__globals__, "neighborhood_attention": operator}
        del others["__name__"]  # torch.compile takes globals of one module's name for the same
        replaced = types.FunctionType(function.__code__, others, name, function.__defaults__, function.__closure__)
        object.__setattr__(layer, "__class__", type(cls.__name__, (cls,), {name: replaced}))


def other_operators(model: Any, way: str, calls: list[tuple], training: bool) -> list[Callable]:
    """Returns an operator for each attention layer: "dense" (all keys, masked) or "gather" (each window's keys).

    What does not change from call to call is made beforehand: positions, and in inference the mask with the bias.
    """
    framework = "torch" if isinstance(model, torch.nn.Module) else "keras"
    classes: dict[tuple[str, str], Callable] = {
        ("torch", "dense"): _TorchDense,
        ("torch", "gather"): _TorchGather,
        ("keras", "dense"): _KerasDense,
        ("keras", "gather"): _KerasGather,
    }
    positions: dict[tuple, _Positions] = {}
    operators = []
    for layer, call in zip(attention_layers(model), calls, strict=True):
        at = (*call[:2], *call[4:])
        positions.setdefault(at, _Positions(*at))
        operators.append(classes[framework, way](positions[at], layer.rpb, training))
    return operators


class _Positions:
    """Per query of a map, its keys and their entries in the table of biases, both (N, K)."""

    def __init__(self, height: int, width: int, kernel_size: int, dilation: int):
        self.tokens = height * width
        axes = [(length, kernel_size, dilation) for length in (height, width)]
        rows, columns = (key_positions(*axis) for axis in axes)
        self.keys = (rows[:, None, :, None] * width + columns[None, :, None, :]).reshape(self.tokens, -1)
        rows, columns = (bias_positions(*axis) for axis in axes)
        self.entries = (rows[:, None, :, None] * (2 * kernel_size - 1) + columns[None, :, None, :]).reshape(
            self.tokens, -1
        )
        self.table_size = (2 * kernel_size - 1) ** 2


class _TorchDense:
    def __init__(self, positions: _Positions, table: torch.Tensor, training: bool):
        self.tokens = positions.tokens
        self.keys, self.entries = torch.tensor(positions.keys), torch.tensor(positions.entries)
        self.known = None if training else self.mask(table.detach())

    def mask(self, table):
        mask = table.new_full((table.shape[0], self.tokens, self.tokens), -torch.inf)
        return mask.scatter(2, self.keys.expand(len(table), -1, -1), table.flatten(1)[:, self.entries])

    def __call__(self, query, key, value, kernel_size, dilation, *, rel_pos_bias, **_):
        mask = self.mask(rel_pos_bias) if self.known is None else self.known
        inputs = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))  # (B, heads, N, head_dim)
        output = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask[None])
        return output.transpose(1, 2).reshape(query.shape)


class _TorchGather:
    def __init__(self, positions: _Positions, table: torch.Tensor, training: bool):
        self.keys, self.entries = torch.tensor(positions.keys), torch.tensor(positions.entries)

    def __call__(self, query, key, value, kernel_size, dilation, *, rel_pos_bias, **_):
        shape = query.shape
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        logits = torch.einsum("bhnd,bhnkd->bhnk", query * query.shape[-1] ** -0.5, key[:, :, self.keys])
        weights = (logits + rel_pos_bias.flatten(1)[:, self.entries]).softmax(-1)
        output = torch.einsum("bhnk,bhnkd->bhnd", weights, value[:, :, self.keys])
        return output.transpose(1, 2).reshape(shape)


class _KerasDense:
    def __init__(self, positions: _Positions, table: keras.Variable, training: bool):
        tokens = positions.tokens
        entries = np.full((tokens, tokens), positions.table_size, np.int32)  # behind the last stands what masks
        np.put_along_axis(entries, positions.keys, positions.entries.astype(np.int32), 1)
        self.entries = tf.constant(entries)
        self.known = None if training else self.mask(tf.convert_to_tensor(table))

    def mask(self, table):
        flat = tf.reshape(table, (table.shape[0], -1))
        return tf.gather(tf.pad(flat, ((0, 0), (0, 1)), constant_values=-np.inf), self.entries, axis=1)

    def __call__(self, query, key, value, kernel_size, dilation, *, rel_pos_bias, **_):
        mask = self.mask(tf.convert_to_tensor(rel_pos_bias)) if self.known is None else self.known
        shape = tf.shape(query)
        query, key, value = _keras_by_head(query, key, value)
        logits = tf.matmul(query * query.shape[-1] ** -0.5, key, transpose_b=True) + mask
        output = tf.matmul(tf.nn.softmax(logits), value)
        return tf.reshape(tf.transpose(output, (0, 2, 1, 3)), shape)


class _KerasGather:
    def __init__(self, positions: _Positions, table: keras.Variable, training: bool):
        self.keys, self.entries = tf.constant(positions.keys, tf.int32), tf.constant(positions.entries, tf.int32)

    def __call__(self, query, key, value, kernel_size, dilation, *, rel_pos_bias, **_):
        shape = tf.shape(query)
        query, key, value = _keras_by_head(query, key, value)
        table = tf.convert_to_tensor(rel_pos_bias)
        bias = tf.gather(tf.reshape(table, (table.shape[0], -1)), self.entries, axis=1)  # (heads, N, K)
        query = query[:, :, :, None] * query.shape[-1] ** -0.5
        logits = tf.matmul(query, tf.gather(key, self.keys, axis=2), transpose_b=True)[:, :, :, 0] + bias
        output = tf.matmul(tf.nn.softmax(logits)[:, :, :, None], tf.gather(value, self.keys, axis=2))
        return tf.reshape(tf.transpose(output[:, :, :, 0], (0, 2, 1, 3)), shape)


def _keras_by_head(*tensors) -> list:
    """(B, H, W, heads, head_dim) to (B, heads, tokens, head_dim)."""
    shape = tf.shape(tensors[0])
    shape = (shape[0], shape[1] * shape[2], tensors[0].shape[3], tensors[0].shape[4])
    return [tf.transpose(tf.reshape(x, shape), (0, 2, 1, 3)) for x in tensors]
