"""ONNX files, once they hold nothing but what ONNX defines."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_onnx(path: str | os.PathLike, model: Any, input_shape: Sequence[int | str], num_outputs: int) -> None:
    """Writes an ONNX model, once it is known to hold only what ONNX defines.

    Args:
        path: the file.
        model: an `onnx.ModelProto` with one input and one output, (batch, num_outputs). It is changed.
        input_shape: sizes; those that are open have a name.
        num_outputs: second size of the output.

    Raises:
        ValueError: an exporter passed over an operation that ONNX does not know.
    """
    import onnx

    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"the model holds what ONNX does not define: {str(error).splitlines()[0]}") from error
    (given,), (returned,) = model.graph.input, model.graph.output
    for value, shape in ((given, input_shape), (returned, (input_shape[0], num_outputs))):
        for dimension, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dimension.Clear()
            setattr(dimension, "dim_param" if isinstance(size, str) else "dim_value", size)
    del model.graph.value_info[:]  # which still has the exporter's names of the sizes
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's remarks, more than a small model
    Path(path).write_bytes(model.SerializeToString())
