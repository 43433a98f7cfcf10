"""The composed implementation leaves the frameworks: ONNX from both halves, LiteRT; and how much memory it takes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from definition import draw
from torch.utils._python_dispatch import TorchDispatchMode

from neighborhood import reference
from neighborhood.choice import prefer
from ptmodels.ops import neighborhood_attention as torch_attention
from tfmodels.ops import neighborhood_attention as keras_attention

SIZES = {"kernel_size": (5, 3), "dilation": (1, 2)}
BOUND = 5e-6


def inputs(shape=(2, 11, 12, 2, 8), dtype="float32"):
    query, key, value, _, table = draw(0, shape, SIZES["kernel_size"], True, dtype)
    return query, key, value, table


def expected(query, key, value, table):
    return reference.neighborhood_attention(query, key, value, **SIZES, rel_pos_bias=table)


def run_onnx(path, query, key, value):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, dict(zip(names, (query, key, value), strict=True)))[0]


class Attention(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table))

    def forward(self, query, key, value):
        return torch_attention(query, key, value, **SIZES, rel_pos_bias=self.table)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_torch_exports_to_onnx_with_unknown_sizes(tmp_path):
    *tensors, table = inputs()
    dynamic = {i: torch.export.Dim.DYNAMIC for i in range(3)}
    with prefer("composed"):
        torch.onnx.export(
            Attention(table).eval(),
            tuple(map(torch.tensor, tensors)),
            tmp_path / "attention.onnx",
            dynamo=True,
            dynamic_shapes=(dynamic,) * 3,
            verbose=False,
        )
    for shape in [(2, 11, 12, 2, 8), (1, 16, 9, 2, 8)]:
        *tensors, _ = inputs(shape)
        actual = run_onnx(tmp_path / "attention.onnx", *tensors)
        assert np.abs(actual - expected(*tensors, table)).max() < BOUND


@pytest.mark.filterwarnings("ignore")
def test_keras_exports_to_onnx_with_unknown_sizes(tmp_path):
    import tf2onnx

    *tensors, table = inputs()

    def attend(query, key, value):
        return keras_attention(query, key, value, **SIZES, rel_pos_bias=tf.constant(table), implementation="composed")

    signature = [tf.TensorSpec((None, None, None, 2, 8), tf.float32, name=name) for name in ("query", "key", "value")]
    function = tf.function(attend, input_signature=signature)
    tf2onnx.convert.from_function(function, signature, opset=18, output_path=str(tmp_path / "attention.onnx"))
    for shape in [(2, 11, 12, 2, 8), (1, 16, 9, 2, 8)]:
        *tensors, _ = inputs(shape)
        actual = run_onnx(tmp_path / "attention.onnx", *tensors)
        assert np.abs(actual - expected(*tensors, table)).max() < BOUND


@pytest.mark.filterwarnings("ignore")
def test_keras_converts_to_litert(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    *tensors, table = inputs((1, 11, 12, 2, 8))

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, 11, 12, 2, 8), tf.float32)] * 3)
        def attend(self, query, key, value):
            table_ = tf.constant(table)
            return keras_attention(query, key, value, **SIZES, rel_pos_bias=table_, implementation="composed")

    module = Module()
    tf.saved_model.save(module, str(tmp_path), signatures=module.attend)
    content = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path)).convert()
    runner = Interpreter(model_content=content).get_signature_runner()
    actual = runner(**dict(zip(("query", "key", "value"), tensors, strict=True)))
    assert np.abs(next(iter(actual.values())) - expected(*tensors, table)).max() < BOUND


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.elements = max(self.elements, output.numel())
        return outputs


def test_memory_follows_tokens_times_window_times_heads():
    heads, kernel_size = 2, 7
    for side, head_dim in [(28, 16), (56, 16), (56, 64)]:
        tensors = [torch.randn(1, side, side, heads, head_dim, requires_grad=True) for _ in range(3)]
        with LargestTensor() as largest:
            output = torch_attention(*tensors, kernel_size, implementation="composed")
            torch.autograd.grad(output.sum(), tensors)
        assert largest.elements <= 4 * side**2 * heads * max(kernel_size**2, head_dim)


def test_keras_memory_follows_tokens_times_window_times_heads():
    side, heads, kernel_size = 56, 2, 7
    for head_dim in (16, 64):
        signature = [tf.TensorSpec((1, side, side, heads, head_dim))] * 3

        def attend(*tensors):
            output = keras_attention(*tensors, kernel_size, implementation="composed")
            return tf.gradients(output, tensors)

        graph = tf.function(attend, input_signature=signature).get_concrete_function().graph
        sizes = [output.shape.num_elements() for node in graph.get_operations() for output in node.outputs]
        assert max(size for size in sizes if size) <= 4 * side**2 * heads * max(kernel_size**2, head_dim)


def test_a_saved_model_of_a_model_with_auto_layers_holds_no_native_operation(tmp_path):
    from tfmodels.layers import NeighborhoodAttention2D

    model = keras.Sequential([keras.Input((None, None, 8)), NeighborhoodAttention2D(8, 2, 3)])
    with prefer("composed"):
        model.export(tmp_path, verbose=False)
    assert b"Neighborhood>Attention" not in (tmp_path / "saved_model.pb").read_bytes()
